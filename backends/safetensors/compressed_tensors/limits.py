"""What compressed-tensors checkpoints express, and what each of their readers takes, as data.
Torch-free.

The format is that of compressed-tensors 0.20. What vLLM takes was read from vLLM 0.33
(``model_executor/layers/quantization/compressed_tensors``), which picks a kernel by the scheme of
a linear and refuses what it has none for. transformers runs every scheme of the format by
dequantizing weights and rounding activations in float; what of a model it does not read is in
:mod:`backends.safetensors.compressed_tensors.models`.
"""

from __future__ import annotations

from collections.abc import Callable

from backends.facts import COMPRESSED_TENSORS, TRANSFORMERS, VLLM
from backends.rules import Rule, is_dynamic, tensor_schemes
from calib.schemes import (
    FLOAT4,
    FLOAT8,
    INT4,
    INT8,
    LinearScheme,
    PerBlock,
    PerChannel,
    PerCluster,
    TensorScheme,
)


def _blocks(scheme: TensorScheme) -> int | None:
    return scheme.granularity.size if isinstance(scheme.granularity, PerBlock) else None


def _is_nvfp4(scheme: TensorScheme) -> bool:
    return scheme.format == FLOAT4 and scheme.scale_format == "e4m3" and _blocks(scheme) == 16


def _is_mx(scheme: TensorScheme) -> bool:
    return (
        scheme.format in (FLOAT4, FLOAT8)
        and scheme.scale_format.startswith("e8m0")
        and _blocks(scheme) == 32
    )


def _is_packed(scheme: LinearScheme) -> bool:
    """Integer weights that are packed although the input is quantized."""
    weight = scheme.weight
    integers = scheme.input is not None and weight.format.kind == "integer"
    return integers and (weight.format == INT4 or isinstance(weight.granularity, PerBlock))


def _go_together(weight: TensorScheme, entering: TensorScheme) -> bool:
    """Whether a reader has a kernel, or at least a rule, for weights and inputs of these
    formats.
    """
    if weight.format == INT4 and entering.format == FLOAT8:
        return entering.scale_format == "compute"
    return (weight.format.kind, weight.scale_format[:4]) == (
        entering.format.kind,
        entering.scale_format[:4],
    )


def _is_float8_of_int4(scheme: LinearScheme) -> bool:
    return (
        scheme.input is not None and scheme.weight.format == INT4 and scheme.input.format == FLOAT8
    )


FORMAT: tuple[Rule, ...] = (
    Rule(
        lambda scheme: any(
            isinstance(tensor.granularity, PerCluster) for tensor in tensor_schemes(scheme)
        ),
        "the format has one scale of an activation for the tensor, a token or a block, not for sets"
        " of channels",
        of=(COMPRESSED_TENSORS,),
        how="format",
    ),
    Rule(
        lambda scheme: (
            isinstance(scheme.weight.granularity, PerChannel)
            and scheme.weight.granularity.axis != 0
        ),
        "the format has scales per output channel, not per input channel",
        of=(COMPRESSED_TENSORS,),
        how="format",
    ),
    Rule(
        lambda scheme: any(
            not (_is_nvfp4(tensor) or _is_mx(tensor))
            for tensor in tensor_schemes(scheme)
            if tensor.format == FLOAT4 or tensor.scale_format != "compute"
        ),
        "of formats with blocks of their own it has NVFP4 (blocks of 16), MXFP4 and MXFP8 (blocks"
        " of 32)",
        of=(COMPRESSED_TENSORS,),
        how="format",
    ),
    Rule(
        lambda scheme: scheme.input is not None and not _go_together(scheme.weight, scheme.input),
        "it packs weights and inputs of one kind (both integers, both float8, or both of one block"
        " format), or INT4 weights with float8 inputs",
        of=(COMPRESSED_TENSORS,),
        how="format",
    ),
)
"""What the format itself cannot express."""


def _vllm(when: Callable[[LinearScheme], bool], reason: str) -> Rule:
    return Rule(when, reason, of=(VLLM,), how="read")


