"""The configs of ``tests/tiny.py`` in groups, each of which has a test file of its own, and what is
true of every one of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet

from backends.onnx.backend import OnnxBackend
from calib.architectures import Space, wiring_for
from tests.answers import model_refusal
from tests.backends.onnx.whole import compare, quantized
from tests.rows import EVERY
from tests.tiny import make_tiny, relative_l2, token_rows
from tests.tolerances import WEIGHT_ONLY

ROTARY = (
    "llama",
    "llama-bias-tied-headdim",
    "llama-odd",
    "mistral",
    "qwen2",
    "qwen3",
    "granite",
    "smollm3",
)
"""Llama, with a bias, a window, a norm or a factor more, or RoPE in some layers only."""
PACKED = ("phi3", "phi3-partial-rope", "gemma")
"""Packed linears, gains that are stored less one."""
POST_NORM = ("gemma2", "gemma3", "olmo2")
"""Norms behind linears."""
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
LAYER_NORM = ("gpt_neox", "gpt_neox-serial-nobias", "gpt2", "gpt2-untied-inner")
OPT = ("opt", "opt-nobias", "opt-noaffine")

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


def one_of(names: Iterable[str]) -> list[ParameterSet]:
    """The first of a group; the others are run by the census, for a trace takes seconds."""
    first, *others = names
    return [pytest.param(first), *(pytest.param(name, marks=pytest.mark.census) for name in others)]


def run_here(names: tuple[str, ...]) -> list[ParameterSet]:
    """Those of a group that are not :data:`RUN_ELSEWHERE`, as :func:`one_of` has them."""
    return one_of(name for name in names if name not in RUN_ELSEWHERE)


def check_prefill_and_decoding(name: str, folder: Path) -> None:
    """They compute the torch reference, with the output projection of the first layer in float
    beside that of the second, which is not.
    """
    config = EVERY[name]()
    specs = wiring_for(config).layer_linears(0)
    output = next(spec.name for spec in specs if spec.reads is Space.VALUE)
    model = quantized(config, overrides={output: "float"})
    assert f"{output}.weight" in model.floats
    assert output.replace("0", "1") in model.linears
    assert model_refusal(OnnxBackend(), model.config, model.schemes(), "ort") is None
    assert compare(model, folder).error <= WEIGHT_ONLY


def check_kept_norms(name: str, folder: Path) -> None:
    """The float graph computes what transformers does with the weights of the checkpoint."""
    model = quantized(EVERY[name](), ("r2", "r3", "r4"), "float", fold_norms=False)
    assert compare(model, folder).error <= WEIGHT_ONLY
    ids = torch.stack(token_rows([9, 9], seed=2))
    mask, positions = torch.ones_like(ids), torch.arange(9).expand_as(ids)
    runtime = OnnxBackend().load(folder, "ort", exact=True)
    found, _ = runtime.forward(ids, mask, positions, None)
    with torch.no_grad():
        expected = make_tiny(EVERY[name]()).model(torch.float32)(input_ids=ids).logits
    assert relative_l2(found, expected) <= WEIGHT_ONLY
