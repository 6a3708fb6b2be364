"""What Tripy's modules express, as data. Torch-free, for ``rotq backends``.

``tp.Linear`` of nvtripy 0.1.7 takes one format for weight and input, per tensor or per channel, and
blocks along axis 0 alone, which are its outputs.
:class:`backends.safetensors.tripy.modules.linear.BlockLinear` is what blocks of input features
need.
"""

from __future__ import annotations

from backends.rules import Rule, is_dynamic, tensor_schemes
from calib.schemes import (
    FLOAT4,
    FLOAT8,
    INT4,
    INT8,
    LinearScheme,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerTensor,
    TensorScheme,
)

_GRANULARITY: dict[NumberFormat, type] = {INT8: PerChannel, INT4: PerBlock, FLOAT8: PerTensor}
"""How the weights of a format are grouped."""


def _input_of_another_format(scheme: LinearScheme) -> bool:
    expected = INT8 if scheme.weight.format == INT4 else scheme.weight.format
    return scheme.input is not None and scheme.input.format != expected


RULES: tuple[Rule, ...] = (
    Rule(
        lambda scheme: any(
            tensor.format == FLOAT4 or tensor.scale_format != "compute"
            for tensor in tensor_schemes(scheme)
        ),
        "Tripy has int8, int4 and float8, and no scales of a format of their own",
    ),
    Rule(
        is_dynamic, "Tripy quantizes with constant scales, not with scales computed while running"
    ),
    Rule(
        lambda scheme: any(not tensor.symmetric for tensor in tensor_schemes(scheme)),
        "Tripy has no zero points",
    ),
    Rule(
        lambda scheme: (
            scheme.input is not None and not isinstance(scheme.input.granularity, PerTensor)
        ),
        "a Tripy linear has one scale for its input",
    ),
    Rule(
        lambda scheme: (
            not isinstance(scheme.weight.granularity, _GRANULARITY[scheme.weight.format])
        ),
        "Tripy has int8 weights per output channel, int4 weights in blocks and float8 weights per"
        " tensor",
    ),
    Rule(
        lambda scheme: (
            isinstance(scheme.weight.granularity, PerChannel)
            and scheme.weight.granularity.axis != 0
        ),
        "Tripy's scales of int8 weights are per output channel",
    ),
    Rule(
        _input_of_another_format,
        "Tripy takes int8 inputs of int8 and int4 weights, and float8 inputs of float8 weights",
    ),
)
"""What it cannot express; the first that applies is the reason."""


def cache_refusal(scheme: TensorScheme) -> str | None:
    """Why there is no KV cache of ``scheme``."""
    return "the Tripy modules run whole sequences and keep no KV cache"


WARNINGS: tuple[Rule, ...] = ()
"""It runs what it expresses."""
