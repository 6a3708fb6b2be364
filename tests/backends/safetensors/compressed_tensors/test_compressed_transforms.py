"""Online rotations: the stored matrix, what ``transform_config`` says of it, and what the library
makes of both.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.safetensors.compressed_tensors import runner
from calib.errors import BackendError
from calib.measure.reference import build_reference
from tests.backends.safetensors.compressed_tensors.compressed_support import (
    artifact,
    logits,
    quantization_config,
    tensors_of,
    written,
)
from tests.tiny import relative_l2, token_rows
from tests.tolerances import WEIGHT_ONLY

library: Any = pytest.importorskip(
    "compressed_tensors.transform", reason="compressed-tensors is not installed"
)
_MATRIX = "model.layers.0.mlp.down_proj.R4_input.weight"
_ROWS = token_rows((12, 9))


def test_fused_rotations_need_no_transform(tmp_path: Path) -> None:
    folder = written(artifact("llama", "int8", kinds=("r1", "r2")), tmp_path / "bundle")
    assert quantization_config(folder)["transform_config"] == {}


@pytest.mark.parametrize("family", ["llama", "llama-odd"])
def test_one_matrix_for_all_layers_is_stored_unnormalised(family: str) -> None:
    """88 channels have a Hadamard matrix, ±1; 99 have none, and get 33 blocks of order 3 … of what
    divides them.
    """
    model = artifact(family, "int8-weight-only", kinds=("r4",))
    tensors = tensors_of(model)
    assert [key for key in tensors if "R4" in key] == [_MATRIX]
    matrix, rotation = tensors[_MATRIX], model.rotations["R4.1"]
    assert matrix.dtype == model.dtype
    assert torch.allclose(
        matrix.double() / math.sqrt(len(matrix)), rotation.dense(), rtol=1e-7, atol=0
    )
    if family == "llama":
        assert matrix.abs().unique().tolist() == [1.0]


@pytest.mark.parametrize("scheme", ["int8-weight-only", "float"])
def test_the_library_rotates_as_rotq_does(scheme: str, tmp_path: Path) -> None:
    """transformers passes over ``transform_config``; the library's own function applies it to the
    model it loaded.
    """
    import transformers

    model = artifact(
        "llama", scheme, kinds=("r1", "r2", "r4"), kv="float8" if scheme == "float" else None
    )
    folder = written(model, tmp_path / "bundle")
    config = library.TransformConfig.model_validate(quantization_config(folder)["transform_config"])
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    unrotated = logits(network, _ROWS)
    library.apply_transform_config(network, config)
    module = network.get_submodule(_MATRIX.removesuffix(".weight"))
    module.weight.data.copy_(tensors_of(model)[_MATRIX])
    expected = logits(build_reference(model), _ROWS)
    assert relative_l2(logits(network, _ROWS), expected) <= WEIGHT_ONLY
    assert relative_l2(unrotated, expected) > 0.1


def test_r3_is_left_out_where_nothing_is_cached_in_integers(tmp_path: Path) -> None:
    """``(q R3) (k R3)^T = q k^T``: that the logits stay is among the tests of transformers."""
    model = artifact("llama", "int8", kinds=("r3",))
    assert "r3" in model.rotations.kinds()
    assert quantization_config(written(model, tmp_path / "bundle"))["transform_config"] == {}
    assert not [key for key in tensors_of(model) if "R3" in key]


@pytest.mark.parametrize(
    ("family", "controls", "words"),
    [
        ("llama", {"kinds": ("r3",), "kv": "float8"}, "R3 with a quantized KV cache"),
        ("mixtral", {"kinds": ("r4",)}, "R4 before the experts"),
        ("gpt2", {"kinds": ("r4",)}, "which has a bias"),
    ],
)
def test_what_no_reader_applies_is_refused(
    family: str, controls: dict[str, Any], words: str
) -> None:
    with pytest.raises(BackendError, match=words) as found:
        tensors_of(artifact(family, "int8", **controls))
    assert found.value.hint


def test_a_bundle_with_r4_is_not_left_to_transformers(tmp_path: Path) -> None:
    folder = written(artifact("llama", "int8", kinds=("r4",)), tmp_path / "bundle")
    with pytest.raises(runner.RuntimeMissing, match="passes over transform_config"):
        runner.load(folder, exact=False)
