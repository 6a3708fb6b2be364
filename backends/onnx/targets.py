"""What each ONNX target expresses, as data. Torch-free, for ``rotq backends``.

Every line was tried in the runtime itself (ONNX Runtime 1.31 and OpenVINO 2026.4 on a CPU,
TensorRT-RTX 1.7 parse + build), and the tests of this backend try it again. TensorRT takes float8
from compute capability 8.9 on, float4 from 12.0 on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from backends.rules import Rule, first_reason, is_dynamic, tensor_schemes
from calib.schemes import (
    FLOAT4,
    FLOAT8,
    INT4,
    INT8,
    LinearScheme,
    NumberFormat,
    PerBlock,
    PerCluster,
    PerTensor,
    PerToken,
    TensorScheme,
)


@dataclass(frozen=True)
class Target:
    """A runtime profile of the ONNX backend."""

    compute_dtype: str
    opset: int
    rules: tuple[Rule, ...]
    """What it cannot express; the first that applies is the reason."""
    products: Collection[NumberFormat]
    """Formats that it multiplies as they are, inputs by weights. See :meth:`multiplies`."""
    warnings: tuple[Rule, ...] = ()
    """What it expresses and does not execute well, naming what it executes."""
    caches: Mapping[NumberFormat, str] = field(default_factory=dict)
    """Why it cannot hold keys and values of these formats."""
    shared_buffer: str | None = None
    """Why it cannot keep keys and values in one buffer that the graph writes into; ``None`` if it
    can.
    """
    whole_blocks: bool = True
    """Whether all blocks of a weight must be whole; else the last one may be short."""
    integer_rows: bool = True
    """Whether it looks up rows of an integer table; else the table is dequantized in front of the
    lookup.
    """
    packs: bool = False
    """Whether linears that read one value become one where that is faster
    (:mod:`backends.onnx.packing`). A compiler does so by itself."""
    rotary: bool = False
    """Whether RoPE becomes one operator (:mod:`backends.onnx.rotary`). A compiler fuses what is
    spelled out.
    """
    unsigned_inputs: bool = False
    """Whether int8 inputs with calibrated scales are stored in uint8, 128 above: what its kernels
    multiply, and what it fuses where linears share an input (:mod:`backends.onnx.inputs`)."""
    routed_experts: bool = True
    """Whether it runs an expert on the tokens that chose it; else on all."""

    def refusal(self, scheme: LinearScheme) -> str | None:
        """Why this target cannot express a linear of ``scheme``; ``None`` if it can."""
        return first_reason(self.rules, scheme)

    def warning(self, scheme: LinearScheme) -> str | None:
        """What a linear of ``scheme`` falls back to; ``None`` if it runs in a kernel of its own."""
        return first_reason(self.warnings, scheme)

    def cache_refusal(self, scheme: TensorScheme) -> str | None:
        """Why this target cannot express a KV cache of ``scheme``; ``None`` if it can."""
        return self.caches.get(scheme.format)

    def multiplies(self, scheme: LinearScheme) -> bool:
        """Whether a rounded input and a quantized weight of ``scheme`` become one product in their
        own format.
        """
        return _same_format(scheme, self.products)


def _same_format(scheme: LinearScheme, products: Collection[NumberFormat]) -> bool:
    """A scale can be taken out of a product only where it is the same for all features that are
    summed.
    """
    return (
        scheme.input is not None
        and isinstance(scheme.input.granularity, PerTensor)
        and not isinstance(scheme.weight.granularity, PerBlock)
        and scheme.input.format == scheme.weight.format
        and scheme.weight.format in products
    )


def _rounded_apart(*products: NumberFormat) -> Callable[[LinearScheme], bool]:
    """Inputs with calibrated scales that are rounded, and multiplied as floats."""
    return lambda scheme: (
        scheme.input is not None and not scheme.input.dynamic and not _same_format(scheme, products)
    )


def _formats(*formats: NumberFormat) -> Callable[[LinearScheme], bool]:
    return lambda scheme: any(tensor.format in formats for tensor in tensor_schemes(scheme))


def _scales(*formats: str) -> Callable[[LinearScheme], bool]:
    return lambda scheme: any(tensor.scale_format in formats for tensor in tensor_schemes(scheme))


def _inputs(*granularities: type) -> Callable[[LinearScheme], bool]:
    return lambda scheme: (
        scheme.input is not None and isinstance(scheme.input.granularity, granularities)
    )


def _blocks(taken: Callable[[int], bool]) -> Callable[[LinearScheme], bool]:
    """Weights in blocks of a size that is not ``taken``."""

    def other(scheme: LinearScheme) -> bool:
        granularity = scheme.weight.granularity
        return isinstance(granularity, PerBlock) and not taken(granularity.size)

    return other


def _zero_points(scheme: LinearScheme) -> bool:
    return any(not tensor.symmetric for tensor in tensor_schemes(scheme))


_DYNAMIC = Rule(
    is_dynamic,
    "Q/DQ graphs take calibrated scales of activations, not such as are computed while running",
)
_MICROSCALED = Rule(
    lambda scheme: _formats(FLOAT4)(scheme) or _scales("e4m3", "e8m0", "e8m0-floor")(scheme),
    "it has no operators for float4, nor for scales in E4M3 or powers of two",
)
_NO_INT4_CACHE = "a cache of INT4 cannot be appended to: no runtime concatenates INT4 tensors"

_ORT = Target(
    compute_dtype="float32",
    opset=21,
    rules=(_DYNAMIC, _MICROSCALED),
    products=(INT8,),
    warnings=(
        Rule(
            lambda scheme: scheme.weight.format == FLOAT8,
            "ONNX Runtime's CPU provider has no float8 kernels: it dequantizes these weights on"
            " every run (DequantizeLinear + float MatMul)",
        ),
        Rule(
            _blocks(lambda size: size in (16, 32, 64, 128, 256)),
            "ONNX Runtime's MatMulNBits takes blocks of 16, 32, 64, 128 or 256: it dequantizes"
            " these weights on every run (DequantizeLinear + float MatMul)",
        ),
        Rule(
            _rounded_apart(INT8),
            "ONNX Runtime has no integer kernel for this pair of inputs and weights: it rounds the"
            " inputs (QuantizeLinear + DequantizeLinear), and then multiplies as if they were float"
            " (MatMulNBits)",
        ),
    ),
    caches={
        INT4: _NO_INT4_CACHE,
        FLOAT8: "ONNX Runtime concatenates no float8 tensors, so nothing can be appended",
    },
    whole_blocks=False,
    packs=True,
    rotary=True,
    unsigned_inputs=True,
)

_OPENVINO = Target(
    compute_dtype="float32",
    opset=21,
    rules=(
        _DYNAMIC,
        _MICROSCALED,
        Rule(
            lambda scheme: scheme.input is not None and scheme.input.format == FLOAT8,
            "OpenVINO rounds activations to float8 by way of float16, which gives other numbers in"
            " one of 256 cases",
        ),
        Rule(
            _inputs(PerCluster),
            "OpenVINO's CPU plugin compiles no quantizer with scales along the last axis",
        ),
    ),
    products=(INT8,),
    warnings=(
        Rule(
            _formats(FLOAT8),
            "OpenVINO's CPU plugin has no float8 kernels: it converts these weights on every run"
            " (Convert + float FullyConnected)",
        ),
        Rule(
            _blocks(lambda size: size >= 4),
            "OpenVINO compresses blocks of 4 and more: it converts these weights on every run"
            " (Convert + float FullyConnected)",
        ),
        Rule(
            lambda scheme: (
                scheme.input is not None
                and (_rounded_apart(INT8)(scheme) or not scheme.weight.symmetric)
            ),
            "OpenVINO has no integer kernel for this pair of inputs and weights: it rounds the"
            " inputs (FakeQuantize), and then multiplies as if they were float (FullyConnected with"
            " compressed weights)",
        ),
    ),
    caches={
        INT4: _NO_INT4_CACHE,
        FLOAT8: "OpenVINO rounds to float8 by way of float16, which gives other numbers",
    },
    shared_buffer=(
        "OpenVINO has no TensorScatter, and cuts the cache of a GroupQueryAttention to the tokens"
        " in it"
    ),
)

_TENSORRT = Target(
    compute_dtype="float16",
    opset=21,
    rules=(
        Rule(_inputs(PerToken), "TensorRT computes no scales of tokens while running"),
        Rule(_zero_points, "TensorRT takes no zero point other than 0"),
        Rule(
            lambda scheme: _formats(FLOAT4)(scheme) and _scales("e8m0", "e8m0-floor")(scheme),
            "TensorRT has no operator that quantizes inputs to MXFP4",
        ),
        Rule(_scales("e8m0-floor"), "TensorRT rounds the scales of MXFP8 up"),
        Rule(_blocks(lambda size: size > 1), "TensorRT takes no blocks of one feature"),
    ),
    products=(INT8, FLOAT8),
    warnings=(
        Rule(
            _rounded_apart(INT8, FLOAT8),
            "TensorRT has no kernel for this pair of inputs and weights: it rounds the inputs, and"
            " then multiplies in float16",
        ),
    ),
    caches={INT4: _NO_INT4_CACHE},
    shared_buffer="TensorRT writes only into a buffer whose length is fixed in the graph",
    integer_rows=False,
    routed_experts=False,
)

TARGETS: Mapping[str, Target] = {"ort": _ORT, "openvino": _OPENVINO, "tensorrt": _TENSORRT}
