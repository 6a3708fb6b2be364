"""The open files of a quantized checkpoint, with its float weights in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from calib.network.quantized.formats import Quantization
from calib.network.quantized.weight import Header, Weight

if TYPE_CHECKING:
    from torch import Tensor

_DTYPE = "F32"
_SHAPE, _WHOLE = ".weight_shape", ("I32", "I64")


def with_floats(files: Mapping[str, Any], quantization: Quantization) -> dict[str, Any]:
    """What holds each tensor of the float checkpoint: its file, or what computes it.

    Args:
        files: the open safetensors file that holds each stored tensor, by name.
        quantization: how they are quantized.

    Raises:
        CheckpointError: as for :meth:`~calib.network.quantized.formats.Quantization.decoded`.
    """
    decoded = quantization.decoded({name: _header(name, file) for name, file in files.items()})
    held: dict[str, Any] = {name: files[name] for name in decoded.kept}
    return held | {name: Computed(weight, files) for name, weight in decoded.weights.items()}


def _header(name: str, file: Any) -> Header:
    part = file.get_slice(name)
    dtype, shape = str(part.get_dtype()), tuple(part.get_shape())
    said = name.endswith(_SHAPE) and dtype in _WHOLE and shape == (2,)
    return Header(dtype, shape, tuple(file.get_tensor(name).tolist()) if said else None)


class Computed:
    """Answers for one weight as an open safetensors file does."""

    def __init__(self, weight: Weight, files: Mapping[str, Any]) -> None:
        self._weight = weight
        self._files = files

    def get_tensor(self, name: str) -> Tensor:
        """The weight, in float32."""
        stored = self._weight.parts.items()
        return self._weight.decode(
            {role: self._files[each].get_tensor(each) for role, each in stored}
        )

    def stored_bytes(self) -> int:
        """Of all that it is computed from."""
        return sum(
            self._files[each].get_tensor(each).nbytes for each in self._weight.parts.values()
        )

    def get_slice(self, name: str) -> Computed:
        """Itself, of which the two below are asked."""
        return self

    def get_shape(self) -> list[int]:
        """Of the weight."""
        return list(self._weight.shape)

    def get_dtype(self) -> str:
        """As safetensors spells it."""
        return _DTYPE
