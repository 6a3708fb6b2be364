"""What each ONNX target expresses, as data. Torch-free, for ``rotq backends``.

What a target cannot express was tried in the runtime itself, in the versions that
:mod:`backends.facts` names, and the tests of this backend try it again. What it falls back to is
asked of the runtime that is installed (:mod:`backends.onnx.asking`); where there is none,
:attr:`Target.warnings` say what the last version seen does. TensorRT takes float8 from compute
capability 8.9 on, float4 from 12.0 on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from backends.facts import OPENVINO, ORT, TENSORRT_RTX, How, Runtime
from backends.onnx.asking import Answer, Asked
from backends.onnx.target import Target, same_format
from backends.rules import Rule, is_dynamic, tensor_schemes
from calib.schemes import (
    FLOAT4,
    FLOAT8,
    INT4,
    INT8,
    LinearScheme,
    NumberFormat,
    PerBlock,
    PerCluster,
    PerToken,
)


def _rounded_apart(*products: NumberFormat) -> Callable[[LinearScheme], bool]:
    """Inputs with calibrated scales that are rounded, and multiplied as floats."""
    return lambda scheme: (
        scheme.input is not None and not scheme.input.dynamic and not same_format(scheme, products)
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


def _microscaled(runtime: Runtime, how: How, shown: str = "") -> Rule:
    return Rule(
        lambda scheme: _formats(FLOAT4)(scheme) or _scales("e4m3", "e8m0", "e8m0-floor")(scheme),
        "it has no operators for float4, nor for scales in E4M3 or powers of two",
        (runtime,),
        how,
        shown,
    )


_NO_INT4_CACHE = (
    "a cache of INT4 cannot be appended to: no runtime concatenates INT4 tensors (seen in "
    + (
        ", ".join(f"{runtime.name} {runtime.seen[-1]}" for runtime in (ORT, OPENVINO, TENSORRT_RTX))
        + ")"
    )
)

_DEQUANTIZED = (
    "has no kernel for these weights: it dequantizes them on every run (DequantizeLinear + float"
    " MatMul)"
)
_ORT_ROUNDED = (
    "has no integer kernel for this pair of inputs and weights: it rounds the inputs"
    " (QuantizeLinear + DequantizeLinear), and then multiplies as if they were float (MatMulNBits)"
)
_CONVERTED = (
    "has no kernel for these weights: it converts them on every run (Convert + float"
    " FullyConnected)"
)
_OPENVINO_ROUNDED = (
    "has no integer kernel for this pair of inputs and weights: it rounds the inputs"
    " (FakeQuantize), and then multiplies as if they were float (FullyConnected with compressed"
    " weights)"
)


def _power_of_two(size: int) -> bool:
    return size & (size - 1) == 0


FUSED_BLOCKS: Mapping[str, Callable[[int], bool]] = {
    "1.31.1": lambda size: 16 <= size <= 256 and _power_of_two(size),
    "1.32.0": lambda size: size >= 16 and _power_of_two(size),
}
"""Sizes of blocks that ONNX Runtime's MatMulNBits was seen to take, by version. The last one speaks
for those that are not installed; one that is installed is asked."""


def _ask_ort(scheme: LinearScheme) -> Answer:
    from backends.onnx.probes import ask_ort

    return ask_ort(scheme, _ORT.form(scheme))


def _ask_openvino(scheme: LinearScheme) -> Answer:
    from backends.onnx.probes import ask_openvino

    return ask_openvino(scheme, _OPENVINO.form(scheme))


ASKED_ORT = Asked(ORT, "onnxruntime", _ask_ort)
"""ONNX Runtime, if it is installed."""
_ASKED_OPENVINO = Asked(OPENVINO, "openvino", _ask_openvino)
_EXACT = 1e-4
"""Relative error of sums that are not clipped, with room for float32."""


def ort_clips() -> bool | None:
    """Whether ONNX Runtime clips sums of products of uint8 and int8 on this CPU; ``None`` where it
    is not there to tell, or has no such kernel.
    """
    from backends.onnx.probes import ask_ort_saturation

    return _clips(ASKED_ORT, ask_ort_saturation)


def openvino_clips() -> bool | None:
    """The same of OpenVINO's CPU plugin; where it is not there to tell, of ONNX Runtime, which adds
    with the same instructions.
    """
    from backends.onnx.probes import ask_openvino_saturation

    own = _clips(_ASKED_OPENVINO, ask_openvino_saturation)
    return ort_clips() if own is None else own


def _clips(asked: Asked, ask: Callable[[], Answer]) -> bool | None:
    answer = asked.answer("sums of products of uint8 and int8", ask)
    return None if answer is None or not answer.fused else answer.approximation > _EXACT


_NO_BFLOAT16 = (
    "nothing on a CPU runs a graph of bfloat16: ONNX Runtime, in which it would be checked, has no"
    " MatMul for it"
)

_ORT = Target(
    compute_dtype="float32",
    opset=21,
    rules=(
        _DYNAMIC,
        _microscaled(
            ORT, "tested", "backends/onnx/test_schemes_ort.py::test_float4_has_nothing_to_run_in"
        ),
    ),
    products=(INT8,),
    runtime=ORT,
    asked=ASKED_ORT,
    told=lambda scheme, answer: _ORT_ROUNDED if answer.kernel == "MatMulNBits" else _DEQUANTIZED,
    warnings=(
        Rule(
            lambda scheme: (
                scheme.weight.format == FLOAT8 or _blocks(FUSED_BLOCKS[ORT.seen[-1]])(scheme)
            ),
            f"{ORT.name} {_DEQUANTIZED}",
            (ORT,),
            "asked",
        ),
        Rule(_rounded_apart(INT8), f"{ORT.name} {_ORT_ROUNDED}", (ORT,), "asked"),
    ),
    caches={
        INT4: _NO_INT4_CACHE,
        FLOAT8: "ONNX Runtime concatenates no float8 tensors, so nothing can be appended",
    },
    dtypes={
        "float16": (
            "ONNX Runtime's CPU provider has few kernels of float16: it casts to float32 and back"
            " between them, and fuses no linear of int8"
        ),
        "bfloat16": _NO_BFLOAT16,
    },
    whole_blocks=False,
    packs=True,
    rotary=True,
    branches=True,
    counts_by_mask=True,
    unsigned_inputs=True,
    clips=lambda: bool(ort_clips()),
)

_OPENVINO = Target(
    compute_dtype="float32",
    opset=21,
    rules=(
        _DYNAMIC,
        _microscaled(OPENVINO, "tried"),
        Rule(
            lambda scheme: scheme.input is not None and scheme.input.format == FLOAT8,
            "OpenVINO rounds activations to float8 by way of float16, which gives other numbers in"
            " one of 256 cases",
            (OPENVINO,),
            "tested",
            "backends/onnx/test_schemes_openvino.py::test_float8_is_rounded_otherwise",
        ),
        Rule(
            _inputs(PerCluster),
            "OpenVINO's CPU plugin compiles no quantizer with scales along the last axis",
            (OPENVINO,),
            "tested",
            "backends/onnx/test_schemes_openvino.py::test_clusters_do_not_compile",
        ),
    ),
    products=(INT8,),
    runtime=OPENVINO,
    asked=_ASKED_OPENVINO,
    told=lambda scheme, answer: (
        _OPENVINO_ROUNDED if answer.kernel.endswith((" i8", " i4", " u8", " u4")) else _CONVERTED
    ),
    warnings=(
        Rule(
            lambda scheme: _formats(FLOAT8)(scheme) or _blocks(lambda size: size >= 4)(scheme),
            f"{OPENVINO.name} {_CONVERTED}",
            (OPENVINO,),
            "asked",
        ),
        Rule(
            lambda scheme: (
                scheme.input is not None
                and (_rounded_apart(INT8)(scheme) or not scheme.weight.symmetric)
            ),
            f"{OPENVINO.name} {_OPENVINO_ROUNDED}",
            (OPENVINO,),
            "asked",
        ),
    ),
    caches={
        INT4: _NO_INT4_CACHE,
        FLOAT8: "OpenVINO rounds to float8 by way of float16, which gives other numbers",
    },
    dtypes={
        "float16": "OpenVINO chooses the precision when it compiles a graph of float32",
        "bfloat16": _NO_BFLOAT16,
    },
    shared_buffer=(
        "OpenVINO has no TensorScatter, and cuts the cache of a GroupQueryAttention to the tokens"
        " in it"
    ),
    clips=lambda: bool(openvino_clips()),
)

_TENSORRT = Target(
    compute_dtype="float16",
    opset=21,
    rules=(
        Rule(
            _inputs(PerToken),
            "TensorRT computes no scales of tokens while running",
            (TENSORRT_RTX,),
            "tried",
        ),
        Rule(
            _zero_points,
            "TensorRT takes no zero point other than 0",
            (TENSORRT_RTX,),
            "tested",
            "backends/onnx/test_schemes_tensorrt.py::test_refusals_are_about_the_runtime",
        ),
        Rule(
            lambda scheme: _formats(FLOAT4)(scheme) and _scales("e8m0", "e8m0-floor")(scheme),
            "TensorRT has no operator that quantizes inputs to MXFP4",
            (TENSORRT_RTX,),
            "tried",
        ),
        Rule(
            _scales("e8m0-floor"),
            "TensorRT rounds the scales of MXFP8 up",
            (TENSORRT_RTX,),
            "tried",
        ),
        Rule(
            _blocks(lambda size: size > 1),
            "TensorRT takes no blocks of one feature",
            (TENSORRT_RTX,),
            "tested",
            "backends/onnx/test_schemes_tensorrt.py::test_blocks_of_one_feature",
        ),
    ),
    products=(INT8, FLOAT8),
    runtime=TENSORRT_RTX,
    warnings=(
        Rule(
            _rounded_apart(INT8, FLOAT8),
            "TensorRT has no kernel for this pair of inputs and weights: it rounds the inputs, and"
            " then multiplies in float16",
            (TENSORRT_RTX,),
            "tested",
            "backends/onnx/test_schemes_tensorrt.py::test_without_the_barrier_nothing_is_built",
        ),
    ),
    caches={INT4: _NO_INT4_CACHE},
    dtypes={"bfloat16": _NO_BFLOAT16},
    shared_buffer="TensorRT writes only into a buffer whose length is fixed in the graph",
    integer_rows=False,
    routed_experts=False,
)

TARGETS: Mapping[str, Target] = {"ort": _ORT, "openvino": _OPENVINO, "tensorrt": _TENSORRT}
