"""Every family of the architecture table becomes a graph that computes the torch reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from backends.onnx.backend import OnnxBackend
from backends.onnx.experts import ACTIVATIONS
from backends.onnx.refusals import graph_refusal
from calib.architectures import Space, wiring_for
from calib.network.skeleton import portable_config
from tests.answers import model_refusal
from tests.backends.onnx.conftest import CASES
from tests.backends.onnx.whole import compare, quantized
from tests.tiny import CONFIGS, make_tiny, relative_l2, token_rows
from tests.tolerances import FLIPS, WEIGHT_ONLY

RUN_ELSEWHERE = {
    "llama",
    "llama-bias-tied-headdim",
    "llama-odd",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "opt",
}
"""Configs that the cases of ``conftest.py`` run in every way; a trace takes seconds."""


def test_the_others_are_run_elsewhere() -> None:
    configs = {
        json.dumps(portable_config(CONFIGS[name]()), sort_keys=True) for name in RUN_ELSEWHERE
    }
    assert configs <= {
        json.dumps(portable_config(case[0]()), sort_keys=True) for case in CASES.values()
    }


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in RUN_ELSEWHERE])
def test_prefill_and_decoding_are_the_reference(name: str, tmp_path: Path) -> None:
    """With the output projection of the first layer in float beside that of the second, which is
    not.
    """
    config = CONFIGS[name]()
    specs = wiring_for(config).layer_linears(0)
    output = next(spec.name for spec in specs if spec.reads is Space.VALUE)
    model = quantized(config, overrides={output: "float"})
    assert f"{output}.weight" in model.floats
    assert output.replace("0", "1") in model.linears
    assert model_refusal(OnnxBackend(), model.config, model.schemes(), "ort") is None
    assert compare(model, tmp_path).error <= WEIGHT_ONLY


@pytest.mark.parametrize("name", list(CONFIGS))
def test_kept_norms_are_those_of_the_original(name: str, tmp_path: Path) -> None:
    """The float graph computes what transformers does with the weights of the checkpoint."""
    model = quantized(CONFIGS[name](), ("r2", "r3", "r4"), "float", fold_norms=False)
    assert compare(model, tmp_path).error <= WEIGHT_ONLY
    ids = torch.stack(token_rows([9, 9], seed=2))
    mask, positions = torch.ones_like(ids), torch.arange(9).expand_as(ids)
    runtime = OnnxBackend().load(tmp_path, "ort", exact=True)
    found, _ = runtime.forward(ids, mask, positions, None)
    with torch.no_grad():
        expected = make_tiny(CONFIGS[name]()).model(torch.float32)(input_ids=ids).logits
    assert relative_l2(found, expected) <= WEIGHT_ONLY


@pytest.mark.parametrize(
    ("scheme", "overrides"),
    [
        ("int8-weight-only", {"*.attn.c_attn": "float"}),
        ("int8", {"*.mlp.c_fc": "float"}),
        ("int4-weight-only", {"*.mlp.c_proj": "float"}),
        ("float", {}),
    ],
    ids=["c_attn", "c_fc", "c_proj", "all"],
)
def test_any_linear_of_gpt2_in_float_is_the_reference(
    scheme: str, overrides: dict[str, str], tmp_path: Path
) -> None:
    """They are transposed in checkpoints, and not square."""
    model = quantized(CONFIGS["gpt2"](), scheme=scheme, overrides=overrides)
    assert compare(model, tmp_path).error <= (FLIPS if scheme == "int8" else WEIGHT_ONLY)


def test_experts_with_an_unknown_activation_are_refused_with_what_is_known() -> None:
    config = portable_config(CONFIGS["mixtral"]())
    assert graph_refusal(config, {}) is None
    refusal = graph_refusal(config | {"hidden_act": "mish"}, {})
    assert refusal is not None
    assert "'mish'" in refusal.reason
    assert all(name in refusal.hint for name in ACTIVATIONS)
    assert graph_refusal(portable_config(CONFIGS["llama"]()) | {"hidden_act": "mish"}, {}) is None
