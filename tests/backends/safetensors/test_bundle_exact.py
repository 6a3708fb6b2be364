"""Every target with every scheme that it expresses and every kind of model: the bundle is the
artifact, bit for bit.

The golden lists say which keys a target gets, with their dtypes and shapes; ``pytest
--regenerate-golden`` writes them anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.base import WriteOptions
from backends.safetensors.backend import SafetensorsBackend
from backends.safetensors.manifest import Manifest
from backends.safetensors.read import open_bundle, read_model
from backends.safetensors.targets import TARGETS
from backends.testing import FAMILIES, tiny_model
from calib.artifact import QuantizedLinear, QuantizedModel
from calib.schemes import LINEAR_SCHEMES, SCHEMES
from tests.answers import linear_refusal, model_refusal
from tests.tiny import fuse_tiny, make_tiny, quantize_fused

GOLDEN = Path(__file__).parent / "golden_keys"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NEEDS = {"transformers": "compressed_tensors"}
"""Packages that writing for a target needs."""
SAME_AS_TRANSFORMERS = ("vllm", "compressed-tensors")
"""Targets of one layout: that they are is among the tests of compressed-tensors."""
MODES = [
    (target, scheme, family, dtype)
    for target in TARGETS
    if target not in SAME_AS_TRANSFORMERS
    for scheme in LINEAR_SCHEMES
    if linear_refusal(SafetensorsBackend(), LINEAR_SCHEMES[scheme], target) is None
    for family in FAMILIES
    if model_refusal(
        SafetensorsBackend(), FAMILIES[family]().to_dict(), {"a": LINEAR_SCHEMES[scheme]}, target
    )
    is None
    for dtype in DTYPES
    # a dtype is handled in one place, whatever the family
    if dtype == "bfloat16" or family == "llama"
]


@dataclasses.dataclass(frozen=True)
class Case:
    model: QuantizedModel
    folder: Path
    target: str

    def read(self) -> QuantizedModel:
        return read_model(
            open_bundle(self.folder, target=self.target, verify=True), TARGETS[self.target].layout()
        )


def parametrised(modes: list[tuple[str, ...]]) -> list[Any]:
    """As parameters of tests, skipped where the target's package is missing."""
    absent = {target for target, package in NEEDS.items() if find_spec(package) is None}
    skip = [
        pytest.mark.skip(reason="writing for this target needs a package that is not installed")
    ]
    return [
        pytest.param(mode, id="-".join(mode), marks=skip if mode[0] in absent else [])
        for mode in modes
    ]


@pytest.fixture(params=parametrised(MODES))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    target, scheme, family, dtype = request.param
    model = tiny_model(family, SCHEMES[scheme], rotate=("r1", "r2"), dtype=DTYPES[dtype])
    SafetensorsBackend().write(model, tmp_path, WriteOptions(target))
    return Case(model, tmp_path, target)


def cast_like(linear: QuantizedLinear, found: QuantizedLinear) -> QuantizedLinear:
    """``linear`` with its scales in the dtypes that the target has them in."""

    def cast(tensor: Tensor | None, like: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or like is None else tensor.to(like.dtype)

    scale = cast(linear.weight_scale, found.weight_scale)
    assert scale is not None
    return dataclasses.replace(linear, weight_scale=scale)


def as_stored(second: Tensor | None, target: str) -> Tensor | None:
    """A second-level scale after the target's form of it: compressed-tensors stores the inverse, in
    float32.
    """
    return (
        second if second is None or target != "transformers" else second.reciprocal().reciprocal()
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", parametrised([(target,) for target in TARGETS]))
def test_norms_that_were_kept_are_in_the_bundle(
    target: tuple[str], family: str, tmp_path: Path
) -> None:
    tiny = make_tiny(FAMILIES[family]())
    model = quantize_fused(fuse_tiny(tiny, dtype=torch.bfloat16, fold_norms=False), "int8")
    backend = SafetensorsBackend()
    if model_refusal(backend, model.config, model.schemes(), target[0]) is not None:
        pytest.skip("the target has no place for this model")
    backend.write(model, tmp_path, WriteOptions(target[0]))
    found = Case(model, tmp_path, target[0]).read().floats
    kept = [key for name in tiny.wiring.norm_names for key in (f"{name}.weight", f"{name}.bias")]
    for key in kept:
        if key in tiny.state:
            assert torch.equal(found[key], tiny.state[key].bfloat16()), key


def test_a_bundle_is_the_artifact_to_the_last_bit(case: Case) -> None:
    found = case.read()
    assert list(found.linears) == list(case.model.linears)
    for name, linear in case.model.linears.items():
        back = found.linears[name]
        # Scales lose nothing by the cast: a target's dtype for them is at least as wide as the
        # artifact's.
        assert torch.finfo(back.weight_scale.dtype).bits >= torch.finfo(
            linear.weight_scale.dtype
        ).bits or (back.weight_scale.double().equal(linear.weight_scale.double())), name
        second = as_stored(linear.weight_second_scale, case.target)
        expected = dataclasses.replace(cast_like(linear, back), weight_second_scale=second)
        assert torch.equal(back.values(), expected.values()), name
        assert back.description() == linear.description(), name
        for part in ("bias", "input_scale", "weight_order"):
            mine, theirs = getattr(linear, part), getattr(back, part)
            if part == "input_scale" and linear.weight_second_scale is not None:
                mine = as_stored(mine, case.target)
            assert (mine is None) == (theirs is None), (name, part)
            if mine is not None:
                assert torch.equal(mine.double(), theirs.double()), (name, part)
    assert found.floats.keys() == case.model.floats.keys()
    for key, tensor in case.model.floats.items():
        assert found.floats[key].dtype == tensor.dtype, key
        assert torch.equal(found.floats[key], tensor), key


def test_what_is_read_back_is_written_as_the_same_bytes(
    case: Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    again = tmp_path_factory.mktemp("again")
    SafetensorsBackend().write(case.read(), again, WriteOptions(case.target))
    first, second = Manifest.load(case.folder), Manifest.load(again)
    assert second.tensors == first.tensors
    weights = {entry.file for entry in first.tensors.values()}
    assert {name: second.files[name] for name in weights} == {
        name: first.files[name] for name in weights
    }


def lines(manifest: Manifest) -> Iterator[str]:
    for key, entry in manifest.tensors.items():
        yield f"{key}  {entry.kind}  {entry.dtype}  {entry.shape}"


GOLDEN_MODES = [mode[:3] for mode in MODES if mode[3] == "bfloat16"]


@pytest.mark.parametrize("mode", parametrised(GOLDEN_MODES))
def test_keys_are_the_golden_ones(
    mode: tuple[str, str, str], tmp_path: Path, regenerate_golden: bool
) -> None:
    target, scheme, family = mode
    model = tiny_model(family, SCHEMES[scheme], rotate=("r1", "r2"), dtype=torch.bfloat16)
    SafetensorsBackend().write(model, tmp_path, WriteOptions(target))
    text = "\n".join(lines(Manifest.load(tmp_path))) + "\n"
    path = GOLDEN / f"{target}-{scheme}-{family}.txt"
    if regenerate_golden:
        path.write_text(text)
    assert text == path.read_text(), (
        "keys changed; if they should have, run pytest --regenerate-golden"
    )


def test_every_golden_list_belongs_to_something() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {"-".join(mode) for mode in GOLDEN_MODES}
