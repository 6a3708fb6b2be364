"""What compressed-tensors checkpoints express, and which of vLLM and transformers takes it, as
data. Torch-free.

The format is that of compressed-tensors 0.20. What vLLM takes was read from vLLM 0.33
(``model_executor/layers/ quantization/compressed_tensors``), which picks a kernel by the scheme of
a linear and refuses what it has none for. transformers runs every scheme of the format by
dequantizing weights and rounding activations in float.
"""

from __future__ import annotations

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


RULES: tuple[Rule, ...] = (
    Rule(
        lambda scheme: any(
            isinstance(tensor.granularity, PerCluster) for tensor in tensor_schemes(scheme)
        ),
        "the format has one scale of an activation for the tensor, a token or a block, not for sets"
        " of channels",
    ),
    Rule(
        lambda scheme: (
            isinstance(scheme.weight.granularity, PerChannel)
            and scheme.weight.granularity.axis != 0
        ),
        "the format has scales per output channel, not per input channel",
    ),
    Rule(
        lambda scheme: any(
            not (_is_nvfp4(tensor) or _is_mx(tensor))
            for tensor in tensor_schemes(scheme)
            if tensor.format == FLOAT4 or tensor.scale_format != "compute"
        ),
        "of formats with blocks of their own it has NVFP4 (blocks of 16), MXFP4 and MXFP8 (blocks"
        " of 32)",
    ),
    Rule(
        lambda scheme: scheme.input is not None and not _go_together(scheme.weight, scheme.input),
        "it packs weights and inputs of one kind (both integers, both float8, or both of one block"
        " format), or INT4 weights with float8 inputs",
    ),
)
"""What the format itself cannot express."""

WARNINGS: tuple[Rule, ...] = (
    Rule(
        lambda scheme: (
            scheme.input is not None
            and scheme.weight.format == INT4
            and scheme.input.format == FLOAT8
        ),
        "vLLM 0.33 takes float8 inputs of INT4 weights on SM90 (Hopper) alone, with scales per"
        " token computed while running (activations.granularity 'token' in the recipe) and"
        " symmetric blocks of 128; transformers runs them",
    ),
    Rule(
        lambda scheme: _is_packed(scheme) and not is_dynamic(scheme),
        "vLLM 0.33 has no kernel of INT4 or blocked weights with calibrated scales of the input and"
        " refuses them (with activations.granularity 'token' in the recipe it takes them);"
        " transformers runs them",
    ),
    Rule(
        lambda scheme: (
            _is_packed(scheme) and scheme.input is not None and not scheme.input.symmetric
        ),
        "vLLM 0.33 has no kernel of INT4 or blocked weights with zero points of the input and"
        " refuses them; transformers runs them",
    ),
    Rule(
        lambda scheme: (
            scheme.input is not None
            and scheme.weight.format == INT8
            and not _is_packed(scheme)
            and not scheme.weight.symmetric
        ),
        "vLLM 0.33 has no kernel of INT8 weights with zero points and INT8 inputs and refuses it;"
        " transformers runs it",
    ),
    Rule(
        lambda scheme: (
            scheme.input is None
            and scheme.weight.format.kind == "integer"
            and not isinstance(scheme.weight.granularity, PerBlock | PerChannel)
        ),
        "vLLM 0.33 takes integer weights per channel or in blocks and refuses one scale;"
        " transformers runs it",
    ),
    Rule(
        lambda scheme: (
            scheme.weight.format == FLOAT8
            and scheme.weight.scale_format == "compute"
            and isinstance(scheme.weight.granularity, PerBlock)
        ),
        "vLLM 0.33 takes blocks of FP8 weights as squares of 128 × 128 only and refuses rows;"
        " transformers runs it",
    ),
    Rule(
        lambda scheme: (
            is_dynamic(scheme)
            and scheme.input is not None
            and scheme.input.format.kind == "integer"
        ),
        "for scales computed while running transformers divides by half the number of levels (127.5"
        " for INT8), where vLLM and rotq divide by the largest integer (127): in transformers"
        " activations are rounded a little finer",
    ),
    Rule(
        lambda scheme: (
            scheme.input is not None and scheme.input.format == FLOAT4 and _is_mx(scheme.input)
        ),
        "inputs are quantized by the consumer's own rule: vLLM 0.33 does so on Blackwell and leaves"
        " them in float elsewhere; transformers clips the largest value of some blocks by up to a"
        " seventh",
    ),
)
"""What only one of the two consumers takes, or computes another way."""


def cache_refusal(scheme: TensorScheme) -> str | None:
    """Why the format cannot express a KV cache of ``scheme``; ``None`` if it can. vLLM 0.33 takes
    float8 alone.
    """
    if scheme.format not in (INT8, INT4, FLOAT8):
        return (
            f"a cache of {scheme.format.name} has no place in the format: it takes int8, int4 and"
            " float8"
        )
    if not scheme.symmetric:
        return "no reader of the format takes a cache with zero points"
    return None
