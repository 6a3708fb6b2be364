"""Tripy's names of dtypes, and torch's. Imports no Tripy."""

from __future__ import annotations

from typing import Protocol

import torch

from calib.errors import BackendError
from calib.schemes import TensorScheme

_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""torch's dtypes of weights and scales, by Tripy's names for them."""


class NamedDtype(Protocol):
    """One of Tripy's dtypes, such as ``tp.float16``."""

    @property
    def name(self) -> str:
        """As the attribute of ``nvtripy`` is called."""


def float_dtype(dtype: NamedDtype) -> torch.dtype:
    """torch's dtype for Tripy's dtype of weights and scales.

    Raises:
        BackendError: ``dtype`` is none of ``tp.float32``, ``tp.float16`` and ``tp.bfloat16``.
    """
    in_torch = _FLOATS.get(getattr(dtype, "name", ""))
    if in_torch is None:
        raise BackendError(
            f"weights and scales of a Tripy module cannot be '{dtype}'",
            hint=(
                f"choose {', '.join(f'tp.{name}' for name in _FLOATS)}; what is quantized to is the"
                " mode's concern"
            ),
        )

    return in_torch


def tripy_dtype(scheme: TensorScheme) -> str:
    """What Tripy calls a format: ``int8``, ``int4`` or ``float8``."""
    return tripy_name(scheme.format.name)


def tripy_name(format_name: str) -> str:
    """The same by rotq's name of the format."""
    return format_name.removesuffix("_e4m3")
