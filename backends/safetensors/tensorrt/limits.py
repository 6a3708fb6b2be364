"""What TensorRT's Q/DQ layers express, as data. Torch-free, for ``rotq backends``.

Each form was built with TensorRT-RTX 1.7.1 through its network API, for SM86, SM89 and SM120: int8
and int4 everywhere, float8 and MXFP8 from SM89 on, NVFP4 for SM120.
"""

from __future__ import annotations

from backends.rules import Rule, tensor_schemes
from calib.schemes import (
    FLOAT4,
    FLOAT8,
    INT4,
    INT8,
    LinearScheme,
    PerBlock,
    PerChannel,
    PerTensor,
    TensorScheme,
)

_BLOCK_FORMATS = {(FLOAT4, "e4m3", 16), (FLOAT8, "e8m0", 32), (FLOAT8, "e8m0-floor", 32)}
"""Format, scale format and block size of NVFP4 and MXFP8."""


def _is_block_format(scheme: TensorScheme) -> bool:
    size = scheme.granularity.size if isinstance(scheme.granularity, PerBlock) else None
    return (scheme.format, scheme.scale_format, size) in _BLOCK_FORMATS


def _mixes_formats(scheme: LinearScheme) -> bool:
    if scheme.input is None:
        return False
    if _is_block_format(scheme.weight) or _is_block_format(scheme.input):
        return scheme.weight.format != scheme.input.format or not _is_block_format(scheme.input)
    return scheme.input.format != (INT8 if scheme.weight.format == INT4 else scheme.weight.format)


RULES: tuple[Rule, ...] = (
    Rule(
        lambda scheme: any(
            not _is_block_format(tensor)
            for tensor in tensor_schemes(scheme)
            if tensor.format == FLOAT4 or tensor.scale_format != "compute"
        ),
        "of formats with scales of their own TensorRT has NVFP4 (blocks of 16) and MXFP8 (blocks"
        " of 32)",
    ),
    Rule(
        lambda scheme: (
            scheme.input is not None and scheme.input.dynamic and not _is_block_format(scheme.input)
        ),
        "TensorRT computes scales while running for NVFP4 and MXFP8 inputs only",
    ),
    Rule(
        lambda scheme: any(not tensor.symmetric for tensor in tensor_schemes(scheme)),
        "TensorRT's quantization is symmetric: its Q/DQ layers refuse zero points",
    ),
    Rule(
        lambda scheme: (
            scheme.input is not None
            and not scheme.input.dynamic
            and not isinstance(scheme.input.granularity, PerTensor)
        ),
        "TensorRT has one calibrated scale for an activation",
    ),
    Rule(
        lambda scheme: (
            isinstance(scheme.weight.granularity, PerChannel)
            and scheme.weight.granularity.axis != 0
        ),
        "its integer kernels have scales per output channel",
    ),
    Rule(
        lambda scheme: (
            scheme.weight.format == INT4 and not isinstance(scheme.weight.granularity, PerBlock)
        ),
        "TensorRT's INT4 kernels take scales in blocks",
    ),
    Rule(
        lambda scheme: (
            scheme.weight.format in (INT8, FLOAT8)
            and isinstance(scheme.weight.granularity, PerBlock)
            and scheme.weight.scale_format == "compute"
        ),
        "TensorRT dequantizes blocked INT8 and FP8 weights while building instead of keeping them",
    ),
    Rule(
        _mixes_formats,
        "TensorRT takes INT8 inputs of INT8 and INT4 weights, and else inputs in the format of the"
        " weights",
    ),
)
"""What it cannot express; the first that applies is the reason."""

WARNINGS: tuple[Rule, ...] = (
    Rule(
        lambda scheme: scheme.weight.format == FLOAT4,
        "NVFP4 engines build for SM120 (Blackwell) and later only",
    ),
    Rule(
        lambda scheme: scheme.weight.format == FLOAT8,
        "FP8 engines build for SM89 (Ada) and later only",
    ),
)

_CACHE_FORMATS = (INT8, FLOAT8)


def cache_refusal(scheme: TensorScheme) -> str | None:
    """Why it cannot express a KV cache of ``scheme``; ``None`` if it can."""
    if scheme.format not in _CACHE_FORMATS:
        return f"a {scheme.format.name} cache has no kernel: TensorRT reads INT8 and FP8 caches"
    return None