VLLM_REFUSALS: tuple[Rule, ...] = (
    _vllm(
        lambda scheme: (
            _is_float8_of_int4(scheme)
            and not (
                is_dynamic(scheme) and scheme.weight.symmetric and _blocks(scheme.weight) == 128
            )
        ),
        "vLLM 0.33 takes float8 inputs of INT4 weights with scales per token computed while running"
        " (activations.granularity 'token' in the recipe) and symmetric blocks of 128 alone",
    ),
    _vllm(
        lambda scheme: _is_packed(scheme) and not is_dynamic(scheme),
        "vLLM 0.33 has no kernel of INT4 or blocked weights with calibrated scales of the input"
        " (with activations.granularity 'token' in the recipe it takes them)",
    ),
    _vllm(
        lambda scheme: (
            _is_packed(scheme) and scheme.input is not None and not scheme.input.symmetric
        ),
        "vLLM 0.33 has no kernel of INT4 or blocked weights with zero points of the input",
    ),
    _vllm(
        lambda scheme: (
            scheme.input is not None
            and scheme.weight.format == INT8
            and not _is_packed(scheme)
            and not scheme.weight.symmetric
        ),
        "vLLM 0.33 has no kernel of INT8 weights with zero points and INT8 inputs",
    ),
    _vllm(
        lambda scheme: (
            scheme.input is None
            and scheme.weight.format.kind == "integer"
            and not isinstance(scheme.weight.granularity, PerBlock | PerChannel)
        ),
        "vLLM 0.33 takes integer weights per channel or in blocks, and refuses one scale",
    ),
    _vllm(
        lambda scheme: (
            scheme.weight.format == FLOAT8
            and scheme.weight.scale_format == "compute"
            and isinstance(scheme.weight.granularity, PerBlock)
        ),
        "vLLM 0.33 takes blocks of FP8 weights as squares of 128 × 128 only, and refuses rows",
    ),
)
"""What the format has and vLLM has no kernel for."""

VLLM_WARNINGS: tuple[Rule, ...] = (
    _vllm(
        _is_float8_of_int4, "vLLM 0.33 takes float8 inputs of INT4 weights on SM90 (Hopper) alone"
    ),
    _vllm(
        lambda scheme: (
            scheme.input is not None and scheme.input.format == FLOAT4 and _is_mx(scheme.input)
        ),
        "vLLM 0.33 quantizes MXFP4 inputs on Blackwell, and leaves them in float elsewhere",
    ),
)
"""What vLLM computes otherwise than the file says."""

_SHOWN = "backends/safetensors/compressed_tensors/test_compressed_transformers.py::"

TRANSFORMERS_WARNINGS: tuple[Rule, ...] = (
    Rule(
        lambda scheme: (
            is_dynamic(scheme)
            and scheme.input is not None
            and scheme.input.format.kind == "integer"
            and scheme.input.symmetric
        ),
        "for scales computed while running transformers divides by half the number of levels (127.5"
        " for INT8), where vLLM and rotq divide by the largest integer (127): activations are"
        " rounded a little finer",
        of=(TRANSFORMERS,),
        shown=f"{_SHOWN}test_scales_while_running_differ_by_the_divisor_alone",
    ),
    Rule(
        lambda scheme: (
            scheme.input is not None and scheme.input.format == FLOAT4 and _is_mx(scheme.input)
        ),
        "of MXFP4 inputs transformers clips the largest value of some blocks by up to a seventh",
        of=(TRANSFORMERS,),
        shown=f"{_SHOWN}test_mxfp4_inputs_differ_by_the_rule_of_their_scales_alone",
    ),
)
"""What transformers computes otherwise than the file says."""

ONLINE_BLOCK = 128
"""Largest order of the Hadamard matrices on the diagonal of an R4 for vLLM: what its fast kernels
take."""


def cache_refusal(scheme: TensorScheme) -> str | None:
    """Why the format cannot express a KV cache of ``scheme``; ``None`` if it can."""
    if scheme.format not in (INT8, INT4, FLOAT8):
        return (
            f"a cache of {scheme.format.name} has no place in the format: it takes int8, int4 and"
            " float8"
        )
    if not scheme.symmetric:
        return "no reader of the format takes a cache with zero points"
    return None


def vllm_cache_refusal(scheme: TensorScheme) -> str | None:
    """Why vLLM cannot be given a KV cache of ``scheme``; ``None`` if it can."""
    if scheme.format in (INT8, INT4):
        return f"vLLM 0.33 takes float8 caches of this format, not {scheme.format.name} ones"
    return cache_refusal(scheme)


def vllm_rotation_refusal(kind: str) -> str | None:
    """Why vLLM does not apply rotations of ``kind``; ``None`` if it does, or need not."""
    if kind == "r3":
        return "vLLM 0.33 applies transforms to linears, none to queries and keys"
    return None


def transformers_rotation_refusal(kind: str) -> str | None:
    """Why transformers does not apply rotations of ``kind``; ``None`` if it need not."""
    if kind in ("r3", "r4"):
        return "transformers passes over transform_config, and so over rotations while running"
    return None


def vllm_rotation_warning(kind: str) -> str | None:
    """What vLLM makes of rotations of ``kind`` that it applies; ``None``: nothing to be told."""
    if kind == "r4":
        return "vLLM 0.33 refuses tensor parallelism where there is a rotation while running"
    return None
