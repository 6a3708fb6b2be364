"""What does not fit is said at once, all of it, and the module that was to be filled is as it
was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import backends
from backends.base import WriteOptions
from backends.safetensors.bundle import write_bundle
from backends.safetensors.file_names import MANIFEST_FILE
from backends.safetensors.tensorrt.layout import TensorRTLayout
from backends.safetensors.tripy.loader import fill
from calib.errors import BackendError
from calib.files.sealed import seal_of
from tests.backends.safetensors.tripy.bundles import quantized, write

pytestmark = pytest.mark.runtimes
SCHEME = "int8-weight-only"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(quantized("llama", SCHEME, ()), tmp_path_factory.mktemp("tripy") / "b")


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def module(tp: Any, written: Path) -> Any:
    """A filled module, so that a parameter that is lost would be seen. It serves all tests: none
    may change it.
    """
    build = import_module("backends.safetensors.tripy.modules.build")
    return backends.load_bundle(build.module_for_bundle(written), written)


def refused(module: Any, load: Callable[[], Any]) -> str:
    before = module.state_dict()
    with pytest.raises(BackendError) as caught:
        load()
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] for key in before)
    assert caught.value.hint
    return str(caught.value)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / MANIFEST_FILE
    values = json.loads(path.read_text(encoding="utf-8"))
    values.pop("sha256")
    change(values)
    values["sha256"] = seal_of(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def test_a_truncated_file(module: Any, copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors has" in refused(module, lambda: backends.load_bundle(module, copied))


def test_a_flipped_byte(module: Any, copied: Path) -> None:
    weights = copied / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert "checksum" in refused(module, lambda: backends.load_bundle(module, copied))


def test_a_version_from_the_future(module: Any, copied: Path) -> None:
    edit_manifest(copied, lambda values: values.update(format_version=99))
    assert "format version 99" in refused(module, lambda: backends.load_bundle(module, copied))


def test_a_bundle_for_another_target(module: Any, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write_bundle(
        quantized("llama", SCHEME, ()), TensorRTLayout(), tmp_path / "b", WriteOptions("tensorrt")
    )
    message = refused(module, lambda: backends.load_bundle(module, tmp_path / "b"))
    assert "written for target 'tensorrt'" in message


def test_no_bundle_at_all(module: Any, tmp_path: Path) -> None:
    assert MANIFEST_FILE in refused(module, lambda: backends.load_bundle(module, str(tmp_path)))


def test_a_bundle_for_another_architecture(module: Any, tmp_path: Path) -> None:
    folder = write(quantized("gpt2", SCHEME, ()), tmp_path / "b")
    message = refused(module, lambda: backends.load_bundle(module, folder))
    assert "'gpt2' model does not fit the Llama module" in message
    assert "missing: lm_head" not in message  # both have one
    assert "model.embed_tokens.weight" in message
    assert "transformer.wte.weight" in message


def test_a_bundle_for_another_size(module: Any, tmp_path: Path) -> None:
    folder = write(quantized("llama-odd", SCHEME, ()), tmp_path / "b")
    message = refused(module, lambda: backends.load_bundle(module, folder))
    assert "model.embed_tokens.weight" in message
    assert "shape [97, 45] instead of [97, 48]" in message
    assert "shape [99, 45] instead of [88, 48]" in message


def test_a_bundle_in_another_dtype(module: Any, tmp_path: Path) -> None:
    folder = write(quantized("llama", SCHEME, (), torch.float16), tmp_path / "b")
    assert "dtype float16 instead of float32" in refused(
        module, lambda: backends.load_bundle(module, folder)
    )


def test_another_quantization_that_shapes_do_not_show(tp: Any, tmp_path: Path) -> None:
    build = import_module("backends.safetensors.tripy.modules.build")
    folder = write(quantized("qwen2", "int8", ()), tmp_path / "b")
    module = build.module_for_bundle(folder)
    module.model.layers[1].mlp.up_proj = tp.Linear(
        48, 88, bias=False, quant_dtype=tp.float8, weight_quant_dim=0
    )
    message = refused(module, lambda: backends.load_bundle(module, folder))
    assert message.endswith("quantized as float8 instead of int8: model.layers.1.mlp.up_proj")


def test_everything_that_does_not_fit_is_named_at_once(module: Any, written: Path) -> None:
    tensors = load_file(written / "model.safetensors")
    described = json.loads((written / MANIFEST_FILE).read_text(encoding="utf-8"))["linears"]
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    tensors["model.layers.0.self_attn.rotary"] = torch.zeros(1)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].half()
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"][:, None]
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].T
    message = refused(module, lambda: fill(module, tensors, described, "this"))
    assert "missing: model.layers.1.mlp.up_proj.weight_scale, model.norm.weight" in message
    assert "unexpected: model.layers.0.self_attn.rotary" in message
    assert "dtype float16 instead of float32: model.embed_tokens.weight" in message
    assert f"rank 2 [88, 1] instead of 1 [88]: {UP}.weight_scale" in message
    assert f"shape [48, 88] instead of [88, 48]: {UP}.weight" in message


def test_a_scale_of_the_input_has_rank_zero(tp: Any, tmp_path: Path) -> None:
    build = import_module("backends.safetensors.tripy.modules.build")
    folder = write(quantized("llama", "float8", ()), tmp_path / "b")
    module = build.module_for_bundle(folder)
    tensors = load_file(folder / "model.safetensors")
    for part in ("input_scale", "weight_scale"):
        tensors[f"{UP}.{part}"] = tensors[f"{UP}.{part}"].reshape(1)
    described = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["linears"]
    message = refused(module, lambda: fill(module, tensors, described, "this"))
    assert f"rank 1 [1] instead of 0 []: {UP}.input_scale, {UP}.weight_scale" in message


def test_a_static_input_needs_its_scale(tp: Any, tmp_path: Path) -> None:
    """Tripy takes it as optional, and would leave the input in float without a word."""
    build = import_module("backends.safetensors.tripy.modules.build")
    folder = write(quantized("llama", "int8", ()), tmp_path / "b")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{UP}.input_scale"]
    described = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["linears"]
    module = build.module_for_bundle(folder)
    assert f"missing: {UP}.input_scale" in refused(
        module, lambda: fill(module, tensors, described, "this")
    )


def test_a_damaged_manifest_is_not_believed(module: Any, copied: Path) -> None:
    edit_manifest(copied, lambda values: values["tensors"].pop("model.norm.weight"))
    error = refused(module, lambda: backends.load_bundle(module, copied))
    assert "'model.norm.weight' is in 'model.safetensors', by its manifest in 'None'" in error


def test_a_key_that_the_file_lost(module: Any, copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copied / "model.safetensors")
    assert "model.safetensors has" in refused(module, lambda: backends.load_bundle(module, copied))


def test_filling_again_gives_the_new_weights(tp: Any, tmp_path: Path) -> None:
    build = import_module("backends.safetensors.tripy.modules.build")
    first, second = (quantized("qwen2", "float8", kinds) for kinds in ((), ("r1", "r2")))
    folders = [write(first, tmp_path / "first"), write(second, tmp_path / "second")]
    module = build.module_for_bundle(folders[0])
    for folder in (*folders, folders[1], folders[0]):
        backends.load_bundle(module, folder)
        held = module.state_dict()
        for key, expected in load_file(folder / "model.safetensors").items():
            assert torch.equal(torch.from_dlpack(held[key]), expected), key


def test_a_second_bundle_that_lacks_a_bias_does_not_fit(tp: Any, tmp_path: Path) -> None:
    build = import_module("backends.safetensors.tripy.modules.build")
    qwen2 = write(quantized("qwen2", SCHEME, ()), tmp_path / "qwen2")
    module = backends.load_bundle(build.module_for_bundle(qwen2), qwen2)
    llama = write(quantized("llama", SCHEME, ()), tmp_path / "llama")
    message = refused(module, lambda: backends.load_bundle(module, llama))
    assert "missing: model.layers.{0-1}.self_attn.k_proj.bias" in message


def test_only_tripy_modules_are_filled(tp: Any, written: Path) -> None:
    for other in (torch.nn.Linear(2, 2), None):
        with pytest.raises(BackendError, match=f"this is a '{type(other).__name__}'"):
            backends.load_bundle(other, written)


def test_a_parameter_in_a_quantized_dtype_is_named(tp: Any, written: Path) -> None:
    from nvtripy.frontend.module.parameter import DefaultParameter

    class Holder(tp.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = tp.Module()
            self.model.norm = tp.Module()
            self.model.norm.weight = DefaultParameter((48,), tp.float8)

    message = refused(holder := Holder(), lambda: backends.load_bundle(holder, written))
    assert "dtype float32 instead of float8_e4m3fn: model.norm.weight" in message
