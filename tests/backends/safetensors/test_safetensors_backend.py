"""What the safetensors backend adds to its targets."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.base import Request, WriteOptions
from backends.registry import available, get_backend
from backends.safetensors.backend import SafetensorsBackend
from backends.safetensors.targets import TARGETS
from backends.testing import tiny_model
from calib.errors import BackendError
from calib.schemes import LINEAR_SCHEMES, SCHEMES
from tests.answers import linear_refusal


def test_it_is_found_through_its_entry_point() -> None:
    assert isinstance(get_backend("safetensors"), SafetensorsBackend)
    info = {entry.name: entry for entry in available()}["safetensors"]
    assert info.error is None
    assert set(info.rotation_warnings["vllm"]) == {"r4"}
    assert not any(warned for target, warned in info.rotation_warnings.items() if target != "vllm")
    assert info.targets == (
        "tripy",
        "tensorrt",
        "modelopt",
        "vllm",
        "transformers",
        "compressed-tensors",
    )


def test_every_target_is_a_layout_of_its_name() -> None:
    for name, target in TARGETS.items():
        assert target.layout().target == name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("compressed_tensors", reason="writing for this target needs it")
    folder = tmp_path_factory.mktemp("bundle")
    model = tiny_model("llama", SCHEMES["int8-weight-only"])
    SafetensorsBackend().write(model, folder, WriteOptions("compressed-tensors"))
    return folder


def test_a_bundle_is_opened_for_its_own_target_only(folder: Path) -> None:
    with pytest.raises(
        BackendError, match="written for target 'compressed-tensors', not for 'tripy'"
    ) as caught:
        SafetensorsBackend().read_linears(folder, "tripy")
    assert "--from-artifact" in str(caught.value.hint)


def test_a_library_of_the_targets_own_is_preferred(folder: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="it is what loads the bundle")
    model = SafetensorsBackend().load(folder, "compressed-tensors", exact=True)
    assert model.runtime.startswith("transformers")


def test_what_is_computed_is_no_business_of_a_bundle() -> None:
    backend = SafetensorsBackend()
    for target in backend.targets:
        request = Request(target, logits="last", kv_buffer="shared")
        reasons = backend.refusals(request)
        assert [reason.name for reason in reasons] == ["logits", "kv_buffer"]
        assert all("whoever loads it" in reason.reason for reason in reasons)


def test_every_preset_has_a_target() -> None:
    backend = SafetensorsBackend()
    for name, linear in LINEAR_SCHEMES.items():
        assert any(linear_refusal(backend, linear, target) is None for target in backend.targets), (
            name
        )
