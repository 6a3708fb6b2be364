"""RoPE whose frequencies depend on the length of the text, against stock transformers around the
length at which they change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

from backends.base import WriteOptions
from backends.onnx import tensorrt_rtx
from backends.onnx.backend import OnnxBackend
from backends.onnx.file_names import MODEL_FILE
from backends.onnx.rotary import fuse_rotary
from backends.onnx.targets import TARGETS
from backends.onnx.trace import TraceRequest
from backends.onnx.trace_cache import cached_trace
from calib.architectures import Kind
from calib.artifact import cast_model
from calib.network.skeleton import portable_config
from calib.process.progress import silent
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import resolve
from calib.schemes import scheme_named
from tests.backends.onnx.whole import compare, quantized
from tests.tiny import PROVENANCE, SIZES, Tiny, fuse_tiny, make_tiny, relative_l2, token_rows
from tests.tolerances import FLIPS, WEIGHT_ONLY

SWITCH = 16
HEAD = 16
LONG = {"hidden_size": 64, "num_attention_heads": 64 // HEAD}


def longrope(partial: float, switch: int = SWITCH) -> Any:
    """Phi-3.5 rotates whole heads, Phi-4-mini three quarters of each."""
    width = int(HEAD * partial) // 2
    return transformers.Phi3Config(
        **SIZES | LONG,
        original_max_position_embeddings=switch,
        partial_rotary_factor=partial,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": partial,
            "short_factor": [1 + 0.1 * index for index in range(width)],
            "long_factor": [2 + 0.7 * index for index in range(width)],
        },
    )


def dynamic() -> Any:
    return transformers.LlamaConfig(
        **SIZES | {"max_position_embeddings": SWITCH},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    )


def by_layer_type() -> Any:
    """Layers of two types, of which one has frequencies that change."""
    local = {"rope_type": "default", "rope_theta": 1e4}
    whole = {"rope_type": "dynamic", "rope_theta": 1e5, "factor": 4.0}
    return transformers.Gemma3TextConfig(
        **SIZES | LONG | {"max_position_embeddings": SWITCH},
        head_dim=HEAD,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": local, "full_attention": whole},
    )


MODELS: dict[str, tuple[Callable[[], Any], Sequence[Kind]]] = {
    "phi-3.5": (lambda: longrope(1.0), ("r1", "r2")),
    "phi-4-mini": (lambda: longrope(0.75), ("r1", "r2")),
    "phi-4-mini-plain": (lambda: longrope(0.75), ()),
    "dynamic": (dynamic, ("r1", "r2")),
    "by-layer-type": (by_layer_type, ("r2",)),
}


class Case:
    """A float export, and the stock model; each pass of which has a module of its own, as
    transformers remembers lengths.
    """

    def __init__(self, name: str, folder: Path, target: str = "ort") -> None:
        config, kinds = MODELS[name]
        self.tiny: Tiny = make_tiny(config())
        fused = fuse_tiny(self.tiny, kinds)
        plan = resolve(scheme_named("float"), fused.wiring)
        artifact = quantize_model(fused, plan, None, PROVENANCE)
        artifact = cast_model(artifact, getattr(torch, TARGETS[target].compute_dtype))
        OnnxBackend().write(artifact, folder, WriteOptions(target))
        self.runtime = OnnxBackend().load(folder, target, exact=True)

    def stock(self) -> Any:
        model = self.tiny.model(torch.float64)
        model.set_attn_implementation("eager")
        return model


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def row(length: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = token_rows((length,), seed=length)[0][None]
    return ids, torch.ones_like(ids), torch.arange(length)[None]


@pytest.mark.parametrize("length", [10, SWITCH, SWITCH + 1, 30])
@torch.no_grad()
def test_a_prompt(case: Case, length: int) -> None:
    ids, mask, positions = row(length)
    wanted = case.stock()(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert relative_l2(case.runtime.forward(ids, mask, positions)[0], wanted) <= WEIGHT_ONLY


@pytest.mark.runtimes
@pytest.mark.parametrize("name", ["phi-4-mini", "dynamic"])
@torch.no_grad()
def test_a_prompt_in_openvino(name: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    case = Case(name, tmp_path, "openvino")
    for length in (SWITCH, SWITCH + 1):
        ids, mask, positions = row(length)
        wanted = case.stock()(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        assert relative_l2(case.runtime.forward(ids, mask, positions)[0], wanted) <= WEIGHT_ONLY


@pytest.mark.runtimes
@pytest.mark.parametrize("name", ["phi-4-mini", "dynamic"])
def test_tensorrt_builds_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    Case(name, tmp_path, "tensorrt")
    assert tensorrt_rtx.build(tmp_path / MODEL_FILE, "8.9")


@pytest.mark.parametrize(("prompt", "length"), [(7, SWITCH), (SWITCH + 3, SWITCH + 9)])
@torch.no_grad()
def test_one_token_at_a_time_on_either_side(case: Case, prompt: int, length: int) -> None:
    """Across the switch transformers attends to keys of both kinds, unless it generates."""
    ids, mask, positions = row(length)
    model, cache, past = case.stock(), transformers.DynamicCache(), None
    for start, stop in ((0, prompt), *((at, at + 1) for at in range(prompt, length))):
        here = slice(start, stop)
        given = (ids[:, here], mask[:, :stop], positions[:, here])
        found, past = case.runtime.forward(*given, past)
        names = ("input_ids", "attention_mask", "position_ids")
        wanted = model(**dict(zip(names, given, strict=True)), past_key_values=cache).logits
        assert relative_l2(found, wanted) <= WEIGHT_ONLY


@torch.no_grad()
def test_the_longest_row_of_a_batch_decides(case: Case) -> None:
    """Left padding: the row that is short on its own is run as the long one is."""
    rows = [row(length)[0][0] for length in (20, 9)]
    ids = torch.stack([pad(each, (20 - each.numel(), 0)) for each in rows])
    mask = torch.stack([pad(torch.ones_like(each), (20 - each.numel(), 0)) for each in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model = case.tiny.model(torch.float64)  # eager attention makes NaN of padding in float64
    wanted = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    found, _ = case.runtime.forward(ids, mask, positions)
    real = mask.bool()
    assert relative_l2(found[real], wanted[real]) <= WEIGHT_ONLY
    alone, _ = case.runtime.forward(*row(9))
    assert relative_l2(alone[0], wanted[1][real[1]]) > 10 * WEIGHT_ONLY  # the switch is seen


@pytest.mark.parametrize("switch", [4, SWITCH])
def test_a_quantized_cache_in_one_buffer(switch: int, tmp_path: Path) -> None:
    """Rows of 12, 7 and 5 tokens, all above the switch or below it."""
    artifact = quantized(longrope(0.75, switch), ("r1", "r2", "r3"), kv="int8")
    assert compare(artifact, tmp_path, kv_buffer="shared").error <= FLIPS


@pytest.mark.parametrize(("config", "fused"), [(dynamic, 4), (lambda: longrope(0.75), 0)])
def test_it_is_one_operator_where_cosines_are_not_scaled(
    config: Callable[[], Any], fused: int
) -> None:
    request = TraceRequest(portable_config(config()), torch.float32, 21)
    model = cached_trace(request, silent)
    fuse_rotary(model)
    assert Counter(node.op_type for node in model.graph)["RotaryEmbedding"] == fused
