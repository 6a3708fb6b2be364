"""Keys and values in one buffer that the graph writes into."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from backends.base import WriteOptions
from backends.onnx.backend import OnnxBackend
from backends.onnx.file_names import GENAI_FILE, MODEL_FILE
from backends.onnx.ort_options import session_options
from backends.onnx.runner import open_session
from calib.artifact import QuantizedModel
from calib.schemes import scheme_named
from tests.backends.onnx.whole import batch, compare, quantized
from tests.tiny import CONFIGS, relative_l2, token_rows
from tests.tolerances import FLIPS, SAME_SUMS, WEIGHT_ONLY

CHOOSING = {
    "llama": 2,  # behind R3, so that its heads have to be put together again
    "gemma2": 2,  # caps its scores
    "gemma3": 2,  # windows that slide, and norms of queries and keys
    "gpt_neox": 2,  # RoPE on a part of each head
    "mixtral": 2,
    "opt": 2,  # without RoPE
    "gpt2": 0,  # heads of 12, which the kernel does not take
    "qwen3": 0,  # heads of 20
}
"""Models by how many of their two layers choose between two kernels."""


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    return quantized(CONFIGS["llama"](), kinds=("r1", "r2", "r4"))


def graph_of(folder: Path) -> onnx.GraphProto:
    return onnx.load(folder / MODEL_FILE, load_external_data=False).graph


def operators(graph: onnx.GraphProto) -> Counter[str]:
    """How often each stands in the graph and in its branches."""
    found = Counter(node.op_type for node in graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += operators(attribute.g)
    return found


@pytest.mark.parametrize("name", CHOOSING)
def test_prefill_and_decoding_are_the_reference(name: str, tmp_path: Path) -> None:
    """Rows of several lengths, one and two tokens at a time, which are two ways through the
    graph.
    """
    artifact = quantized(CONFIGS[name]())
    for step in (1, 2):
        assert compare(artifact, tmp_path, kv_buffer="shared", step=step).error <= WEIGHT_ONLY
    found = operators(graph_of(tmp_path))
    assert found["GroupQueryAttention"] == CHOOSING[name]
    assert found["TensorScatter"] == 4  # of two layers


def test_a_quantized_cache_is_a_buffer_too(tmp_path: Path) -> None:
    found = compare(quantized(CONFIGS["llama"](), kv="int8"), tmp_path, kv_buffer="shared")
    assert found.error <= FLIPS
    assert {tensor.dtype for tensor in found.cache} == {torch.int8}
    assert operators(graph_of(tmp_path))["TensorScatter"] == 4


def test_one_token_alone_is_a_prompt(model: QuantizedModel, tmp_path: Path) -> None:
    """The step's way through the graph, behind an empty past."""
    runtimes = []
    for kind in ("grown", "shared"):
        (tmp_path / kind).mkdir()
        options = WriteOptions("ort", kv_buffer=kind)  # type: ignore[arg-type]
        OnnxBackend().write(model, tmp_path / kind, options)
        runtimes.append(OnnxBackend().load(tmp_path / kind, "ort", exact=True))
    ids = token_rows((1,), seed=4)[0][None]
    (logits, past), (wanted, past_wanted) = (
        runtime.forward(ids, torch.ones_like(ids), torch.zeros_like(ids))
        for runtime in reversed(runtimes)
    )
    assert relative_l2(logits, wanted) <= SAME_SUMS
    assert all(relative_l2(*pair) <= SAME_SUMS for pair in zip(past, past_wanted, strict=True))


@pytest.mark.parametrize(("name", "kv"), [("llama", None), ("llama", "int8"), ("qwen3", None)])
def test_without_room_it_grows(name: str, kv: str | None, tmp_path: Path) -> None:
    """A cache that is exactly the past, as onnxruntime-genai hands over where it searches with
    beams: every kind of layer, a prompt of six tokens, two more, and one.
    """
    artifact = quantized(CONFIGS[name](), kv=kv)
    sessions = []
    for kind in ("grown", "shared"):
        (tmp_path / kind).mkdir()
        options = WriteOptions("ort", kv_buffer=kind)  # type: ignore[arg-type]
        OnnxBackend().write(artifact, tmp_path / kind, options)
        path = tmp_path / kind / MODEL_FILE
        sessions.append(open_session(str(path), session_options(exact=True), path))
    ids = token_rows((9,), seed=4)[0][None].numpy().repeat(3, axis=0)
    dtype = np.float32 if kv is None else np.int8
    past = [
        np.zeros((3, entry.shape[1], 0, entry.shape[3]), dtype)
        for entry in sessions[0].get_inputs()[3:]
    ]
    names = [entry.name for entry in sessions[0].get_inputs()]
    for start, stop in ((0, 6), (6, 8), (8, 9)):
        positions = np.arange(start, stop)[None].repeat(3, axis=0)
        given = [ids[:, start:stop], np.ones((3, stop), np.int64), positions, *past]
        wanted, found = (
            session.run(None, dict(zip(names, given, strict=True))) for session in sessions
        )
        for pair in zip(found, wanted, strict=True):
            one, other = (torch.from_numpy(each).double() for each in pair)
            assert one.shape == other.shape
            assert relative_l2(one, other) <= SAME_SUMS
        past = wanted[1:]


