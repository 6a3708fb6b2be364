"""Bundles against what ModelOpt's ``export_hf_checkpoint`` writes of the same tensors, calibrated
on the same rows.

In float32 everything is the same to the last byte: keys, dtypes, packing, codes, scales, settings.
An artifact in bfloat16 has its scales in bfloat16, ModelOpt's are float32 always: there, rotq's are
ModelOpt's, rounded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backends.safetensors.modelopt.modelopt_support import (
    calibrated,
    different,
    exported,
    files_of,
    preset,
    tensors_of,
)
from tests.tolerances import FLOAT32_EPS

_CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int8": ("llama", "int8", {}),
    "int8-weight-only": ("llama", "int8-weight-only", {}),
    "int4-weight-only": ("llama", "int4-weight-only", {}),
    "w4a8-float8": ("llama", "w4a8-float8", {}),
    "float8": ("llama", "float8", {}),
    "float8-dynamic": ("llama", "float8-dynamic", {}),
    "nvfp4": ("llama", "nvfp4", {}),
    "nvfp4-bfloat16": ("llama", "nvfp4", {"dtype": torch.bfloat16}),
    "mxfp8": ("llama", "mxfp8", {}),
    "biases": ("qwen2", "int8", {"kv": "float8"}),
    "conv1d": ("gpt2", "float8", {"kv": "float8", "overrides": {"*.c_fc": "float"}}),
    "conv1d-int4": ("gpt2", "int4-weight-only", {}),
    "fused": ("phi3", "int8", {}),
    "float-layers": (
        "llama",
        "int8",
        {"overrides": {"*.0.self_attn.*": "float", "*.1.mlp.up_proj": "float"}},
    ),
    "mixed": (
        "qwen2",
        "float8",
        {"overrides": {"*.down_proj": "int8-weight-only", "*.o_proj": "nvfp4"}, "kv": "float8"},
    ),
}
_ADDED = "pre_quant_scale"
"""What rotq writes and ModelOpt does not: ones, without which TensorRT-LLM fails."""


@pytest.mark.parametrize("case", _CASES)
def test_is_what_modelopt_exports(case: str, tmp_path: Path) -> None:
    family, scheme, controls = _CASES[case]
    model = calibrated(family, scheme, **controls)
    theirs, ours = exported(model, tmp_path), tensors_of(model.artifact)
    added = {key for key in ours if key.endswith(_ADDED)}
    assert ours.keys() - added == theirs.tensors.keys()
    inexact = [key for key in theirs.tensors if "w4a8" in case and key.endswith("weight_scale_2")]
    assert (
        different(ours, theirs.tensors, [key for key in theirs.tensors if key not in inexact]) == []
    )
    for key in inexact:  # (amax / 7) * 7 in place of amax: two roundings
        torch.testing.assert_close(ours[key], theirs.tensors[key], rtol=FLOAT32_EPS, atol=0)
    files = files_of(model.artifact)
    assert files["hf_quant_config.json"] == theirs.quant_config
    assert files["config.json"]["quantization_config"] == theirs.config


@pytest.mark.parametrize("scheme", ["int8", "int4-weight-only", "float8"])
def test_scales_in_bfloat16_are_those_of_modelopt_rounded(scheme: str, tmp_path: Path) -> None:
    model = calibrated("llama", scheme, dtype=torch.bfloat16)
    theirs, ours = exported(model, tmp_path), tensors_of(model.artifact)
    scales = [key for key in theirs.tensors if key.endswith("_scale")]
    rounded = {key: theirs.tensors[key].to(torch.bfloat16).float() for key in scales}
    assert scales
    assert different(ours, rounded, scales) == []
    weights = [
        key for key in theirs.tensors if key.endswith(".weight") and f"{key}_scale" not in ours
    ]
    assert different(ours, theirs.tensors, weights) == []


@pytest.mark.parametrize(("family", "kv"), [("mixtral", None), ("qwen2_moe", "float8")])
def test_experts_are_those_of_modelopt_but_for_input_scales(
    family: str, kv: str | None, tmp_path: Path
) -> None:
    """ModelOpt has one input scale for all experts of a layer, the largest of those that rotq has
    one by one.
    """
    model = calibrated(family, "float8", kv=kv)
    theirs, ours = exported(model, tmp_path, preset("FP8_DEFAULT_CFG")), tensors_of(model.artifact)
    assert ours.keys() == theirs.tensors.keys()
    inputs = [key for key in ours if ".experts." in key and key.endswith("input_scale")]
    assert different(ours, theirs.tensors, [key for key in ours if key not in inputs]) == []
    for key in inputs:
        same = [other for other in inputs if _without_expert(other) == _without_expert(key)]
        assert torch.equal(
            torch.stack([ours[other] for other in same]).amax(), theirs.tensors[key]
        ), key
    files = files_of(model.artifact)
    assert files["hf_quant_config.json"] == theirs.quant_config
    assert files["config.json"]["quantization_config"] == theirs.config


def test_float_experts_are_excluded_as_modelopt_has_it(tmp_path: Path) -> None:
    model = calibrated("qwen2_moe", "int8", overrides={"*.experts.*": "float"})
    theirs = exported(model, tmp_path, preset("INT8_DEFAULT_CFG", "*.mlp.experts.*"))
    ours = tensors_of(model.artifact)
    assert ours.keys() == theirs.tensors.keys()
    assert different(ours, theirs.tensors, list(ours)) == []
    assert files_of(model.artifact)["hf_quant_config.json"] == theirs.quant_config


@pytest.mark.parametrize("scheme", ["int4-weight-only", "w4a8-float8"])
def test_a_pre_quant_scale_of_ones_is_where_modelopts_awq_leaves_one(
    scheme: str, tmp_path: Path
) -> None:
    model = calibrated("llama", scheme, block_size=16)
    config = preset("INT4_AWQ_CFG")
    for entry in config["quant_cfg"]:
        if "block_sizes" in entry.get("cfg", {}):
            entry["cfg"]["block_sizes"][-1] = 16
    keys = exported(model, tmp_path, config).tensors.keys()
    ours = tensors_of(model.artifact)
    assert {key for key in ours if key.endswith(_ADDED)} == {
        key for key in keys if key.endswith(_ADDED)
    }
    assert all(
        torch.equal(ours[key], torch.ones_like(ours[key])) for key in ours if key.endswith(_ADDED)
    )


def _without_expert(key: str) -> tuple[str, str]:
    """Layer and part; readers merge an expert's gate and up, ``w1`` and ``w3``."""
    before, _, after = key.partition(".experts.")
    return before, "down" if after.split(".")[1] in ("w2", "down_proj") else "gate and up"
