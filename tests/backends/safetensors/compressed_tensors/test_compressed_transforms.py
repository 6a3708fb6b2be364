"""Online rotations: the stored matrix, what ``transform_config`` says of it, and what the library
makes of both.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

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
    folder = written(model, tmp_path / "bundle", "vllm")
    config = library.TransformConfig.model_validate(quantization_config(folder)["transform_config"])
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    unrotated = logits(network, _ROWS)
    library.apply_transform_config(network, config)
    module = network.get_submodule(_MATRIX.removesuffix(".weight"))
    module.weight.data.copy_(tensors_of(model)[_MATRIX])
    expected = logits(build_reference(model), _ROWS)
    assert relative_l2(logits(network, _ROWS), expected) <= WEIGHT_ONLY
    assert relative_l2(unrotated, expected) > 0.1


@pytest.mark.parametrize(
    ("family", "block", "kind"), [("wide", 32, "hadamard"), ("llama", 8, "random-hadamard")]
)
def test_blocks_are_sylvesters_matrix_where_there_is_a_kernel(
    family: str, block: int, kind: str, tmp_path: Path
) -> None:
    """64 channels in blocks of 32; of 88 no power of two above 8 divides. The library makes the
    matrix itself where it is called ``hadamard``.
    """
    import transformers

    model = artifact(family, "int8", kinds=("r1", "r4"), online_block=32)
    rotation = model.rotations["R4.0"]
    assert rotation.block == block
    folder = written(model, tmp_path / "bundle", "vllm")
    config = library.TransformConfig.model_validate(quantization_config(folder)["transform_config"])
    (scheme,) = config.config_groups.values()
    assert (scheme.type, scheme.head_dim) == (kind, block)
    matrix = tensors_of(model)[_MATRIX]
    assert matrix.shape == (block, block)
    whole = torch.block_diag(
        *[matrix.double() / math.sqrt(block)] * (rotation.dense().shape[0] // block)
    )
    assert torch.allclose(whole, rotation.dense(), rtol=1e-7, atol=0)

    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    library.apply_transform_config(network, config)
    module = network.get_submodule(_MATRIX.removesuffix(".weight"))
    if kind == "hadamard":
        assert torch.equal(module.weight.data.to(matrix), matrix)
    module.weight.data.copy_(matrix)
    found = logits(network, _ROWS)
    assert relative_l2(found, logits(build_reference(model), _ROWS)) <= WEIGHT_ONLY


@pytest.mark.parametrize(
    ("family", "controls", "words"),
    [
        ("llama", {"kinds": ("r3",)}, "applies no rotation of queries"),
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


@pytest.mark.parametrize("target", ["transformers", "compressed-tensors"])
def test_it_is_not_written_for_who_would_pass_over_it(target: str, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="passes over rotations while running") as found:
        written(artifact("llama", "int8", kinds=("r4",)), tmp_path / "bundle", target)
    assert found.value.hint
