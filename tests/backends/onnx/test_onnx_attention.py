"""Attention placeholders as standard operators, against attention written out in torch."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from backends.onnx.attention import lower_attention
from backends.onnx.placeholders import ATTENTION, DOMAIN, SCALE_ATTRIBUTE, SOFTCAP_ATTRIBUTE
from calib.modules.attention import attend
from tests.tiny import relative_l2
from tests.tolerances import SAME_SUMS

HEADS, WIDTH = 6, 8
SCALE, CAP = 0.3, 5.0


def graph(
    kv_heads: int, softcap: float | None, layers: int = 2, dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.Model:
    """``layers`` placeholders that share one mask."""
    attributes = {SCALE_ATTRIBUTE: SCALE} | (
        {} if softcap is None else {SOFTCAP_ATTRIBUTE: softcap}
    )
    mask = _value("mask", ["B", 1, "S", "T"], ir.DataType.BOOL)
    inputs, outputs, builder = [mask], [], ir.tape.Tape()
    for layer in range(layers):
        query = _value(f"q{layer}", ["B", HEADS, "S", WIDTH], dtype)
        key, value = (_value(f"{part}{layer}", ["B", kv_heads, "T", WIDTH], dtype) for part in "kv")
        y = builder.op(ATTENTION, [query, key, value, mask], attributes, domain=DOMAIN, version=1)
        y.name, y.shape, y.type = (
            f"y{layer}",
            ir.Shape(["B", "S", HEADS, WIDTH]),
            ir.TensorType(dtype),
        )
        inputs += [query, key, value]
        outputs.append(y)
    made = ir.Graph(
        inputs, outputs, nodes=builder.nodes, opset_imports={"": 21, DOMAIN: 1}, name="attention"
    )
    return ir.Model(made, ir_version=10)


def _value(name: str, shape: list[str | int], dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def run(model: ir.Model, feeds: dict[str, Tensor]) -> list[Tensor]:
    lower_attention(model)
    assert {node.domain for node in model.graph} == {""}
    model.graph.opset_imports.pop(DOMAIN)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return [
        torch.from_numpy(y)
        for y in session.run(None, {name: x.numpy() for name, x in feeds.items()})
    ]


def feeds(
    kv_heads: int, sequence: int, total: int, size: float = 1.0, layers: int = 2
) -> dict[str, Tensor]:
    """Three rows; the second lacks three tokens on its left, the third all but the last."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return size * torch.randn(shape, generator=generator)

    real = torch.arange(total)[None] >= torch.tensor([0, 3, total - 1])[:, None]
    causal = torch.ones(sequence, total, dtype=torch.bool).tril(total - sequence)
    found = {"mask": causal & real[:, None, None]}
    for layer in range(layers):
        found[f"q{layer}"] = random(3, HEADS, sequence, WIDTH)
        found |= {f"{part}{layer}": random(3, kv_heads, total, WIDTH) for part in "kv"}
    return found


@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("softcap", [None, CAP])
@pytest.mark.parametrize(
    ("sequence", "total"), [(9, 9), (4, 9), (1, 9)], ids=["prefill", "chunk", "step"]
)
def test_it_is_attention(kv_heads: int, softcap: float | None, sequence: int, total: int) -> None:
    given = feeds(kv_heads, sequence, total, size=3.0)
    for layer, found in enumerate(run(graph(kv_heads, softcap), given)):
        query, key, value = (given[f"{part}{layer}"] for part in "qkv")
        wanted = attend(torch.matmul, query, key, value, given["mask"], SCALE, softcap)
        seen = given["mask"].any(dim=-1)[:, 0]  # a padded query sees no key, and means nothing
        assert relative_l2(found[seen], wanted[seen]) <= SAME_SUMS
        assert bool(torch.isfinite(found).all())


def test_half_precision_stays_finite() -> None:
    """Scores of thousands below zero and the mask of a query that sees no key do not add up to
    minus infinity.
    """
    given = {name: x.half() if x.is_floating_point() else x for name, x in feeds(2, 9, 9).items()}
    for layer in range(2):
        given[f"q{layer}"] = torch.full_like(given[f"q{layer}"], 60.0)
        given[f"k{layer}"] = torch.full_like(given[f"k{layer}"], -60.0)
    model = graph(2, None, dtype=ir.DataType.FLOAT16)
    for found in run(model, given):
        assert bool(torch.isfinite(found).all())
    hidden = model.graph.initializers["attention.hidden.FLOAT16"].const_value
    assert hidden is not None
    # ONNX Runtime's CPU adds in float32; others do not.
    assert np.isfinite(hidden.numpy() + np.float16(-8640))


def test_weights_that_round_to_nothing_are_no_denormals() -> None:
    """Their sum is far below what float32 resolves, and numbers below 1e-38 are slow to
    multiply.
    """
    model = graph(2, None, layers=1)
    given = feeds(2, 9, 9, layers=1)
    given["q0"], given["k0"] = torch.zeros_like(given["q0"]), torch.zeros_like(given["k0"])
    given["q0"][..., 0], given["k0"][:, :, :-1, 0] = 1.0, -95.0 / SCALE  # e^-95 = 6e-42
    lower_attention(model)
    weights = next(node for node in model.graph if node.op_type == "Softmax").outputs[0]
    weights.shape, weights.type = ir.Shape(["B", HEADS, "S", "T"]), ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(weights)
    found = run(model, given)[1].numpy()
    assert found.min() < 1e-29  # there are such weights here
    assert not np.any((found != 0) & (found < np.finfo(np.float32).tiny))


def test_layers_share_the_bias_of_their_mask() -> None:
    model = graph(2, None)
    lower_attention(model)
    operators = [node.op_type for node in model.graph]
    assert operators.count("Where") == 1
    assert operators.count("Softmax") == 2
    assert "Expand" not in operators  # keys and values are not copied for every head
