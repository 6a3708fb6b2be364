"""What ModelOpt's unified layout expresses, as data. Torch-free, for ``rotq backends``."""

from __future__ import annotations

from backends.rules import Rule, tensor_schemes
from backends.safetensors.modelopt.algorithms import algorithm_of
from calib.schemes import (
    FLOAT4,
    FLOAT8,
    INT4,
    INT8,
    LinearScheme,
    PerBlock,
    PerCluster,
    PerToken,
    TensorScheme,
)


def _has_format(scheme: LinearScheme) -> bool:
    return algorithm_of(scheme) is not None


def _readers(scheme: LinearScheme) -> tuple[str, ...]:
    algorithm = algorithm_of(scheme)
    return () if algorithm is None else algorithm.readers


RULES: tuple[Rule, ...] = (
    Rule(
        lambda scheme: any(not tensor.symmetric for tensor in tensor_schemes(scheme)),
        "ModelOpt's formats are symmetric: they have no zero points",
    ),
    Rule(
        lambda scheme: (
            scheme.input is not None and isinstance(scheme.input.granularity, PerCluster)
        ),
        "the format has one calibrated scale of an input, not one for each of several sets of"
        " channels",
    ),
    Rule(
        lambda scheme: (
            scheme.input is not None
            and isinstance(scheme.input.granularity, PerToken)
            and scheme.input.format.kind == "integer"
        ),
        "the format has scales per token for FP8 inputs only; its INT8 inputs are calibrated"
        " (scheme int8)",
    ),
    Rule(
        lambda scheme: (
            scheme.weight.format == FLOAT4 and scheme.weight.scale_format.startswith("e8m0")
        ),
        "ModelOpt 0.47 writes MXFP4 under a name ('mxfp4') that no reader knows",
    ),
    Rule(
        lambda scheme: any(
            tensor.scale_format == "e8m0-floor" for tensor in tensor_schemes(scheme)
        ),
        "MXFP8 as ModelOpt has it rounds scales up (e8m0), never down (e8m0-floor)",
    ),
    Rule(
        lambda scheme: (
            scheme.weight.format == INT4 and not isinstance(scheme.weight.granularity, PerBlock)
        ),
        "the format has INT4 weights in blocks of input features only",
    ),
    Rule(
        lambda scheme: scheme.weight.format == INT4 and not _has_format(scheme),
        "INT4 weights go with float inputs (W4A16_AWQ) or with FP8 inputs of one calibrated scale"
        " (W4A8_AWQ)",
    ),
    Rule(
        lambda scheme: scheme.weight.format == INT8 and not _has_format(scheme),
        "INT8 weights have a scale per output channel, and float inputs or INT8 inputs of one"
        " calibrated scale",
    ),
    Rule(
        lambda scheme: scheme.weight.format == FLOAT8 and not _has_format(scheme),
        "FP8 is one scale each (FP8), per channel and token (FP8_PER_CHANNEL_PER_TOKEN), or MXFP8;"
        " inputs included",
    ),
    Rule(
        lambda scheme: not _has_format(scheme),
        "FP4 is NVFP4 in blocks of 16, with inputs of the same kind or float ones",
    ),
)
"""What it cannot express; the first that applies is the reason."""

WARNINGS: tuple[Rule, ...] = (
    Rule(
        lambda scheme: not _readers(scheme),
        "neither vLLM 0.33 nor TensorRT-LLM's PyTorch backend loads this format of ModelOpt; what"
        " vLLM loads is --target vllm",
    ),
    Rule(
        lambda scheme: _readers(scheme) == ("TensorRT-LLM",),
        "TensorRT-LLM loads this format of ModelOpt, vLLM 0.33 does not: for vLLM use --target"
        " vllm",
    ),
    Rule(
        lambda scheme: _readers(scheme) == ("vLLM",),
        "vLLM 0.33 loads this format of ModelOpt, TensorRT-LLM was not seen to",
    ),
)
"""What not every reader of the format loads."""

_ROTATIONS = {"r3": "queries and keys", "r4": "the input of the down projections"}


def cache_refusal(scheme: TensorScheme) -> str | None:
    """Why it cannot express a KV cache of ``scheme``; ``None`` if it can. Per tensor, as all of
    rotq's are.
    """
    if scheme.format != FLOAT8:
        return f"ModelOpt's export has FP8 caches, not {scheme.format.name} ones"
    return None


def rotation_refusal(kind: str) -> str | None:
    """Why it cannot express an online rotation ``kind`` (``r3``, ``r4``); ``None`` for those that
    are folded in.
    """
    if kind not in _ROTATIONS:
        return None
    return f"the format has no place for a rotation of {_ROTATIONS[kind]} while running"