def test_linears_are_fused_as_ever(model: QuantizedModel, tmp_path: Path) -> None:
    OnnxBackend().write(model, tmp_path, WriteOptions("ort", kv_buffer="shared"))
    fusion = OnnxBackend().fusion(tmp_path, "ort")
    assert fusion is not None
    assert fusion.unfused == []
    assert fusion.quantized == len(model.linears)
    assert OnnxBackend().read_linears(tmp_path, "ort").keys() == model.linears.keys()


class Buffers:
    """A session whose past and present are the same memory, as onnxruntime-genai binds them.

    The room behind the tokens holds NaN, which would spread to the logits through whatever read it.
    """

    def __init__(self, folder: Path, batch_size: int, capacity: int) -> None:
        path = folder / MODEL_FILE
        self.session = open_session(str(path), session_options(exact=True), path)
        self.memory = {
            entry.name: ort.OrtValue.ortvalue_from_numpy(
                np.full((batch_size, entry.shape[1], capacity, entry.shape[3]), np.nan, np.float32)
            )
            for entry in self.session.get_inputs()
            if entry.name.startswith("past_key_values.")
        }

    def run(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The logits; the cache stays where it is."""
        binding: Any = self.session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_cpu_input(name, tensor.numpy())
        binding.bind_output("logits")
        for name, buffer in self.memory.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        self.session.run_with_iobinding(binding)
        return torch.from_numpy(binding.copy_outputs_to_cpu()[0])


@pytest.mark.parametrize("step", [1, 2])
def test_it_writes_in_place_and_reads_no_further_than_the_mask(
    model: QuantizedModel, tmp_path: Path, step: int
) -> None:
    whole = compare(model, tmp_path, kv_buffer="shared")
    rows, prefill = batch(), 6
    length = rows.ids.shape[1]
    buffers = Buffers(tmp_path, len(rows.ids), capacity=length + 5)
    found = []
    for start in (0, *range(prefill, length, step)):
        stop = start + step if start else prefill
        here = slice(start, stop)
        mask = rows.mask[:, :stop]
        found.append(
            buffers.run(
                input_ids=rows.ids[:, here],
                attention_mask=mask,
                position_ids=rows.positions[:, here],
            )
        )
    assert relative_l2(torch.cat(found, dim=1)[rows.real], whole.wanted) <= WEIGHT_ONLY
    # a padded query sees no key, and what it leaves behind means nothing
    real = rows.real[:, None, :, None]
    for buffer, wanted in zip(buffers.memory.values(), whole.cache, strict=True):
        held = torch.from_numpy(buffer.numpy())
        assert relative_l2(held[:, :, :length] * real, wanted * real) <= SAME_SUMS
        assert bool(held[:, :, length:].isnan().all())


def test_the_folder_says_so(model: QuantizedModel, tmp_path: Path) -> None:
    OnnxBackend().write(model, tmp_path, WriteOptions("ort", kv_buffer="shared"))
    graph = graph_of(tmp_path)
    caches = [value for value in (*graph.input, *graph.output) if "." in value.name]
    assert len(caches) == 8
    assert {value.type.tensor_type.shape.dim[2].dim_param for value in caches} == {"capacity"}
    assert '"past_present_share_buffer": true' in (tmp_path / GENAI_FILE).read_text()


def test_activations_in_integers(tmp_path: Path) -> None:
    """A whole model of int8, for the flips that its rounding allows."""
    assert scheme_named("int8").linear.input is not None
    artifact = quantized(CONFIGS["llama"](), kinds=("r1", "r2", "r4"), scheme="int8")
    assert compare(artifact, tmp_path, kv_buffer="shared").error <= FLIPS
