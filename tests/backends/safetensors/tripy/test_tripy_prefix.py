"""A prefix in Tripy modules: the numbers of the reference with it, and no module that loses it."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import backends
from backends.safetensors.read import open_bundle
from calib.architectures import Kind
from calib.errors import BackendError
from calib.measure.reference import build_reference
from tests.backends.safetensors.tripy.bundles import quantized, reference_logits, token_ids, write
from tests.backends.safetensors.tripy.conftest import Run
from tests.tiny import CONFIGS, relative_l2
from tests.tolerances import FLIPS, NAIVE, WEIGHT_ONLY

pytestmark = pytest.mark.runtimes
TOKENS = (5, 7, 11)
SCHEME = "int8-weight-only"
ONLINE: tuple[Kind, ...] = ("r1", "r2", "r3", "r4")
CASES: list[tuple[str, str, tuple[Kind, ...]]] = [
    ("llama", SCHEME, ONLINE),  # its keys are the artifact's without R3
    ("llama", "int8", ONLINE),
    ("llama-bias-tied-headdim", SCHEME, ("r1", "r2")),
    ("mistral", SCHEME, ()),  # its window is shorter than a row
    ("qwen2", "int4-weight-only", ONLINE),
    ("gpt2", SCHEME, ("r1", "r2")),
    ("gpt2", "float8", ()),
]


@pytest.fixture
def build(tp: Any) -> Any:
    """The module with ``module_for_bundle`` and ``module_for_config``; it imports nvtripy."""
    return import_module("backends.safetensors.tripy.modules.build")


@pytest.mark.parametrize(("family", "scheme", "kinds"), CASES)
def test_a_filled_module_computes_the_model_behind_its_prefix(
    family: str, scheme: str, kinds: tuple[Kind, ...], build: Any, run: Run, tmp_path: Path
) -> None:
    model = quantized(family, scheme, kinds, prefix=TOKENS)
    folder = write(model, tmp_path / "b")
    module = build.module_for_bundle(folder)
    places = set(module.state_dict()) - set(open_bundle(folder).manifest.tensors)
    assert len(places) == 2 * len(model.prefix.keys)
    assert all(key.endswith((".prefix.key", ".prefix.value")) for key in places)

    backends.load_bundle(module, folder)
    ids = token_ids()
    expected = reference_logits(model, ids)
    bound = WEIGHT_ONLY if scheme.endswith("weight-only") else FLIPS
    assert relative_l2(run(module, ids), expected) <= bound
    # the bound tells it from a module that forgot the prefix
    assert relative_l2(reference_logits(replace(model, prefix=None), ids), expected) > 2 * bound


def test_in_sixteen_bits(build: Any, run: Run, tmp_path: Path) -> None:
    model = quantized("llama", SCHEME, ("r1", "r3", "r4"), torch.float16, TOKENS)
    folder = write(model, tmp_path / "b")
    module = backends.load_bundle(build.module_for_bundle(folder), folder)
    ids = token_ids()
    reference = reference_logits(model, ids)
    naive: Any = build_reference(model, dtype=torch.float16)
    bound = NAIVE * relative_l2(naive(ids).logits.float(), reference)
    assert relative_l2(run(module, ids), reference) <= bound


def test_a_module_from_a_config_has_a_place_where_it_is_asked_for(
    build: Any, tp: Any, tmp_path: Path
) -> None:
    folder = write(quantized("llama", SCHEME, (), prefix=TOKENS), tmp_path / "b")

    def module(tokens: int) -> Any:
        config = CONFIGS["llama"]().to_dict()
        return build.module_for_config(config, tp.float32, SCHEME, prefix=tokens)

    backends.load_bundle(module(3), folder)
    with pytest.raises(BackendError, match=r"shape \[\d+, 3, \d+\] instead of \[\d+, 2, \d+\]"):
        backends.load_bundle(module(2), folder)


def test_a_module_without_a_place_is_refused_and_left_as_it_was(build: Any, tmp_path: Path) -> None:
    plain = write(quantized("llama", SCHEME, ()), tmp_path / "plain")
    module = backends.load_bundle(build.module_for_bundle(plain), plain)
    before = module.state_dict()
    folder = write(quantized("llama", SCHEME, (), prefix=TOKENS), tmp_path / "b")
    with pytest.raises(BackendError, match=r"has a prefix of 3 tokens, and the Llama module has"):
        backends.load_bundle(module, folder)
    after = module.state_dict()
    assert all(before[key] is after[key] for key in before)


def test_the_prefix_of_another_bundle_does_not_stay(build: Any, tmp_path: Path) -> None:
    folder = write(quantized("llama", SCHEME, (), prefix=TOKENS), tmp_path / "b")
    module = backends.load_bundle(build.module_for_bundle(folder), folder)
    plain = write(quantized("llama", SCHEME, ()), tmp_path / "plain")
    with pytest.raises(
        BackendError, match=r"missing: model\.layers\.\{0-1\}\.self_attn\.prefix\.key"
    ):
        backends.load_bundle(module, plain)
