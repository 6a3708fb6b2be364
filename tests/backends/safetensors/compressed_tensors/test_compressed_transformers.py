"""Bundles reloaded by ``transformers.AutoModelForCausalLM``: the logits are those of the
fake-quantized model.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.base import RuntimeMissing
from backends.safetensors.backend import SafetensorsBackend
from backends.safetensors.compressed_tensors.layout import TransformersLayout
from backends.safetensors.compressed_tensors.runner import TransformersModel
from backends.safetensors.names import Names
from backends.safetensors.read import open_bundle, read_model
from calib.arithmetic.grids import round_to_grid
from calib.artifact import QuantizedModel
from calib.measure.floor import split_sum_floor
from calib.measure.reference import ReferenceLinear, build_reference
from calib.schemes import FLOAT4, SCHEMES
from tests.backends.safetensors.compressed_tensors.compressed_support import (
    FIXED_BLOCKS,
    artifact,
    logits,
    opened,
    tensors_of,
    with_maxbound,
    written,
)
from tests.tiny import relative_l2, token_rows
from tests.tolerances import WEIGHT_ONLY

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
_EXACT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int8": ("llama", "int8", {}),
    "int8-biases": ("qwen2", "int8", {}),
    "int8-zero-points": (
        "llama",
        "int8",
        {"weight_symmetric": False, "activation_symmetric": False},
    ),
    "int8-blocks": ("llama", "int8", {"block_size": 8}),
    "int8-weight-only": ("qwen2", "int8-weight-only", {}),
    "int8-weight-only-zero-points": ("llama", "int8-weight-only", {"weight_symmetric": False}),
    "int4": ("llama", "int4-weight-only", {"block_size": 8}),
    "int4-biases": ("qwen2", "int4-weight-only", {"block_size": 8}),
    "int4-zero-points": ("llama", "int4-weight-only", {"block_size": 8, "weight_symmetric": False}),
    "int4-whole-rows": ("llama", "int4-weight-only", {}),
    "gptq": ("llama", "int4-weight-only", {"block_size": 8, "weights": "gptq"}),
    "w4a8": ("llama", "w4a8", {}),
    "w4a8-biases": ("qwen2", "w4a8", {"block_size": 8}),
    "w4a8-float8": ("llama", "w4a8-float8", {"block_size": 8}),
    "w4a8-float8-per-token": (
        "qwen2",
        "w4a8-float8",
        {"block_size": 8, "activation_granularity": "token"},
    ),
    "float8": ("llama", "float8", {}),
    "float8-biases": ("qwen2", "float8", {}),
    "float8-dynamic": ("llama", "float8-dynamic", {}),
    "folded-rotations": ("llama", "int8", {"kinds": ["r1", "r2"]}),
    "cache-int8": ("llama", "int8", {"kv": "int8"}),
    "cache-int4": ("llama", "int4-weight-only", {"kv": "int4"}),
    "cache-float8": ("qwen2", "int8", {"kv": "float8"}),
    "cache-alone": ("llama", "float", {"kv": "float8"}),
    "mixed": (
        "llama",
        "int8",
        {"overrides": {"*.down_proj": "int4-weight-only", "*.0.*.q_proj": "float"}},
    ),
    "head": ("llama", "int8", {"overrides": {"lm_head": "int8-weight-only"}}),
    "fused-projections": ("phi3", "int8", {"kv": "float8"}),
    "interleaved": ("gpt_neox", "float8", {}),
    "layer-norm": ("opt", "int8", {}),
    "experts": ("mixtral", "int4-weight-only", {"block_size": 8}),
    "experts-int8": ("qwen3_moe", "int8-weight-only", {}),
    "shared-experts": ("qwen2_moe", "int4-weight-only", {"block_size": 8}),
}
_ROWS = token_rows((12, 9))


def _run(model: TransformersModel) -> Tensor:
    return torch.cat([_pass(model, row) for row in _ROWS])


def _pass(model: TransformersModel, row: Tensor) -> Tensor:
    ids = row[None]
    return model.forward(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None])[0][0]


@pytest.mark.parametrize("case", _EXACT)
def test_logits_are_those_of_the_fake_quantized_model(case: str, tmp_path: Path) -> None:
    family, scheme, controls = _EXACT[case]
    model = artifact(family, scheme, **controls)
    found = opened(written(model, tmp_path / "bundle"), exact=True)
    assert found.note == ""
    assert relative_l2(_run(found), logits(build_reference(model), _ROWS)) <= WEIGHT_ONLY


@pytest.mark.parametrize("family", ["llama-bias-tied-headdim", "granite"])
def test_a_head_that_is_the_embedding_once_more_is_stored_once(family: str, tmp_path: Path) -> None:
    """Unless something parts the two, readers tie them as those of the checkpoint do."""
    model = artifact(family, "int8-weight-only", fold_norms=False)
    assert model.repeats_embedding()
    head = Names.of(model.config).wiring.head
    assert f"{head.name}.weight" not in tensors_of(model)
    folder = written(model, tmp_path / "bundle")
    found = opened(folder, exact=True)
    assert relative_l2(_run(found), logits(build_reference(model), _ROWS)) <= WEIGHT_ONLY
    read = read_model(open_bundle(folder), TransformersLayout())
    assert torch.equal(read.floats[head.weight], model.floats[head.weight])

    apart = artifact(family, "int8-weight-only", fold_norms=True)
    assert not apart.repeats_embedding()
    assert f"{head.name}.weight" in tensors_of(apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_default_session_is_plain_from_pretrained(
    scheme: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """No help from rotq, and no options: the library dequantizes when the model is first called."""
    import transformers

    folder = written(artifact("wide", scheme, dtype=dtype), tmp_path / "bundle")
    network, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    found = opened(folder, exact=False)
    assert found.precision == str(network.dtype).removeprefix("torch.")
    # the same operations on the same values
    assert torch.equal(_run(found), logits(network, _ROWS))


@pytest.mark.parametrize("case", ["int8", "int8-dynamic", "mixed", "layer-norm", "nvfp4"])
def test_linears_are_probed_in_transformers(case: str, tmp_path: Path) -> None:
    family, scheme, controls = _EXACT.get(case, ("wide", case, {}))
    model = artifact(family, scheme, **controls)
    reference = build_reference(model)
    folder = written(model, tmp_path / "bundle")
    probed: Any = SafetensorsBackend().load_probed(folder, "transformers")
    assert probed.runtime.startswith("transformers ")
    probes = probed.probe(_ROWS[0][None], list(model.linears))
    assert list(probes) == list(model.linears)
    for name, (entering, leaving) in probes.items():
        linear = reference.get_submodule(name)
        assert isinstance(linear, ReferenceLinear)
        assert relative_l2(leaving, linear(entering)) <= WEIGHT_ONLY, name
        rounded = linear.quantize(entering)
        # what entered was seen before it was quantized
        assert linear.source.input_scheme is None or not torch.equal(rounded, entering), name


@pytest.mark.parametrize("scheme", FIXED_BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_block_formats_are_within_the_floor(
    scheme: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """In float32; the split-sum floor is what summing in another order costs."""
    model = artifact("wide", scheme, dtype=dtype)
    reference = build_reference(model)
    floor = split_sum_floor(reference, _ROWS)
    found = _run(opened(written(model, tmp_path / "bundle"), exact=True))
    assert relative_l2(found, logits(reference, _ROWS)) <= max(floor.value, WEIGHT_ONLY)


def _float_inputs(model: QuantizedModel) -> QuantizedModel:
    linears = {name: replace(linear, input_scheme=None) for name, linear in model.linears.items()}
    return replace(model, linears=linears)


@pytest.mark.parametrize(
    ("scheme", "controls", "halved"),
    [
        ("int8-dynamic", {}, 127.5),
        ("w4a4", {}, 7.5),
        ("w4a8", {"activation_granularity": "token"}, 127.5),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scales_while_running_differ_by_the_divisor_alone(
    scheme: str, controls: dict[str, Any], halved: float, family: str, tmp_path: Path
) -> None:
    model = artifact(family, scheme, **controls)
    folder = written(model, tmp_path / "bundle")
    found, expected = opened(folder, exact=False), logits(build_reference(model), _ROWS)
    assert "half the number of levels" in found.note
    theirs = logits(build_reference(with_maxbound(model, halved)), _ROWS)
    assert relative_l2(_run(found), theirs) <= WEIGHT_ONLY
    assert relative_l2(_run(found), expected) > 10 * WEIGHT_ONLY
    exact = opened(folder, exact=True)
    assert exact.note == ""
    assert relative_l2(_run(exact), expected) <= WEIGHT_ONLY


def test_zero_points_while_running_have_no_such_divisor(tmp_path: Path) -> None:
    """Both take the whole range over 255 steps; the zero point is added before rounding or after
    it.
    """
    model = artifact("llama", "int8-dynamic", activation_symmetric=False)
    found = opened(written(model, tmp_path / "bundle"), exact=False)
    assert found.note == ""
    assert relative_l2(_run(found), logits(build_reference(model), _ROWS)) <= WEIGHT_ONLY


class _LibraryRule(ReferenceLinear):
    """MXFP4 inputs by the library's rule: ``k = floor(log2 amax) - 2``, one more where amax is 1.75
    · 2^j or above.
    """

    def quantize(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, 32))
        # 2 · mantissa in 1 … 2
        mantissa, exponent = torch.frexp(blocks.abs().amax(dim=-1, keepdim=True))
        scale = torch.exp2((exponent - 3 + (mantissa >= 0.875)).float())
        return round_to_grid(blocks, scale, None, FLOAT4).flatten(-2)


def test_mxfp4_inputs_differ_by_the_rule_of_their_scales_alone(tmp_path: Path) -> None:
    model = artifact("wide", "mxfp4", dtype=torch.bfloat16)
    folder = written(model, tmp_path / "bundle")
    assert "powers of two" in opened(folder, exact=False).note
    network = opened(written(_float_inputs(model), tmp_path / "weights"), exact=True)._network
    reference, ruled = build_reference(model), build_reference(model)
    for module in ruled.modules():
        if type(module) is ReferenceLinear:
            module.__class__ = _LibraryRule
    quantization: Any = pytest.importorskip("compressed_tensors.quantization")
    given = quantization.preset_name_to_scheme("MXFP4", ["Linear"]).input_activations
    for name in model.linears:
        network.get_submodule(name).quantization_scheme.input_activations = given
    found = logits(network, _ROWS)
    assert relative_l2(found, logits(ruled, _ROWS)) <= WEIGHT_ONLY
    assert relative_l2(found, logits(reference, _ROWS)) > 10 * WEIGHT_ONLY


@pytest.mark.parametrize("case", ["int8", "cache-int8", "cache-float8"])
def test_decodes_with_a_cache_and_padding(case: str, tmp_path: Path) -> None:
    family, scheme, controls = _EXACT[case]
    model = opened(written(artifact(family, scheme, **controls), tmp_path / "bundle"), exact=True)
    row = _ROWS[0][None]
    whole = _pass(model, row[0])
    first, past = model.forward(
        row[:, :8], torch.ones(1, 8, dtype=torch.long), torch.arange(8)[None]
    )
    rest, _ = model.forward(row[:, 8:], torch.ones_like(row), torch.arange(8, 12)[None], past)
    assert relative_l2(torch.cat([first[0], rest[0]]), whole) <= WEIGHT_ONLY
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), row], dim=1)
    mask = (torch.arange(15) >= 3).long()[None]
    positions = (torch.arange(15) - 3).clamp(min=0)[None]
    assert relative_l2(model.forward(padded, mask, positions)[0][0, 3:], whole) <= WEIGHT_ONLY


@pytest.mark.parametrize(
    ("family", "scheme", "controls", "stands_in"),
    [
        ("llama", "int8", {}, True),
        ("llama", "int4-weight-only", {"block_size": 8, "kinds": ["r1", "r2"]}, True),
        ("llama", "float", {}, True),
        ("llama", "int8", {"kinds": ["r4"]}, False),
        ("llama", "float", {"kinds": ["r4"]}, False),
        ("llama", "int8-dynamic", {}, False),
        ("gpt2", "int8", {}, False),
        ("mixtral", "float8", {}, False),
        ("gpt_neox", "int8", {"kv": "float8"}, False),
    ],
)
def test_for_vllm_transformers_stands_in_where_it_reads_the_same(
    family: str, scheme: str, controls: dict[str, Any], stands_in: bool, tmp_path: Path
) -> None:
    model = artifact(family, scheme, **controls)
    folder = written(model, tmp_path / "bundle", "vllm")
    for exact in (True, False):
        found: Any = SafetensorsBackend().load(folder, "vllm", exact=exact)
        assert found.runtime.startswith("transformers" if stands_in else "torch, from the file")
        assert found.not_run_in == "vLLM"
        assert relative_l2(_run(found), logits(build_reference(model), _ROWS)) <= WEIGHT_ONLY


@pytest.mark.parametrize("target", ["transformers", "compressed-tensors"])
def test_what_is_for_transformers_is_run_there_or_not_at_all(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(artifact("llama", "int8"), tmp_path / "bundle", target)
    found: Any = SafetensorsBackend().load(folder, target, exact=True)
    assert found.runtime.startswith("transformers ")
    assert found.not_run_in == ("" if target == "transformers" else "vLLM")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(RuntimeMissing, match="which is not installed"):
        SafetensorsBackend().load(folder, target, exact=True)
