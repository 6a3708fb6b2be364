"""config.json says the same to transformers 4, which looks for other keys, and to 5.

That 4.57 computes the very same frequencies from it was tried for every family here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from calib.artifact.older_config import with_older_keys
from calib.artifact.side_files import copy_side_files
from calib.network.skeleton import portable_config
from tests.tiny import CONFIGS, SIZES

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LAYERS = SIZES | {"num_hidden_layers": 12, "num_attention_heads": 4}
GEMMA3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e6},
}


def _llama(**rope: Any) -> Any:
    return transformers.LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e5, **rope})


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "theta": (
        lambda: _llama(rope_type="default"),
        {"rope_theta": 1e5, "rope_scaling": None},
    ),
    "llama3": (lambda: _llama(**LLAMA3), {"rope_theta": 1e5, "rope_scaling": LLAMA3}),
    "longrope": (
        lambda: transformers.Phi3Config(
            **SIZES,
            original_max_position_embeddings=32,
            rope_parameters={"rope_theta": 1e4, "rope_type": "longrope", **LONG},
        ),
        {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", **LONG}},
    ),
    "partial": (
        CONFIGS["phi3-partial-rope"],
        {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.5},
    ),
    "gpt_neox": (CONFIGS["gpt_neox"], {"rotary_emb_base": 1e4, "rotary_pct": 0.25}),
    "gemma3": (
        lambda: transformers.Gemma3TextConfig(**LAYERS, head_dim=16, rope_parameters=GEMMA3),
        {
            "rope_theta": 3e6,
            "rope_local_base_freq": 2e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 6,
        },
    ),
}


def _written(config: Any) -> dict[str, Any]:
    text = json.dumps(with_older_keys(portable_config(config)))
    written: dict[str, Any] = json.loads(text)
    return written


@pytest.mark.parametrize(("config", "keys"), CASES.values(), ids=CASES)
def test_keys_of_transformers_4(config: Callable[[], Any], keys: dict[str, Any]) -> None:
    written = _written(config())
    assert {key: written[key] for key in keys} == keys


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_transformers_5_reads_what_it_did(config: Callable[[], Any]) -> None:
    made = config()
    made.dtype = "float16"
    values = _written(made)
    assert values["torch_dtype"] == values["dtype"] == "float16"
    read = transformers.AutoConfig.for_model(**values)
    before, after = made.to_dict(), read.to_dict()
    assert {key: after.get(key) for key in before} == before


def test_a_pattern_that_the_layers_do_not_follow_is_left_out() -> None:
    config = transformers.Gemma3TextConfig(
        **LAYERS, head_dim=16, layer_types=["full_attention"] * 12
    )
    assert "sliding_window_pattern" not in _written(config)


def test_the_tokenizer_class_has_its_name_of_transformers_4(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"eos_token": "</s>", "tokenizer_class": "TokenizersBackend"}')
    (tmp_path / "out").mkdir()
    copy_side_files({path.name: path}, tmp_path / "out")
    copied = (tmp_path / "out" / path.name).read_text()
    assert copied == '{"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}'
