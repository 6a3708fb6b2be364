"""Golden graphs: the nodes of a few linears of a one-layer Llama in ONNX text, for each scheme and
target.

``pytest tests/backends/onnx/test_golden.py --regenerate-golden`` writes the files anew. Values are
named after the node that makes them, so that nothing but these nodes changes a file, and
initializers are shown by dtype and shape.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx
import onnx.printer
import onnx_ir as ir
import pytest
import torch

from backends.base import Int8Weights
from backends.onnx.targets import TARGETS
from backends.onnx.write import build
from calib.artifact import QuantizedModel
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import customised, resolve
from calib.schemes import Scheme, scheme_named
from tests.tiny import PROVENANCE, fuse_tiny, make_tiny, token_rows, wide_llama

GOLDEN = Path(__file__).parent / "golden"
SCHEMES: dict[str, Scheme] = {
    **{
        name: scheme_named(name)
        for name in (
            "float",
            "int8",
            "int8-weight-only",
            "int4-weight-only",
            "w4a8",
            "float8",
            "nvfp4",
            "mxfp8",
        )
    },
    "int8-cluster": customised(scheme_named("int8"), activation_granularity="cluster:2"),
    "int8-zero-points": customised(
        scheme_named("int8"), weight_symmetric=False, activation_symmetric=False
    ),
    "int4-short-block": customised(scheme_named("int4-weight-only"), block_size=40),
}
_LAYER = "model.layers.0."
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
"""Two that share their input, and one behind R4; the others are like the first."""


def expressed(target: str, scheme: Scheme) -> bool:
    return scheme.linear is None or TARGETS[target].refusal(scheme.linear) is None


CASES: list[tuple[str, str, Int8Weights]] = [
    *[
        (target, name, "signed")
        for target in TARGETS
        for name, scheme in SCHEMES.items()
        if expressed(target, scheme)
    ],
    ("ort", "int8", "unsigned"),
    ("ort", "int8-zero-points", "unsigned"),
]


@cache
def quantized(name: str, dtype: torch.dtype) -> QuantizedModel:
    config = wide_llama()
    config.num_hidden_layers = 1
    fused = fuse_tiny(make_tiny(config), ["r4"], dtype=dtype)
    how = resolve(SCHEMES[name], fused.wiring)
    return quantize_model(
        fused, how, forward_loop_over(length_batches(token_rows((9,)), 1)), PROVENANCE
    )


def described(model: ir.Model) -> str:
    """The nodes of :data:`LINEARS` and of the rotation, and what they read."""
    prefixes = tuple(f"{_LAYER}{linear}/" for linear in LINEARS)
    nodes = [node for node in model.graph if str(node.name).startswith((*prefixes, "R4.0/"))]
    lines = [f"opset {dict(sorted(model.opset_imports.items()))}", ""]
    entering: dict[int, str] = {}
    read: dict[str, ir.Value] = {}

    def named(value: ir.Value) -> str:
        if value.is_initializer():
            read[str(value.name)] = value
            return str(value.name)
        producer = value.producer()
        if producer in nodes and producer is not None:
            place = list(producer.outputs).index(value)
            return f"{producer.name}.{place}" if place else str(producer.name)
        return entering.setdefault(id(value), f"x{len(entering)}")

    for node in nodes:
        proto = ir.to_proto(node)
        for kind, values in (("input", node.inputs), ("output", node.outputs)):
            del getattr(proto, kind)[:]
            getattr(proto, kind).extend(named(value) for value in values if value is not None)
        proto.ClearField("name")
        lines.append(onnx.printer.to_text(proto).strip())
    lines.append("")
    lines.extend(f"{value.dtype} {value.shape} {name}" for name, value in sorted(read.items()))
    return "\n".join(lines).replace(_LAYER, "") + "\n"


def place(target: str, name: str, int8_weights: Int8Weights) -> Path:
    """The file of a case."""
    return Path(target, f"{name}-unsigned.txt" if int8_weights == "unsigned" else f"{name}.txt")


@pytest.mark.parametrize(("target", "name", "int8_weights"), CASES)
def test_the_graph_is_the_golden_one(
    target: str, name: str, int8_weights: Int8Weights, regenerate_golden: bool
) -> None:
    model = quantized(name, getattr(torch, TARGETS[target].compute_dtype))
    found = described(build(model, TARGETS[target], int8_weights=int8_weights))
    path = GOLDEN / place(target, name, int8_weights)
    if regenerate_golden:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")


def test_there_are_no_others() -> None:
    assert {path.relative_to(GOLDEN) for path in GOLDEN.rglob("*.txt")} == {
        place(*case) for case in CASES
    }
