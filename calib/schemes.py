"""The quantization schemes, as data: number formats, granularities, and what a preset name means.

A *format* says which values a stored number can take, a *granularity* says which elements share one
scale, and a :class:`Scheme` puts both together for weights and activations. Backends read these
tables and refuse what their target cannot express; nothing here knows a runtime, a library or a
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from calib.errors import QuantizationError, did_you_mean


@dataclass(frozen=True)
class NumberFormat:
    """A storage format of quantized values.

    Integers clamp to ``qmin … qmax`` while scales are ``amax / maxbound`` with the symmetric
    ``maxbound`` (127 for int8): ModelOpt's convention, under which -128 is reachable only by
    rounding past the largest negative value.
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
FLOAT4 = NumberFormat("float4_e2m1", 4, -6, 6, 6, "float")
FORMATS = {fmt.name: fmt for fmt in (INT8, INT4, FLOAT8, FLOAT4)}


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor. Scale shape ``[]``."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index of ``axis``. Weight ``[out, in]`` with axis 0: scale shape
    ``[out]``.
    """

    axis: int = 0


@dataclass(frozen=True)
class PerBlock:
    """One scale for ``size`` consecutive input features. Weight ``[out, in]``: scale ``[out,
    ceil(in / size)]``.
    """

    size: int


@dataclass(frozen=True)
class PerToken:
    """One scale for each row of an activation ``[tokens, in]``, computed while running."""


@dataclass(frozen=True)
class PerCluster:
    """One static scale for each of ``clusters`` sets of input channels; see
    :mod:`calib.stats.clusters`. Scale ``[in]``.
    """

    clusters: int


Granularity = PerTensor | PerChannel | PerBlock | PerToken | PerCluster

ScaleFormat = Literal["compute", "e4m3", "e8m0", "e8m0-floor"]
"""What the scales of a tensor are stored as.

