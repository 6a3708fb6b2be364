"""The quantization schemes, as data: number formats, granularities, and what a preset name means.

A *format* says which values a stored number can take, a *granularity* says which elements share one scale, and a
:class:`Scheme` puts both together for weights and activations. Backends read these tables and refuse what their target
cannot express; nothing here knows a runtime, a library or a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from calib.errors import QuantizationError


@dataclass(frozen=True)
class NumberFormat:
    """A storage format of quantized values.

    Integers clamp to ``qmin … qmax`` while scales are ``amax / maxbound`` with the symmetric ``maxbound`` (127 for
    int8): ModelOpt's convention, under which -128 is reachable only by rounding past the largest negative value.
    """

    name: str
    bits: int
    qmin: float
    qmax: float
    maxbound: float
    """Largest magnitude that amax is mapped to; the divisor in ``scale = amax / maxbound``."""
    kind: Literal["integer", "float"]


INT8 = NumberFormat("int8", 8, -128, 127, 127, "integer")
INT4 = NumberFormat("int4", 4, -8, 7, 7, "integer")
FLOAT8 = NumberFormat("float8_e4m3", 8, -448, 448, 448, "float")
FORMATS = {fmt.name: fmt for fmt in (INT8, INT4, FLOAT8)}


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor. Scale shape ``[]``."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index of ``axis``. Weight ``[out, in]`` with axis 0: scale shape ``[out]``."""

    axis: int = 0


@dataclass(frozen=True)
class PerBlock:
    """One scale for ``size`` consecutive input features. Weight ``[out, in]``: scale ``[out, ceil(in / size)]``."""

    size: int


Granularity = PerTensor | PerChannel | PerBlock


@dataclass(frozen=True)
class TensorScheme:
    """How one kind of tensor is quantized: symmetric, with static scales."""

    format: NumberFormat
    granularity: Granularity


@dataclass(frozen=True)
class Scheme:
    """A named combination for the linears of the decoder; embeddings and lm_head stay in float."""

    name: str
    description: str
    weight: TensorScheme
    activation: TensorScheme | None
    """``None``: activations stay in float (weight-only)."""
    max_perplexity_ratio: float
    """Rung 3 of the parity check: quantized over float perplexity may be at most this."""

    @property
    def weight_only(self) -> bool:
        """Whether activations stay in float, so that calibration needs no data."""
        return self.activation is None


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "int8",
            "static INT8 W8A8: weights per output channel, activations per tensor",
            TensorScheme(INT8, PerChannel(0)),
            TensorScheme(INT8, PerTensor()),
            max_perplexity_ratio=1.02,
        ),
        Scheme(
            "int8-weight-only",
            "INT8 weights per output channel, float activations",
            TensorScheme(INT8, PerChannel(0)),
            None,
            max_perplexity_ratio=1.01,
        ),
        Scheme(
            "int4-weight-only",
            "INT4 weights in blocks of 128 input features, float activations",
            TensorScheme(INT4, PerBlock(128)),
            None,
            max_perplexity_ratio=1.10,
        ),
        Scheme(
            "float8",
            "static FP8 E4M3: weights and activations per tensor",
            TensorScheme(FLOAT8, PerTensor()),
            TensorScheme(FLOAT8, PerTensor()),
            max_perplexity_ratio=1.02,
        ),
    )
}


def scheme_named(name: str) -> Scheme:
    """Look up a preset.

    Raises:
        QuantizationError: no scheme has this name; the hint lists all that exist.
    """
    if name not in SCHEMES:
        raise QuantizationError(f"unknown scheme '{name}'", hint=f"the schemes are: {', '.join(SCHEMES)}")
    return SCHEMES[name]
