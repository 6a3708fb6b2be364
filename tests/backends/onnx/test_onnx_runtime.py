"""Written graphs, run in ONNX Runtime: they compute what the artifact says, in every way a model is
run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from backends.onnx.backend import OnnxBackend
from backends.onnx.feeds import cache_inputs, feeds, whole_row
from backends.onnx.file_names import MODEL_FILE
from backends.onnx.runner import OnnxModel
from calib.errors import BackendError
from calib.measure.reference import ReferenceLinear
from tests.backends.onnx.conftest import CASES, Exported
from tests.tiny import relative_l2, token_rows
from tests.tolerances import FLIPS, LINEAR, WEIGHT_ONLY

Load = Callable[[Path], object]


def ids_of(*lengths: int) -> list[Tensor]:
    return token_rows(lengths, seed=4)


def bound(exported: Exported) -> float:
    return WEIGHT_ONLY if exported.quantized.scheme.weight_only else FLIPS


def prefill(runtime: OnnxModel, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    return runtime.forward(ids, torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids))


def test_prefill_is_the_reference(exported: Exported) -> None:
    ids = torch.stack(ids_of(12, 12))
    logits, present = prefill(exported.runtime(), ids)
    assert logits.dtype == torch.float32
    assert relative_l2(logits, exported.logits(ids)) <= bound(exported)
    assert {tuple(tensor.shape[::2]) for tensor in present} == {(2, 12)}


def test_each_linear_on_the_same_input_is_the_reference(exported: Exported) -> None:
    names = list(exported.quantized.linears)
    found = OnnxBackend().load_probed(exported.folder, "ort").probe(ids_of(12)[0][None], names)
    assert list(found) == names
    for name, (entering, leaving) in found.items():
        linear = exported.reference.get_submodule(name)
        assert isinstance(linear, ReferenceLinear)
        assert relative_l2(leaving, linear.matmul(linear.quantize(entering))) <= LINEAR, name


def test_linears_are_read_back_to_the_last_bit(exported: Exported) -> None:
    found = OnnxBackend().read_linears(exported.folder, "ort")
    assert list(found) == list(exported.quantized.linears)
    for name, linear in exported.quantized.linears.items():
        for field in dataclasses.fields(linear):
            before, after = getattr(linear, field.name), getattr(found[name], field.name)
            if isinstance(before, Tensor):
                assert after.dtype == before.dtype, (name, field.name)
                assert torch.equal(after, before), (name, field.name)
            else:
                assert after == before, (name, field.name)


def test_every_linear_runs_as_an_integer_kernel(exported: Exported) -> None:
    found = OnnxBackend().fusion(exported.folder, "ort")
    assert found.quantized == len(exported.quantized.linears)
    assert found.unfused == []
    integer = (
        ("MatMulNBits",)
        if exported.quantized.scheme.weight_only
        else ("MatMulIntegerToFloat", "QLinearMatMul")
    )
    assert sum(found.kernels.get(kernel, 0) for kernel in integer) == len(exported.products)


def test_step_by_step_with_the_cache_is_the_prefill(exported: Exported) -> None:
    ids = torch.stack(ids_of(11, 11))
    runtime = exported.runtime()
    whole, cache = prefill(runtime, ids)
    logits, past = prefill(runtime, ids[:, :4])
    steps = [logits]
    for step in range(4, 11):
        here = slice(step, step + 1)
        mask = torch.ones(2, step + 1, dtype=torch.long)
        logits, past = runtime.forward(ids[:, here], mask, torch.full((2, 1), step), past)
        steps.append(logits)
    assert relative_l2(torch.cat(steps, dim=1), whole) <= bound(exported)
    assert all(relative_l2(a, b) <= bound(exported) for a, b in zip(past, cache, strict=True))


def test_left_padded_rows_are_the_rows_alone(exported: Exported) -> None:
    rows = ids_of(11, 7, 4)
    runtime = exported.runtime()
    ids = torch.stack([torch.nn.functional.pad(row, (11 - row.numel(), 0)) for row in rows])
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones_like(row), (11 - row.numel(), 0)) for row in rows]
    )
    logits, _ = runtime.forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
    for row, found in zip(rows, logits, strict=True):
        alone, _ = prefill(runtime, row[None])
        assert relative_l2(found[11 - row.numel() :], alone[0]) <= bound(exported)


def test_the_default_session_runs_too(exported: Exported) -> None:
    """It may quantize activations of weight-only linears to int8 by itself, which costs about a
    percent.
    """
    ids = ids_of(12)[0][None]
    logits, _ = prefill(OnnxBackend().load(exported.folder, "ort", exact=False), ids)
    assert relative_l2(logits, exported.logits(ids)) <= FLIPS


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if "r4" in case[2] and name != "odd"]
)
def test_the_online_rotation_acts_on_its_input(
    name: str, export_of: Callable[[str], Exported], tmp_path: Path
) -> None:
    """Nothing of it is folded into a constant: its output is the rotation of whatever comes in."""
    exported = export_of(name)
    rotation = exported.quantized.rotations["R4.1"]
    nodes = {node.name: node for node in exported.graph.node}
    first = nodes.get(f"{rotation.name}/Signs") or nodes[f"{rotation.name}/Factor0/Reshape"]
    ends = [first.input[0], nodes[f"{rotation.name}/Reshape"].output[0]]
    assert ends[0] not in {tensor.name for tensor in exported.graph.initializer}
    model = onnx.load(exported.folder / MODEL_FILE)
    model.graph.output.extend(onnx.ValueInfoProto(name=end) for end in ends)
    onnx.save(model, tmp_path / "probed.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        tmp_path / "probed.onnx", options, providers=["CPUExecutionProvider"]
    )
    caches = cache_inputs(model.graph)
    outputs = []
    for row in ids_of(9, 9):
        ids = row[None]
        inputs = feeds(caches, *whole_row(ids), None)
        found = session.run(ends, {name: tensor.numpy() for name, tensor in inputs.items()})
        before, after = (torch.from_numpy(array) for array in found)
        assert relative_l2(after, before.double() @ rotation.dense()) <= LINEAR
        outputs.append(after)
    assert relative_l2(outputs[0], outputs[1]) > 0.1


def test_an_empty_cache_may_be_passed_or_left_out(llama: Exported) -> None:
    ids = ids_of(5)[0][None]
    runtime = llama.runtime()
    config = llama.quantized.config
    empty = [torch.zeros(1, config["num_key_value_heads"], 0, config["head_dim"])] * 4
    passed, _ = runtime.forward(ids, torch.ones_like(ids), torch.arange(5)[None], empty)
    assert torch.equal(passed, prefill(runtime, ids)[0])


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no-data": lambda folder: (folder / "model.onnx.data").unlink(),
    "short-data": lambda folder: truncate(folder / "model.onnx.data"),
    "short-graph": lambda folder: truncate(folder / MODEL_FILE),
    "not-onnx": lambda folder: (folder / MODEL_FILE).write_bytes(b"this is not a graph" * 50),
    "empty": lambda folder: (folder / MODEL_FILE).write_bytes(b""),
    "no-graph": lambda folder: (folder / MODEL_FILE).unlink(),
}
OPENERS: dict[str, Load] = {
    "load": lambda folder: OnnxBackend().load(folder, "ort", exact=True),
    "load_probed": lambda folder: OnnxBackend().load_probed(folder, "ort"),
    "fusion": lambda folder: OnnxBackend().fusion(folder, "ort"),
    "read_linears": lambda folder: OnnxBackend().read_linears(folder, "ort"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("opener", OPENERS)
def test_a_damaged_folder_is_named(copied: Path, damage: str, opener: str) -> None:
    OPENERS[opener](copied)  # it opens before
    DAMAGE[damage](copied)
    with pytest.raises(BackendError, match=MODEL_FILE) as caught:
        OPENERS[opener](copied)
    assert caught.value.hint


def test_a_graph_of_someone_else_is_refused(tmp_path: Path) -> None:
    text = (
        '<ir_version: 10, opset_import: ["": 21]> g (float[n] x) => (float[n] y) { y = Identity'
        " (x) }"
    )
    onnx.save(onnx.parser.parse_model(text), tmp_path / MODEL_FILE)
    with pytest.raises(BackendError, match="not a graph of rotq"):
        OnnxBackend().read_linears(tmp_path, "ort")