* ``compute``: the dtype the target computes in.
* ``e4m3``: FP8, relative to one second-level scale for the tensor in float32 (NVFP4).
* ``e8m0``: a power of two, rounded up so that nothing is clipped (ModelOpt's rule for MX formats).
* ``e8m0-floor``: a power of two by the rule of the OCP MX specification 1.0, which clips the top of
  some blocks.
"""


@dataclass(frozen=True)
class TensorScheme:
    """How one kind of tensor is quantized."""

    format: NumberFormat
    granularity: Granularity
    symmetric: bool = True
    """Without (``True``) or with a zero point; integer formats only."""
    dynamic: bool = False
    """Activations: the scales are computed from the values while running."""
    scale_format: ScaleFormat = "compute"

    def __post_init__(self) -> None:
        if not self.symmetric and self.format.kind != "integer":
            raise QuantizationError(
                f"{self.format.name} has no zero point",
                hint="asymmetric quantization needs an integer format",
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether something of it has to be observed: a static scale, or the second level of a
        dynamic one.
        """
        return not self.dynamic or self.scale_format == "e4m3"

    @property
    def static_integer(self) -> bool:
        """Whether it is rounded in equal steps whose size is fixed beforehand."""
        return self.needs_calibration and self.format.kind == "integer"


@dataclass(frozen=True)
class LinearScheme:
    """How one linear is quantized."""

    weight: TensorScheme
    input: TensorScheme | None
    """``None``: the input stays in float."""


@dataclass(frozen=True)
class Scheme:
    """A named combination for the linears of the decoder; embeddings and lm_head stay in float."""

    name: str
    description: str
    weight: TensorScheme | None
    """``None``: nothing is quantized (``float``)."""
    activation: TensorScheme | None
    """``None``: activations stay in float (weight-only)."""
    max_perplexity_ratio: float
    """Rung 3 of the parity check: quantized over float perplexity may be at most this."""

    @property
    def weight_only(self) -> bool:
        """Whether activations stay in float, so that calibration needs no data."""
        return self.activation is None

    @property
    def linear(self) -> LinearScheme | None:
        """What it means for one linear; ``None``: it stays as it is."""
        return None if self.weight is None else LinearScheme(self.weight, self.activation)


_INT8_WEIGHT = TensorScheme(INT8, PerChannel(0))
_INT4_BLOCKS = TensorScheme(INT4, PerBlock(128))
_INT8_STATIC = TensorScheme(INT8, PerTensor())
_NVFP4 = TensorScheme(FLOAT4, PerBlock(16), scale_format="e4m3")
_MXFP4 = TensorScheme(FLOAT4, PerBlock(32), scale_format="e8m0")
_MXFP8 = TensorScheme(FLOAT8, PerBlock(32), scale_format="e8m0")


def _per_token(fmt: NumberFormat) -> TensorScheme:
    return TensorScheme(fmt, PerToken(), dynamic=True)


FLOAT = "float"
"""The scheme that quantizes nothing; as an override it leaves single linears as they are."""

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            FLOAT,
            "nothing quantized: the rotated model in the dtype that the target computes in",
            None,
            None,
            max_perplexity_ratio=1.001,
        ),
        Scheme(
            "int8",
            "static INT8 W8A8: weights per output channel, activations per tensor",
            _INT8_WEIGHT,
            _INT8_STATIC,
            max_perplexity_ratio=1.02,
        ),
        Scheme(
            "int8-dynamic",
            "INT8 W8A8: weights per output channel, activations per token while running",
            _INT8_WEIGHT,
            _per_token(INT8),
            max_perplexity_ratio=1.02,
        ),
        Scheme(
            "int8-weight-only",
            "INT8 weights per output channel, float activations",
            _INT8_WEIGHT,
            None,
            max_perplexity_ratio=1.01,
        ),
        Scheme(
            "int4-weight-only",
            "INT4 weights in blocks of 128 input features, float activations",
            _INT4_BLOCKS,
            None,
            max_perplexity_ratio=1.10,
        ),
        Scheme(
            "w4a8",
            "INT4 weights in blocks of 128 input features, static INT8 activations per tensor",
            _INT4_BLOCKS,
            _INT8_STATIC,
            max_perplexity_ratio=1.12,
        ),
        Scheme(
            "w4a8-float8",
            "INT4 weights in blocks of 128 input features, static FP8 E4M3 activations per tensor",
            _INT4_BLOCKS,
            TensorScheme(FLOAT8, PerTensor()),
            max_perplexity_ratio=1.12,
        ),
        Scheme(
            "w4a4",
            "INT4 weights per output channel, INT4 activations per token while running",
            TensorScheme(INT4, PerChannel(0)),
            _per_token(INT4),
            max_perplexity_ratio=1.35,
        ),
        Scheme(
            "float8",
            "static FP8 E4M3: weights and activations per tensor",
            TensorScheme(FLOAT8, PerTensor()),
            TensorScheme(FLOAT8, PerTensor()),
            max_perplexity_ratio=1.02,
        ),
        Scheme(
            "float8-dynamic",
            "FP8 E4M3: weights per output channel, activations per token while running",
            TensorScheme(FLOAT8, PerChannel(0)),
            _per_token(FLOAT8),
            max_perplexity_ratio=1.02,
        ),
        Scheme(
            "nvfp4",
            "NVFP4: E2M1 in blocks of 16 with E4M3 scales, weights and activations",
            _NVFP4,
            replace(_NVFP4, dynamic=True),
            max_perplexity_ratio=1.15,
        ),
        Scheme(
            "mxfp4",
            "MXFP4: E2M1 in blocks of 32 with power-of-two scales, weights and activations",
            _MXFP4,
            replace(_MXFP4, dynamic=True),
            max_perplexity_ratio=1.35,
        ),
        Scheme(
            "mxfp8",
            "MXFP8: E4M3 in blocks of 32 with power-of-two scales, weights and activations",
            _MXFP8,
            replace(_MXFP8, dynamic=True),
            max_perplexity_ratio=1.02,
        ),
    )
}

