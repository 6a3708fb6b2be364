"""What cannot be traced is refused on a shallow copy of the model, in one line, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import backends.onnx.trace_cache as cache
from backends.onnx.backend import OnnxBackend
from backends.onnx.trace import trace
from backends.onnx.tryout import shallow, untraceable
from calib.network.skeleton import portable_config
from tests.answers import model_refusal
from tests.tiny import CONFIGS, SIZES

DEEP = 12


def deep(name: str, **changes: Any) -> dict[str, Any]:
    """The config of a family with :data:`DEEP` layers, and what it says of each."""
    config = CONFIGS[name]()
    depth = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    each = {"layer_types": None, "no_rope_layers": None}
    return portable_config(type(config)(**config.to_dict() | each | {depth: DEEP} | changes))


@pytest.mark.parametrize("name", CONFIGS)
def test_few_layers_are_left(name: str) -> None:
    found = shallow(deep(name))
    assert found.get("num_hidden_layers", found.get("n_layer")) == 2
    assert found.keys() == deep(name).keys()


def test_every_kind_of_layer_is_left() -> None:
    windows = ["sliding_attention"] * 5 + ["full_attention"]
    found = shallow(deep("gemma3", layer_types=windows * 2))
    assert found["layer_types"] == ["sliding_attention", "full_attention"]
    assert shallow(deep("smollm3", no_rope_layers=[1, 1, 1, 0] * 3))["no_rope_layers"] == [1, 0]
    sparse = shallow(deep("qwen2_moe", decoder_sparse_step=4))  # by their place: up to the first
    assert sparse["num_hidden_layers"] == 4


def test_a_model_of_two_layers_is_tried_as_it_is() -> None:
    config = portable_config(CONFIGS["llama"]())
    assert shallow(config) == config


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A config whose RoPE transformers updates by values, and that is of no type known here."""
    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "dynamic-odd", ROPE_INIT_FUNCTIONS["dynamic"])
    parameters = {"rope_type": "dynamic-odd", "rope_theta": 1e4, "factor": 2.0}
    config = CONFIGS["llama"]().to_dict() | SIZES | {"num_hidden_layers": DEEP}
    return config | {"rope_parameters": parameters}


def test_a_refusal_is_one_line(odd: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    """torch prints 400 lines of the program so far."""
    found = model_refusal(OnnxBackend(), odd, {}, "ort")
    assert found is not None
    assert found.reason.startswith("torch.onnx cannot export 'model.rotary_emb': ")
    assert "\n" not in found.reason
    assert "depends on values" in found.reason
    assert "safetensors" in found.hint
    assert "def forward" not in "".join(capfd.readouterr())


def test_it_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROTQ_CACHE", str(tmp_path))
    calls: list[Any] = []

    def counted(request: Any) -> Any:
        calls.append(request)
        return trace(request)

    monkeypatch.setattr(cache, "trace", counted)
    for _ in range(2):
        assert untraceable(deep("opt-noaffine")) is None
    assert len(calls) == 1
