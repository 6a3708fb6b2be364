"""What a target's layout is: which tensors a bundle holds under which keys, and back again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from backends.base import ContentKind, Reason
from calib.artifact import QuantizedCache, QuantizedLinear, QuantizedModel
from calib.schemes import LinearScheme

_VALUES_AT_ONCE = 1 << 18
"""Of the result; a float32 for each of them is a megabyte."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a bundle, described before it is read."""

    key: str
    kind: ContentKind
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Makes the tensor: ``dtype``, ``shape``, contiguous, on the CPU. It is written and forgotten.
    """

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_parts(
    length: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    make: Callable[[slice], Tensor],
    *,
    axis: int = 0,
) -> Tensor:
    """A tensor that is made in parts: what is computed on the way stays in the processor's cache.

    Packing and dequantizing pass over a weight several times. On a whole one each pass would go
    through memory, and would need as much of it again.

    Args:
        length: rows (or columns) of what ``make`` starts from.
        shape: of the result.
        dtype: of the result.
        make: from a slice of those rows to the part of the result that they become.
        axis: of the result, along which the parts follow each other; its size is a multiple of
            ``length``.
    """
    result = torch.empty(shape, dtype=dtype)
    each = shape[axis] // length
    step = max(1, _VALUES_AT_ONCE * length // max(1, result.numel()))
    for start in range(0, length, step):
        stop = min(start + step, length)
        result.narrow(axis, start * each, (stop - start) * each).copy_(make(slice(start, stop)))

    return result


class Layout(Protocol):
    """The keys, shapes, dtypes and packing of one target. Holds no state."""

    target: str

    def model_refusal(
        self, config: Mapping[str, Any], linears: Mapping[str, LinearScheme]
    ) -> Reason | None:
        """Why a bundle cannot hold this model, and what to do; else ``None``.

        Args:
            config: Hugging Face config as a dictionary.
            linears: how what is quantized is, by module name: linears, experts, embeddings.
        """

    def entries(self, model: QuantizedModel) -> Iterator[Entry]:
        """Every tensor of the bundle, each key once, in an order that does not change; nothing is
        read yet.
        """

    def files(self, model: QuantizedModel) -> Mapping[str, str]:
        """Further text files of the bundle by name, such as a ``config.json`` with a
        ``quantization_config``.
        """

    def linears(
        self,
        tensors: Mapping[str, Tensor],
        described: Mapping[str, Mapping[str, Any]],
        config: Mapping[str, Any],
    ) -> Mapping[str, QuantizedLinear]:
        """The inverse of :meth:`entries` for quantized linears, in the artifact's orientation,
        unpacked.

        Args:
            tensors: what the bundle holds, by key; memory-mapped.
            described: :meth:`~calib.artifact.QuantizedLinear.description` of every linear, by its
                name in the source model, from the bundle's manifest.
            config: Hugging Face config of the source model.

        Raises:
            KeyError: a tensor is missing.
            ValueError: one has another shape or dtype than its description says.
        """

    def floats(
        self,
        tensors: Mapping[str, Tensor],
        described: Mapping[str, Mapping[str, Any]],
        config: Mapping[str, Any],
    ) -> Mapping[str, Tensor]:
        """The inverse of :meth:`entries` for everything that no quantized linear holds.

        Arguments and errors as for :meth:`linears`.

        Returns:
            The float tensors of the source model by checkpoint key and in its orientation, as
            :attr:`~calib.artifact.QuantizedModel.floats` has them.
        """

    def cache(
        self, tensors: Mapping[str, Tensor], described: Mapping[str, Any], config: Mapping[str, Any]
    ) -> QuantizedCache:
        """The inverse of :meth:`entries` for a quantized KV cache.

        Args:
            tensors: what the bundle holds, by key; memory-mapped.
            described: its scheme (``tensor_scheme_to_dict``) under ``scheme`` and its layers under
                ``layers``.
            config: Hugging Face config of the source model.
        """