LINEAR_SCHEMES = {
    name: linear for name, scheme in SCHEMES.items() if (linear := scheme.linear) is not None
}
"""What each preset makes of a linear; ``float`` makes nothing of it and is not among them."""

KV_SCHEMES = {
    "int8": TensorScheme(INT8, PerTensor()),
    "int4": TensorScheme(INT4, PerTensor()),
    "float8": TensorScheme(FLOAT8, PerTensor()),
}
"""How ``--kv`` quantizes cached keys (after RoPE and R3) and values: one static scale each for a
layer.
"""


def scheme_named(name: str) -> Scheme:
    """Look up a preset.

    Raises:
        QuantizationError: no scheme has this name; the hint lists all that exist.
    """
    if name not in SCHEMES:
        raise QuantizationError(
            f"unknown scheme '{name}'",
            hint=f"{did_you_mean(name, SCHEMES)}the schemes are: {', '.join(SCHEMES)}",
        )
    return SCHEMES[name]


def linear_words(scheme: LinearScheme) -> str:
    """``scheme`` in a few words, for tables: ``int4 weights in blocks of 128, int8 inputs per
    tensor``.
    """
    weights = f"{_words(scheme.weight)}".replace(" ", " weights ", 1)
    if scheme.input is None:
        return f"{weights}, float inputs"
    return f"{weights}, {_words(scheme.input).replace(' ', ' inputs ', 1)}"


def _words(scheme: TensorScheme) -> str:
    match scheme.granularity:
        case PerBlock(size):
            grouping = f"in blocks of {size}"
        case PerCluster(clusters):
            grouping = f"in {clusters} clusters"
        case PerChannel():
            grouping = "per channel"
        case PerToken():
            grouping = "per token"
        case _:
            grouping = "per tensor"
    return f"{scheme.format.name} {grouping}{'' if scheme.symmetric else ' with zero points'}"


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """``scheme`` as JSON values that :func:`scheme_from_dict` reads back."""
    tensors = {"weight": scheme.weight, "activation": scheme.activation}
    return {
        **vars(scheme),
        **{name: part and tensor_scheme_to_dict(part) for name, part in tensors.items()},
    }


def scheme_from_dict(values: Mapping[str, Any]) -> Scheme:
    """The scheme that :func:`scheme_to_dict` wrote.

    Raises:
        KeyError, TypeError: as :func:`tensor_scheme_from_dict`.
    """
    tensors = {name: values[name] for name in ("weight", "activation")}
    return Scheme(
        **{
            **values,
            **{name: part and tensor_scheme_from_dict(part) for name, part in tensors.items()},
        }
    )


_GRANULARITIES: dict[str, type[Any]] = {
    "tensor": PerTensor,
    "channel": PerChannel,
    "block": PerBlock,
    "token": PerToken,
    "cluster": PerCluster,
}


def tensor_scheme_to_dict(scheme: TensorScheme) -> dict[str, Any]:
    """``scheme`` as JSON values that :func:`tensor_scheme_from_dict` reads back."""
    kind = next(
        name
        for name, granularity in _GRANULARITIES.items()
        if isinstance(scheme.granularity, granularity)
    )
    return {
        "format": scheme.format.name,
        "granularity": kind,
        **vars(scheme.granularity),
        "symmetric": scheme.symmetric,
        "dynamic": scheme.dynamic,
        "scale_format": scheme.scale_format,
    }


def tensor_scheme_from_dict(values: Mapping[str, Any]) -> TensorScheme:
    """The scheme that :func:`tensor_scheme_to_dict` wrote.

    Raises:
        KeyError: a format or granularity that this version does not know, or a missing value.
        TypeError: a value that the granularity does not take.
    """
    rest = dict(values)
    fmt, kind = FORMATS[rest.pop("format")], _GRANULARITIES[rest.pop("granularity")]
    flags = {key: rest.pop(key) for key in ("symmetric", "dynamic", "scale_format")}
    return TensorScheme(fmt, kind(**rest), **flags)
