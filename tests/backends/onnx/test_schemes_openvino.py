"""Every scheme that target ``openvino`` takes, as a graph of one linear in OpenVINO: its numbers,
and its kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backends.onnx.targets import TARGETS
from tests.backends.onnx.single import Single, accepted, preset, schemes, single
from tests.tiny import relative_l2
from tests.tolerances import LINEAR

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
pytestmark = pytest.mark.runtimes
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


@pytest.fixture(scope="module")
def core() -> Any:
    return openvino.Core()


def compiled(core: Any, data: bytes, **settings: str) -> Any:
    return core.compile_model(core.read_model(data), "CPU", settings)


def output(core: Any, case: Single, target: str = "openvino") -> torch.Tensor:
    found = compiled(core, case.bytes(target), **EXACT)({"x": case.inputs.numpy()})
    return torch.from_numpy(found[0].copy())


def factors(core: Any, case: Single) -> tuple[str, str]:
    """What a default session multiplies: types of input and weight."""
    model = compiled(
        core, case.bytes("openvino"), INFERENCE_PRECISION_HINT="f32"
    ).get_runtime_model()
    products = [
        op
        for op in model.get_ordered_ops()
        if op.get_rt_info()["layerType"].astype(str) == "FullyConnected"
    ]
    (product,) = products
    first, second = (source.get_element_type().get_type_name() for source in product.inputs()[:2])
    return first, second


@pytest.mark.parametrize("words", accepted("openvino"))
def test_the_graph_computes_what_the_artifact_says(core: Any, words: str) -> None:
    case = single(schemes()[words])
    assert relative_l2(output(core, case), case.output()) <= LINEAR


@pytest.mark.parametrize("words", accepted("openvino"))
def test_a_linear_runs_in_a_kernel_of_its_own_unless_there_is_a_warning(
    core: Any, words: str
) -> None:
    scheme = schemes()[words]
    entering, weight = factors(core, single(scheme))
    fused = weight in ("i8", "i4") and entering == ("f32" if scheme.input is None else "i8")
    assert fused == (TARGETS["openvino"].warning(scheme) is None)


@pytest.mark.parametrize("size", [2, 3, 4, 48])
def test_the_sizes_of_blocks_that_are_fused_are_those_that_are_not_warned_of(
    core: Any, size: int
) -> None:
    scheme = preset(f"int4/{size}")
    assert (factors(core, single(scheme))[1] == "i4") == (
        TARGETS["openvino"].warning(scheme) is None
    )


@pytest.mark.parametrize(
    "words",
    [
        "int4 weights in blocks of 64, float inputs",
        "int4 weights in blocks of 64, int8 inputs per tensor",
    ],
)
def test_columns_in_an_order_of_their_own_and_a_short_block(core: Any, words: str) -> None:
    case = single(schemes()[words], order=True)
    assert relative_l2(output(core, case), case.output()) <= LINEAR


def test_a_short_block_that_is_not_filled_up_is_refused_by_the_runtime(core: Any) -> None:
    """So there is a reason to fill it up."""
    with pytest.raises(RuntimeError, match="FrontEnd API failed"):
        compiled(core, single(schemes()["int4 weights in blocks of 64, float inputs"]).bytes("ort"))


def test_float8_is_rounded_otherwise() -> None:
    """The refusal is about the runtime: forced, it computes something else."""
    scheme = preset("float8")
    assert TARGETS["openvino"].refusal(scheme) is not None
    case = single(scheme)
    assert relative_l2(output(openvino.Core(), case, "ort"), case.output()) > 10 * LINEAR


def test_clusters_do_not_compile(core: Any) -> None:
    scheme = schemes()["int8 weights per channel, int8 inputs in 2 clusters"]
    assert TARGETS["openvino"].refusal(scheme) is not None
    with pytest.raises(RuntimeError, match="non per-tensor"):
        compiled(core, single(scheme).bytes("ort"))
