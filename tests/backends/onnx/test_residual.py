"""A residual sum and its norm as one operator."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from backends.onnx.residual import MICROSOFT, fuse_residual_norms
from tests.tiny import relative_l2
from tests.tolerances import SAME_SUMS

WIDTH = 8
TEXT = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
norms (float[B, S, 8] a, float[%s] b) => (float[B, S, 8] x, float[B, S, 8] y)
<float[8] weight = {0.5, -1, 2, 1, 1, 3, -2, 0.25}, float two = {2}, float epsilon = {0.01},
 int64[1] axes = {-1}> {
    x = Add(%s)
    square = Pow(x, two)
    mean = ReduceMean(square, axes)
    shifted = Add(mean, epsilon)
    root = Sqrt(shifted)
    unit = Div(x, root)
    y = Mul(%s)
}
"""


def fused(
    inputs: str, shape: str = "B, S, 8", product: str = "weight, unit"
) -> tuple[ir.Model, onnx.ModelProto]:
    proto = onnx.parser.parse_model(TEXT % (shape, inputs, product))
    onnx.checker.check_model(proto)
    model = ir.from_proto(proto)
    fuse_residual_norms(model)
    return model, proto


def run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: list[np.ndarray] = session.run(["x", "y"], feeds)
    return found


@pytest.mark.parametrize("inputs", ["a, b", "b, a"])
@pytest.mark.parametrize("product", ["weight, unit", "unit, weight"])
def test_sum_and_norm_are_what_they_were(inputs: str, product: str) -> None:
    model, before = fused(inputs, product=product)
    assert [(node.domain, node.op_type) for node in model.graph] == [
        (MICROSOFT, "SkipSimplifiedLayerNormalization")
    ]
    generator = np.random.default_rng(0)
    feeds = {name: generator.normal(size=(2, 3, WIDTH)).astype(np.float32) for name in "ab"}
    for found, wanted in zip(run(ir.to_proto(model), feeds), run(before, feeds), strict=True):
        assert relative_l2(torch.from_numpy(found), torch.from_numpy(wanted)) <= SAME_SUMS


def test_a_sum_that_broadcasts_is_left() -> None:
    model, _ = fused("a, b", shape="8")
    assert "SkipSimplifiedLayerNormalization" not in {node.op_type for node in model.graph}
