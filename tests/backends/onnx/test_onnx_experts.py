"""Experts in the graph: each a linear of its own, run on its own tokens or on all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from transformers.activations import ACT2FN

from backends.onnx.backend import OnnxBackend
from backends.onnx.experts import ACTIVATIONS
from backends.onnx.targets import TARGETS
from backends.onnx.write import build
from tests.backends.onnx.whole import batch, compare, quantized
from tests.tiny import CONFIGS, MOE, SIZES, relative_l2
from tests.tolerances import FLIPS, SAME_SUMS, WEIGHT_ONLY

EXPERTS = 4


def test_an_expert_is_run_on_the_tokens_that_chose_it(tmp_path: Path) -> None:
    """One token reaches two of four experts, so the two others multiply no row at all."""
    model = quantized(CONFIGS["qwen3_moe"]())
    compare(model, tmp_path)
    probed = OnnxBackend().load_probed(tmp_path, "ort")
    names = [
        f"model.layers.1.mlp.experts.{part}_proj.{e}"
        for part in ("gate_up", "down")
        for e in range(EXPERTS)
    ]
    assert set(names) <= model.linears.keys()
    found = probed.probe(batch().ids[:1, :1], names)
    rows = {name: entering.shape[-2] for name, (entering, _) in found.items()}
    assert Counter(rows.values()) == {0: 4, 1: 4}
    assert all(rows[name] == rows[name.replace("gate_up", "down")] for name in names)


def test_static_activations_of_experts(tmp_path: Path) -> None:
    assert compare(quantized(CONFIGS["qwen3_moe"](), scheme="int8"), tmp_path).error <= FLIPS
    assert OnnxBackend().fusion(tmp_path, "ort").unfused == []  # type: ignore[union-attr]


def test_experts_left_in_float_are_slices_of_their_parameter(tmp_path: Path) -> None:
    model = quantized(CONFIGS["qwen3_moe"](), overrides={"*.1.mlp.experts.*": "float"})
    assert "model.layers.1.mlp.experts.down_proj" in model.floats  # with R4 before it
    assert compare(model, tmp_path).error <= WEIGHT_ONLY


def test_where_experts_cannot_be_routed_they_run_on_all_tokens(tmp_path: Path) -> None:
    model = quantized(CONFIGS["mixtral"]())
    outputs = []
    for routed in ("ort", "tensorrt"):
        assert TARGETS[routed].routed_experts == (routed == "ort")
        graph = build(model, TARGETS[routed])
        operators = Counter(node.op_type for node in graph.graph)
        assert operators["NonZero"] == (8 if routed == "ort" else 0)
        path = tmp_path / f"{routed}.onnx"
        ir.save(graph, path)
        session = onnxruntime.InferenceSession(path, _exact(), providers=["CPUExecutionProvider"])
        rows = batch()
        feeds = {"input_ids": rows.ids, "attention_mask": rows.mask, "position_ids": rows.positions}
        feeds |= {value.name: torch.zeros(3, 2, 0, 8) for value in session.get_inputs()[3:]}
        found = session.run(["logits"], {name: tensor.numpy() for name, tensor in feeds.items()})
        outputs.append(torch.from_numpy(found[0])[rows.real])
    assert relative_l2(outputs[1], outputs[0]) <= SAME_SUMS


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name: str) -> None:
    x = ir.Value(name="x", shape=ir.Shape([1000]), type=ir.TensorType(ir.DataType.FLOAT))
    builder = ir.tape.Tape()
    y = ACTIVATIONS[name](builder, x, "act")
    y.name = "y"
    graph = ir.Graph([x], [y], nodes=builder.nodes, opset_imports={"": 21}, name="activation")
    y.shape, y.type = x.shape, x.type
    proto = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(proto, _exact(), providers=["CPUExecutionProvider"])
    values = torch.linspace(-6, 6, 1000)
    found = torch.from_numpy(session.run(None, {"x": values.numpy()})[0])
    assert relative_l2(found, ACT2FN[name](values)) <= SAME_SUMS


def test_a_sparse_layer_without_a_gate_norm(tmp_path: Path) -> None:
    """The weights of the chosen experts need not sum to one."""
    config = transformers.Qwen3MoeConfig(**SIZES, **MOE, head_dim=16, norm_topk_prob=False)
    assert compare(quantized(config), tmp_path).error <= WEIGHT_ONLY


def _exact() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options
