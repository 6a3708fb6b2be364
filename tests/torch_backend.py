"""A backend whose runtime is torch, for tests of what is common to all backends: parity, targets,
inspection.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.base import (
    Fusion,
    ProbedModel,
    Reason,
    Request,
    RuntimeMissing,
    RuntimeModel,
    StoredTensor,
    WriteOptions,
)
from backends.rules import Limits
from backends.torch_model import TorchModel
from calib.artifact import (
    QuantizedCache,
    QuantizedLinear,
    QuantizedModel,
    load_artifact,
    save_artifact,
)
from calib.errors import BackendError
from calib.measure.reference import build_reference

DTYPES: dict[str, str | None] = {
    "plain": "float32",
    "half": "float16",
    "own": None,
    "absent": "float32",
}
WEIGHTS, OPTIONS = "weights", "options.json"


class TorchRuntime(TorchModel):
    """The folder in torch, in the dtype of its target."""

    def __init__(self, model: QuantizedModel, *, last: bool, note: str) -> None:
        super().__init__(model)
        self.runtime = "torch, for tests"  # type: ignore[misc]
        self.note = note  # type: ignore[misc]
        self._last = last
        if model.dtype != torch.float32:
            self._network = build_reference(model, dtype=model.dtype)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        logits, present = super().forward(input_ids, attention_mask, position_ids, past)
        return (logits[:, -1:] if self._last else logits), present


class TorchBackend:
    """Writes the artifact as it is, and unpacks int4 on every run, of which ``half`` does not warn.

    ``absent`` cannot be run; ``plain`` takes no float8; ``half`` takes no R4 and no buffer for keys
    and values; ``own`` does not write shards of a few bytes.
    """

    name = "torch"
    targets = tuple(DTYPES)
    contract = 2
    runtime = TorchRuntime

    def refusals(self, request: Request) -> list[Reason]:
        target = request.target
        half = target == "half"
        limits = Limits(
            linear=lambda scheme: (
                "no float8 kernels"
                if (scheme.weight.format.kind, target) == ("float", "plain")
                else None
            ),
            slow=lambda scheme: (
                "int4 weights are unpacked on every run"
                if scheme.weight.format.name == "int4" and not half
                else None
            ),
            rotation=lambda kind: "it has no place for one" if kind == "r4" and half else None,
            options={"kv_buffer": "its caches only grow"} if half else {},
        )
        embedding = any("embed_tokens" in name for name in request.linears)
        if request.config is not None and target == "own" and embedding:
            return [
                *limits.reasons(request),
                Reason("its embedding is quantized", "leave --override for it out"),
            ]
        return limits.reasons(request)

    def compute_dtype(self, target: str) -> str | None:
        return DTYPES[target]

    def write(self, model: QuantizedModel, folder: Path, options: WriteOptions) -> None:
        if options.target == "own" and (options.max_shard_bytes or 1000) < 1000:
            raise BackendError("its shards are larger")
        (folder / WEIGHTS).mkdir()
        save_artifact(model, folder / WEIGHTS)
        told = {
            "logits": options.logits,
            "kv_buffer": options.kv_buffer,
            "shard": options.max_shard_bytes,
        }
        (folder / OPTIONS).write_text(json.dumps(told))
        if options.target == "own":
            config = {**model.config, "quantization_config": {"quant_method": "torch"}}
            (folder / "config.json").write_text(json.dumps(config))

    def load(self, folder: Path, target: str, *, exact: bool) -> RuntimeModel:
        return self._load(folder, target, exact)

    def load_probed(self, folder: Path, target: str) -> ProbedModel:
        return self._load(folder, target, True)

    def _load(self, folder: Path, target: str, exact: bool) -> TorchRuntime:
        if target == "absent":
            raise RuntimeMissing("its runtime is not installed", hint="install it")
        model = load_artifact(folder / WEIGHTS)
        approximates = (
            any(linear.input_scheme is None for linear in model.linears.values()) and not exact
        )
        last = json.loads((folder / OPTIONS).read_text())["logits"] == "last"
        return self.runtime(
            model, last=last, note="rounds inputs of its own accord" if approximates else ""
        )

    def fusion(self, folder: Path, target: str) -> Fusion | None:
        if target == "own":
            return None
        linears = load_artifact(folder / WEIGHTS).linears
        slow = [
            name for name, linear in linears.items() if linear.weight_scheme.format.name == "int4"
        ]
        return Fusion(
            len(linears), slow, {"MatMul": len(linears) - len(slow), "Dequantize": len(slow)}
        )

    def read_linears(self, folder: Path, target: str) -> Mapping[str, QuantizedLinear]:
        return load_artifact(folder / WEIGHTS).linears

    def read_cache(self, folder: Path, target: str) -> QuantizedCache | None:
        return load_artifact(folder / WEIGHTS).cache

    def read_floats(self, folder: Path, target: str) -> Mapping[str, Tensor]:
        return load_artifact(folder / WEIGHTS).floats

    def contents(self, folder: Path, target: str) -> Sequence[StoredTensor]:
        model = load_artifact(folder / WEIGHTS)
        tensors = {
            key: tensor
            for linear in model.linears.values()
            for key, tensor in linear.tensors().items()
        }
        return [_stored(key, tensor) for key, tensor in {**model.floats, **tensors}.items()]


class WrongScales(TorchBackend):
    """Loses the scale of one linear by a factor of two on the way: what a parity check is for."""

    def write(self, model: QuantizedModel, folder: Path, options: WriteOptions) -> None:
        name, linear = next(
            (name, linear) for name, linear in model.linears.items() if name.endswith("down_proj")
        )
        broken = replace(linear, weight_scale=linear.weight_scale * 2)
        super().write(replace(model, linears={**model.linears, name: broken}), folder, options)


class WrongEmbedding(TorchBackend):
    """Enlarges one row of the embedding on the way: what few texts show."""

    def write(self, model: QuantizedModel, folder: Path, options: WriteOptions) -> None:
        (name,) = (name for name in model.floats if name.endswith("embed_tokens.weight"))
        table = model.floats[name].clone()
        table[-1] *= 1.05
        super().write(replace(model, floats={**model.floats, name: table}), folder, options)


class RepeatingRuntime(TorchRuntime):
    """Whatever it is given after a cache, it takes the token that it was given for the next one."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        logits, present = super().forward(input_ids, attention_mask, position_ids, past)
        if past:
            same = input_ids[:, -logits.shape[1] :, None]
            logits = logits.scatter(-1, same, logits.amax(-1, keepdim=True) + 1)
        return logits, present


class Repeats(TorchBackend):
    """Loses its way as soon as it decodes: what a perplexity of whole texts does not see."""

    runtime = RepeatingRuntime


def _stored(key: str, tensor: Tensor) -> StoredTensor:
    kinds = {"weight_scale": "scale", "input_scale": "scale", "weight_zero_point": "zero point"}
    kind: Any = kinds.get(
        key.rpartition(".")[2], "float weight" if tensor.is_floating_point() else "quantized weight"
    )
    return StoredTensor(
        key, kind, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.nbytes
    )


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the backends through an entry point, as a third party's are."""
    info = folder / "torchbackend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchbackend\nVersion: 1.0\n")
    module = f"{__name__}:"
    entries = "".join(
        f"{name} = {module}{kind}\n"
        for name, kind in (
            ("torch", "TorchBackend"),
            ("wrong", "WrongScales"),
            ("wrong-embedding", "WrongEmbedding"),
            ("repeats", "Repeats"),
        )
    )
    (info / "entry_points.txt").write_text(f"[rotq.backends]\n{entries}")
    monkeypatch.syspath_prepend(str(folder))
