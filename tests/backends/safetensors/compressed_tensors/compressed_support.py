"""Artifacts of tiny models, and the bundles that the backend makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backends.base import WriteOptions
from backends.safetensors.backend import SafetensorsBackend
from backends.safetensors.compressed_tensors import runner
from backends.safetensors.compressed_tensors.layout import VllmLayout
from calib.architectures import Kind
from calib.artifact import QuantizedLinear, QuantizedModel
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.fusing import fuse
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import customised, resolve
from calib.rotations.rotation_set import online_rotations
from calib.schemes import scheme_named
from tests.tiny import CONFIGS, PROVENANCE, fuse_tiny, make_tiny, token_rows, wide_llama

BOTH = "compressed-tensors"
FIXED_BLOCKS = ("nvfp4", "mxfp4", "mxfp8")


def artifact(
    family: str,
    scheme: str,
    *,
    kinds: Sequence[Kind] = (),
    online_block: int | None = None,
    kv: str | None = None,
    overrides: Mapping[str, str] | None = None,
    weights: str = "rtn",
    dtype: torch.dtype = torch.float32,
    fold_norms: bool = True,
    **controls: Any,
) -> QuantizedModel:
    """A quantized tiny model of ``family``: a key of ``CONFIGS``, or ``wide`` where blocks do not
    fit 48 channels.
    """
    tiny = make_tiny(wide_llama() if family == "wide" else CONFIGS[family]())
    fused = fuse_tiny(tiny, kinds, dtype, fold_norms=fold_norms)
    if online_block is not None:
        blocked = online_rotations(tiny.wiring, kinds, block=online_block)
        fused = fuse(tiny.state, tiny.wiring, fused.rotations.merged(blocked), dtype=dtype)
    wanted = resolve(
        customised(scheme_named(scheme), **controls),
        fused.wiring,
        overrides=overrides,
        kv=kv,
        weights=weights,
    )
    return quantize_model(
        fused, wanted, forward_loop_over(length_batches(token_rows(), 4)), PROVENANCE
    )


def written(model: QuantizedModel, folder: Path, target: str = "transformers") -> Path:
    """``folder``, with the bundle of ``model`` in it; skips where the library that describes it is
    missing.
    """
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    folder.mkdir()
    SafetensorsBackend().write(model, folder, WriteOptions(target))
    return folder


def opened(folder: Path, *, exact: bool) -> runner.TransformersModel:
    """A bundle in transformers, whatever that makes of it."""
    return runner.load(folder, exact=exact, stands_in=False, not_run_in="")


def quantization_config(folder: Path) -> dict[str, Any]:
    """What the ``config.json`` of a bundle says."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))[
        "quantization_config"
    ]
    return found


def tensors_of(model: QuantizedModel) -> dict[str, Tensor]:
    """The tensors of the bundle by key, as they are described."""
    found = {}
    for entry in VllmLayout().entries(model):
        tensor = entry.read()
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.key
        assert tensor.is_contiguous(), entry.key
        assert entry.key not in found
        found[entry.key] = tensor
    return found


def logits(network: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    """Logits of all tokens of ``rows``, ``[tokens, vocabulary]``."""
    with torch.no_grad():
        return torch.cat([network(input_ids=row[None]).logits[0].float() for row in rows])


def with_maxbound(model: QuantizedModel, maxbound: float) -> QuantizedModel:
    """``model`` whose inputs are quantized with ``amax / maxbound``."""

    def changed(linear: QuantizedLinear) -> QuantizedLinear:
        assert linear.input_scheme is not None
        given = replace(
            linear.input_scheme, format=replace(linear.input_scheme.format, maxbound=maxbound)
        )
        return replace(linear, input_scheme=given)

    return replace(model, linears={name: changed(linear) for name, linear in model.linears.items()})


def equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Same dtype, shape and bytes, or both ``None``."""
    if one is None or other is None:
        return one is other
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(bytes_of(one), bytes_of(other))
    )


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of ``tensor``, uint8 and flat: float8 has no comparison, and -0 equals 0."""
    return tensor.contiguous().view(-1).view(torch.uint8)
