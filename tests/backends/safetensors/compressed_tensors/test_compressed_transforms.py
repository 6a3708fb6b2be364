"""Online rotations: the stored matrix, what ``transform_config`` says of it, and what the library
makes of both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.safetensors.compressed_tensors.stated_transforms import (
    sylvester,
    transform_contradictions,
)
from backends.safetensors.compressed_tensors.transforms import transform_config, transforms_of
from backends.safetensors.names import Names
from calib.artifact import QuantizedModel
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


Stated = dict[str, Any]
Tensors = dict[str, Tensor]


def _applied(**values: object) -> Callable[[Stated, Tensors], object]:
    return lambda stated, _: stated["config_groups"]["R4"]["apply"][0].update(values)


def _group(**values: object) -> Callable[[Stated, Tensors], object]:
    return lambda stated, _: stated["config_groups"]["R4"].update(values)


def _stored(change: Callable[[Tensor], Tensor]) -> Callable[[Stated, Tensors], object]:
    return lambda _, tensors: tensors.update({_MATRIX: change(tensors[_MATRIX])})


def _one_sign(matrix: Tensor) -> Tensor:
    changed = matrix.clone()
    changed[3, 5] *= -1
    return changed


def _elsewhere(stated: Stated, tensors: Tensors) -> None:
    tensors[_MATRIX.replace("R4", "R5")] = tensors.pop(_MATRIX)


@cache
def rotated(family: str) -> QuantizedModel:
    return artifact(family, "int8", kinds=("r4",), online_block=32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda stated, _: stated.clear(), "'model.layers.0.mlp.down_proj' is not rotated"),
        (_applied(targets=["model.layers.1.mlp.down_proj"]), "layers.0.mlp.down_proj' is not"),
        (_applied(location="output"), "'location' is 'output'"),
        (_applied(inverse=True), "'inverse' is True"),
        (_applied(ignore=["model.layers.1.mlp.down_proj"]), "'ignore' is"),
        (_group(head_dim=16), "'head_dim' is 16 instead of"),
        (_group(type="random-matrix"), "'type' is 'random-matrix'"),
        (_stored(torch.neg), "is not R4"),
        (_stored(_one_sign), "is not R4"),
        (_stored(lambda matrix: matrix / len(matrix) ** 0.5), "is not R4"),
        (_stored(lambda matrix: matrix[:4, :4]), "is not R4"),
        (_elsewhere, "no matrix is stored"),
    ],
)
@pytest.mark.parametrize("family", ["wide", "llama"])
def test_a_wrong_statement_of_a_rotation_is_found(
    family: str, change: Callable[[Stated, Tensors], object], words: str
) -> None:
    """Of either type: Sylvester's matrix, and one that is read from the file."""
    model = rotated(family)
    tensors = tensors_of(model)
    stated = transform_config(transforms_of(model, Names.of(model.config)))
    assert list(transform_contradictions(stated, tensors, model)) == []
    changed = copy.deepcopy(stated)
    change(changed, tensors)
    assert words in " ".join(transform_contradictions(changed, tensors, model))


def test_the_matrix_of_the_kernel_is_the_one_that_is_called_sylvesters() -> None:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    assert torch.equal(sylvester(8), torch.kron(two, torch.kron(two, two)))
