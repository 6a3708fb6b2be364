"""The rotations of a whole model, trained on what was captured from it, each behind its gate."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from calib.architectures import KINDS, Architecture
from calib.capture.result import Samples
from calib.capture.storage import Capture
from calib.errors import RotationError
from calib.progress import Progress, silent
from calib.rotations.rotation_set import Rotation, RotationSet, fused_rotation, hadamard_rotation
from calib.rotations.selection import CandidateError, Judge, select
from calib.rotations.train import TrainConfig, TrainResult, train_rotation


@dataclass(frozen=True)
class TrainedRotations:
    """Rotations of a model, and what each was chosen from."""

    rotations: RotationSet
    """R1 and R2 only where some rotation was better than none."""
    table: tuple[CandidateError, ...] = ()
    """A row for every candidate of every rotation that went through the gate."""


def train_rotations(
    capture: Capture,
    config: Any,
    architecture: Architecture,
    kinds: Collection[str],
    *,
    r1: TrainConfig,
    r2: TrainConfig,
    held_out: float,
    judge: Judge | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> TrainedRotations:
    """Train R1 and R2, keep what is best, and set up the Hadamard rotations R3 and R4, as far as they are in ``kinds``.

    R1 is one matrix over the pooled residual samples; the R2 of all layers and kv heads are trained in one batch. R3
    and R4 are plain Hadamard matrices: they run online, where a trained matrix would cost a dense product.

    The samples are split in three: ``held_out`` of them for the gate, as much of the rest to stop training by, and what
    remains to train on.

    Args:
        capture: samples of the model's norm-folded activations.
        config: the model's Hugging Face config.
        architecture: its table entry.
        kinds: which of r1, r2, r3, r4.
        r1: how to train R1; ``fix_ones`` is set for LayerNorm models.
        r2: how to train R2.
        held_out: share of the samples that is only measured on.
        judge: the gate's measure; ``None`` keeps the trained rotations, whatever they are worth.
        device: where training runs.
        progress: called after every step.

    Raises:
        RotationError: the architecture refuses one of ``kinds``, or the samples cannot be trained on.
    """
    check_offered(kinds, config, architecture)
    rotations: list[Rotation] = []
    table: tuple[CandidateError, ...] = ()
    if "r1" in kinds:
        settings = replace(r1, fix_ones=architecture.norm_kind == "layer")
        matrix, origin, rows = _best(capture, "r1", settings, held_out, judge, device, progress)
        rotations += [] if matrix is None else [fused_rotation("r1", matrix, origin=origin)]
        table += rows
    if "r2" in kinds:
        matrix, origin, rows = _best(capture, "r2", r2, held_out, judge, device, progress)
        if matrix is not None:
            rotations += [
                fused_rotation("r2", heads, layer=layer, origin=origin)
                for layer, heads in zip(capture.r2, matrix, strict=True)
            ]
        table += rows
    return TrainedRotations(RotationSet([*rotations, *online_rotations(config, architecture, kinds)]), table)


def check_offered(kinds: Collection[str], config: Any, architecture: Architecture) -> None:
    """Refuse what the architecture refuses.

    Raises:
        RotationError: with the reason.
    """
    for kind in kinds:
        reason = architecture.refusal(kind, config)
        if reason is not None:
            raise RotationError(
                f"{kind.upper()} is refused for {architecture.name}: {reason}",
                hint=f"leave {kind} out of --rotate",
            )


def online_rotations(config: Any, architecture: Architecture, kinds: Collection[str]) -> list[Rotation]:
    """The online Hadamards among ``kinds``: R3 of order ``head_dim``, R4 of the width each down projection reads."""
    sizes = architecture.dimensions(config)
    rotations: list[Rotation] = []
    for layer in range(sizes.layers):
        if "r3" in kinds:
            rotations.append(hadamard_rotation("r3", sizes.head_dim, layer=layer))
        if "r4" in kinds:
            widths = {
                spec.branch: architecture.ffn_width(spec, config) for spec in architecture.ffn_readers(config, layer)
            }
            rotations += [hadamard_rotation("r4", width, layer=layer, branch=name) for name, width in widths.items()]
    return rotations


def ordered_kinds(kinds: Collection[str]) -> str:
    """``kinds`` as ``--rotate`` writes them: ``r1,r2,r4``, or ``none``."""
    return ",".join(kind for kind in KINDS if kind in kinds) or "none"


def _best(
    capture: Capture,
    rotation: Literal["r1", "r2"],
    config: TrainConfig,
    held_out: float,
    judge: Judge | None,
    device: torch.device | str,
    progress: Progress,
) -> tuple[Tensor | None, str, tuple[CandidateError, ...]]:
    """The rotation to use (``None``: none), how it was chosen, and the gate's rows."""
    train, held = (_on(part, device) for part in capture.held_out(rotation, held_out))
    result = _train(rotation, *train.split(held_out), config, progress)
    if judge is None:
        return result.matrix, _origin(result), ()
    chosen = select(rotation, result.matrix, train, held, judge, seed=config.seed, fix_ones=config.fix_ones)
    origin = _origin(result) if chosen.name == "trained" else f"{chosen.name}, seed {config.seed}: better than training"
    return chosen.matrix, origin, chosen.table


def _train(
    rotation: Literal["r1", "r2"], train: Samples, stop: Samples, config: TrainConfig, progress: Progress
) -> TrainResult:
    weights = train.weights
    if rotation == "r2":  # one weight for a token, whatever the kv head
        weights = weights.unsqueeze(-2).expand(train.values.shape[:-1])

    def report(stage: str, done: int, total: int | None) -> None:
        progress(f"train {rotation}", done, total)

    return train_rotation(train.values, config, weights=weights, held_out=stop.values, progress=report)


def _on(samples: Samples, device: torch.device | str) -> Samples:
    return replace(samples, values=samples.values.to(device), weights=samples.weights.to(device))


def _origin(result: TrainResult) -> str:
    return f"{result.start} start, {result.objective}, {result.optimizer}, {result.steps} steps"
