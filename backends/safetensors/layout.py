"""What a target's layout is: which tensors a bundle holds under which keys, and back again."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from backends.base import ContentKind
from calib.artifact import QuantizedCache, QuantizedLinear, QuantizedModel


@dataclass(frozen=True)
class Entry:
    """One tensor of a bundle, described before it is read."""

    key: str
    kind: ContentKind
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Makes the tensor: ``dtype``, ``shape``, contiguous, on the CPU. It is written and forgotten."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Layout(Protocol):
    """The keys, shapes, dtypes and packing of one target. Holds no state."""

    target: str

    def model_refusal(self, config: Mapping[str, Any], linears: Collection[str]) -> tuple[str, str] | None:
        """See :meth:`backends.base.Backend.model_refusal`."""

    def entries(self, model: QuantizedModel) -> Iterator[Entry]:
        """Every tensor of the bundle, each key once, in an order that does not change; nothing is read yet."""

    def files(self, model: QuantizedModel) -> Mapping[str, str]:
        """Further text files of the bundle by name, such as a ``config.json`` with a ``quantization_config``."""

    def linears(
        self, tensors: Mapping[str, Tensor], described: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]
    ) -> Mapping[str, QuantizedLinear]:
        """The inverse of :meth:`entries` for quantized linears, in the artifact's orientation, unpacked.

        Args:
            tensors: what the bundle holds, by key; memory-mapped.
            described: :meth:`~calib.artifact.QuantizedLinear.description` of every linear, by its name in the source
                model, from the bundle's manifest.
            config: Hugging Face config of the source model.

        Raises:
            KeyError: a tensor is missing.
            ValueError: one has another shape or dtype than its description says.
        """

    def cache(
        self, tensors: Mapping[str, Tensor], described: Mapping[str, Any], config: Mapping[str, Any]
    ) -> QuantizedCache:
        """The inverse of :meth:`entries` for a quantized KV cache.

        Args:
            tensors: what the bundle holds, by key; memory-mapped.
            described: its scheme (``tensor_scheme_to_dict``) under ``scheme`` and its layers under ``layers``.
            config: Hugging Face config of the source model.
        """
