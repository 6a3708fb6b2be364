"""rotq's schemes in the words of compressed-tensors: the compression of a linear, and its
``QuantizationScheme``.

===================  ==========================
==================================================================== compression          weights
stored as ===================  ==========================
==================================================================== int-quantized        INT8,
quantized inputs      ``weight`` int8 pack-quantized       INT4; INT8 weight-only or
``weight_packed`` int32, ``weight_shape`` int64; zero points packed too
                     in blocks
float-quantized      FP8, quantized inputs       ``weight`` float8_e4m3fn naive-quantized      FP8
weight-only             the same nvfp4-pack-          NVFP4                       ``weight_packed``
uint8, ``weight_scale`` float8_e4m3fn, and quantized
``weight_global_scale`` float32, the inverse of rotq's second level mxfp4-pack-          MXFP4
``weight_packed`` uint8, ``weight_scale`` uint8, a biased exponent quantized mxfp8-quantized
MXFP8                       ``weight`` float8_e4m3fn, ``weight_scale`` uint8, a biased exponent
===================  ==========================
====================================================================

INT4 and blocked weights are packed with quantized inputs as well: the format also has them
unpacked, in up to twice the space, but vLLM 0.33 has kernels of packed ones alone
(``_is_wNaM_int``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from backends.base import Reason
from backends.safetensors.compressed_tensors.library import require
from backends.safetensors.source import block_size
from calib.artifact import QuantizedLinear
from calib.errors import BackendError
from calib.schemes import (
    INT4,
    LinearScheme,
    PerBlock,
    PerChannel,
    PerTensor,
    PerToken,
    TensorScheme,
)

Compression = Literal[
    "int-quantized",
    "pack-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
]
MIXED = "mixed-precision"
"""What a checkpoint with several compressions calls its own."""
_BLOCK_FORMATS: dict[tuple[str, str], Compression] = {
    ("float4_e2m1", "e4m3"): "nvfp4-pack-quantized",
    ("float4_e2m1", "e8m0"): "mxfp4-pack-quantized",
    ("float4_e2m1", "e8m0-floor"): "mxfp4-pack-quantized",
    ("float8_e4m3", "e8m0"): "mxfp8-quantized",
    ("float8_e4m3", "e8m0-floor"): "mxfp8-quantized",
}
_SCALE_DTYPES = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8", "e8m0-floor": "torch.uint8"}


@dataclass(frozen=True)
class Form:
    """What the linears of one config group have in common."""

    scheme: LinearScheme
    whole_rows: bool
    """Blocks at least as long as a row: one scale for each output channel, as the format puts it.
    """

    @property
    def rounds_to_bfloat16(self) -> bool:
        """Whether transformers turns weights into bfloat16, and so computes in nothing else."""
        return self.compression in _BLOCK_FORMATS.values()

    @property
    def compression(self) -> Compression:
        """How weights are stored."""
        weight, entering = self.scheme.weight, self.scheme.input
        if weight.scale_format != "compute":
            return _BLOCK_FORMATS[weight.format.name, weight.scale_format]
        if weight.format.kind == "float":
            return "naive-quantized" if entering is None else "float-quantized"
        blocked = isinstance(weight.granularity, PerBlock) and not self.whole_rows
        return (
            "pack-quantized"
            if entering is None or blocked or weight.format == INT4
            else "int-quantized"
        )

    def group(self, targets: Sequence[str]) -> Any:
        """The library's ``QuantizationScheme`` for the modules ``targets``."""
        schemes = require("compressed_tensors.quantization")
        entering = self.scheme.input
        return schemes.QuantizationScheme(
            targets=list(targets),
            weights=_arguments(self.scheme.weight, whole_rows=self.whole_rows),
            input_activations=None if entering is None else _arguments(entering),
            format=self.compression,
        )


def form_of(linear: QuantizedLinear) -> Form:
    """The form of ``linear``.

    Raises:
        BackendError: something of it has no place in the format.
    """
    name, width = linear.name, linear.weight.shape[1]
    if linear.weight_order is not None:
        raise BackendError(
            f"the blocks of '{name}' follow an order of the input features of their own (GPTQ's"
            " act-order), which compressed-tensors no longer stores (g_idx, until 0.19)",
            hint=(
                "leave static_groups on: groups of neighbouring input features, as in"
                " --weight-algorithm gptq"
            ),
        )

    refusal = short_blocks(name, width, linear.weight_scheme)
    if refusal is not None:
        raise BackendError(refusal.reason, hint=refusal.hint)

    return Form(
        LinearScheme(linear.weight_scheme, linear.input_scheme),
        whole_rows(width, linear.weight_scheme),
    )


def short_blocks(name: str, width: int, scheme: TensorScheme) -> Reason | None:
    """Why the blocks of the linear ``name`` of ``width`` input features do not fit, and what to do;
    or ``None``.
    """
    size = block_size(scheme)
    if size is None or width % size == 0 or whole_rows(width, scheme):
        return None

    reason = (
        f"blocks of {size} do not divide the {width} input features of '{name}', and"
        " compressed-tensors has "
    )
    leave = f"leave the linear in float with --override '{name}=float'"
    if scheme.scale_format != "compute":
        return Reason(f"{reason}blocks of no other size for this format", leave)

    return Reason(
        f"{reason}no short blocks",
        f"choose a --block-size that divides them, such as {math.gcd(width, size)}, or {leave}",
    )


def whole_rows(width: int, scheme: TensorScheme) -> bool:
    """Whether blocks are at least as long as a row, in a format that need not have blocks."""
    size = block_size(scheme)
    return size is not None and size >= width and scheme.scale_format == "compute"


def cache_arguments(scheme: TensorScheme) -> Any:
    """The library's ``QuantizationArgs`` of a KV cache of ``scheme``."""
    return _arguments(scheme)


def _arguments(scheme: TensorScheme, *, whole_rows: bool = False) -> Any:
    arguments: dict[str, Any] = {
        "num_bits": scheme.format.bits,
        "type": "int" if scheme.format.kind == "integer" else "float",
        "symmetric": scheme.symmetric,
        "dynamic": scheme.dynamic,
    }
    match scheme.granularity:
        case PerBlock(size) if not whole_rows:
            arguments |= {"strategy": "group", "group_size": size}
        case PerBlock() | PerChannel():
            arguments["strategy"] = "channel"
        case PerToken():
            arguments["strategy"] = "token"
        case PerTensor():
            arguments["strategy"] = "tensor"

    if scheme.scale_format in _SCALE_DTYPES:
        arguments["scale_dtype"] = _SCALE_DTYPES[scheme.scale_format]
    if scheme.scale_format == "e4m3":
        arguments["strategy"] = "tensor_group"
        arguments["dynamic"] = "local" if scheme.dynamic else False

    return require("compressed_tensors.quantization").QuantizationArgs(**arguments)
