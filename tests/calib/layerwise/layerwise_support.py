"""A calibrator that rounds to nearest, and what the tests of the walk share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from calib.data.batches import Batch, length_batches
from calib.fusing import FusedModel, fuse
from calib.layerwise import Block, CalibrationRunner
from calib.network.observe_experts import experts_as_modules
from tests.tiny import Tiny, token_rows

ALL_KINDS = ("r1", "r2", "r3", "r4")


@dataclass(frozen=True)
class Rounded:
    """A linear with int8 weights per output channel and a static scale of its input."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor


@dataclass
class Rtn:
    """Rounds to nearest; an input's scale is its largest magnitude over 127."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    """What each linear read, by batch, in the last pass."""
    groups: list[tuple[str, ...]] = field(default_factory=list)
    looks_at_head: bool = False
    """Whether the head is rounded as well."""

    def quantize_outside(
        self, name: str, tensors: Mapping[str, Tensor], run: Callable[[nn.Module], None]
    ) -> Rounded | None:
        if not self.looks_at_head or name != "lm_head":
            return None
        linear = nn.Linear(1, 1, bias=False)
        linear.weight = nn.Parameter(tensors["lm_head.weight"], requires_grad=False)
        inputs: list[Tensor] = []
        linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        run(linear)
        return rounded(linear, inputs)

    def calibrate(
        self, block: Block, names: Sequence[str], run: Callable[..., None]
    ) -> dict[str, Rounded]:
        self.groups.append(tuple(names))
        self.inputs |= {name: [] for name in names}
        with experts_as_modules(block.module, [block.local(name) for name in names]):
            handles = [
                block.linear(name).register_forward_pre_hook(
                    lambda _, args, name=name: self.inputs[name].append(args[0])
                )
                for name in names
            ]
            run()
            for handle in handles:
                handle.remove()
            return {name: rounded(block.linear(name), self.inputs[name]) for name in names}

    def tensors(self, quantized: Rounded) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(quantized).items() if tensor is not None}

    def extra(self, block: Block) -> dict[str, Tensor]:
        return {}

    def replacement(
        self, quantized: Rounded, linear: nn.Module, w_quant: bool, a_quant: bool
    ) -> Callable[[Tensor], Tensor]:
        weight = (
            dense(linear)
            if not w_quant
            else quantized.weight.float() * quantized.weight_scale[:, None]
        )
        step = quantized.input_scale

        def compute(x: Tensor) -> Tensor:
            x = (x / step).round().clamp(-128, 127) * step if a_quant else x
            return nn.functional.linear(x, weight, quantized.bias)

        return compute


def dense(linear: Any) -> Tensor:
    """The weight ``[out, in]``, whichever way the module stores it."""
    weight: Tensor = linear.weight
    return weight.T if isinstance(linear, Conv1D) else weight


def rounded(linear: Any, inputs: list[Tensor]) -> Rounded:
    weight = dense(linear).detach()
    scale = weight.abs().amax(1) / 127
    step = torch.stack([x.abs().max() for x in inputs]).max() / 127 if inputs else torch.ones(())
    stored = (weight / scale[:, None]).round().to(torch.int8)
    bias = getattr(linear, "bias", None)
    return Rounded(stored, scale, None if bias is None else bias.detach().clone(), step)


def linear_names(fused: FusedModel) -> list[str]:
    """Every linear that is calibrated, each expert among them."""
    return list(fused.wiring.quantizable)


def lazily(
    tiny: Tiny, kinds: Sequence[Any] = ALL_KINDS, dtype: torch.dtype = torch.float32
) -> FusedModel:
    rotations = tiny.rotations([kind for kind in kinds if kind in tiny.offered()])
    return fuse(tiny.state, tiny.wiring, rotations, dtype=dtype, lazy=True)


def batches() -> list[Batch]:
    """Several batches of several shapes."""
    return length_batches(token_rows(), 2)


def walk(
    fused: FusedModel,
    work: Path,
    flags: Mapping[str, bool] | None = None,
    *,
    head: bool = False,
    **options: Any,
) -> Rtn:
    """The whole walk; returns the calibrator."""
    calibrator = Rtn(looks_at_head=head)
    runner = CalibrationRunner(fused, batches(), calibrator, work, **options)
    runner.prepare_calibration()
    runner.layerwise_calibration("cpu", **(flags or {}))
    return calibrator


def shard_bytes(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((work / "shards").iterdir())}
