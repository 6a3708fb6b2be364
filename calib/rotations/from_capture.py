"""The rotations of a whole model, trained on what was captured from it, each behind its gate."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from calib.architectures import Wiring
from calib.capture.result import Samples
from calib.capture.storage import Capture
from calib.process.progress import Progress, silent
from calib.rotations.joint import unit_rows, with_weight_rows
from calib.rotations.rotation_set import (
    Rotation,
    RotationSet,
    check_offered,
    fused_rotation,
    online_rotations,
)
from calib.rotations.selection import CandidateError, CandidateName, Judge, select
from calib.rotations.train import TrainResult, train_rotation
from calib.rotations.train_config import TrainConfig

LOOK = 8
"""Epochs after which training behind a gate is looked at."""


@dataclass(frozen=True)
class TrainingCurve:
    """How one training went, of R1 or of all R2 at once."""

    rotation: str
    """``R1`` or ``R2``."""
    objective: str
    losses: tuple[float, ...]
    """As :attr:`calib.rotations.train.TrainResult.losses`."""
    held_out_errors: tuple[float, ...]
    """As :attr:`calib.rotations.train.TrainResult.held_out_errors`."""
    note: str = ""
    """That it was stopped, as it would not have won."""


@dataclass(frozen=True)
class TrainedRotations:
    """Rotations of a model, and what each was chosen from."""

    rotations: RotationSet
    """R1 and R2 only where some rotation was better than none."""
    table: tuple[CandidateError, ...] = ()
    """A row for every candidate of every rotation that went through the gate."""
    training: tuple[TrainingCurve, ...] = ()
    """Of every rotation that was trained, whether it was taken or not."""


@dataclass(frozen=True)
class Choice:
    """One rotation, or all R2 of a model, and what it was chosen from."""

    name: CandidateName
    matrix: Tensor | None
    """Float64 ``[n, n]`` or ``[layers, kv_heads, n, n]``; ``None``: the identity."""
    trained: TrainResult
    seed: int
    table: tuple[CandidateError, ...] = ()

    def curve(self, rotation: str) -> TrainingCurve:
        """How its training went."""
        result = self.trained
        note = _stopped_words(result)
        return TrainingCurve(
            rotation, result.objective, result.losses, result.held_out_errors, note
        )

    @property
    def origin(self) -> str:
        """How it came about, in words for the manifest."""
        if self.name != "trained":
            return f"{self.name}, seed {self.seed}: training gained nothing"
        result = self.trained
        return f"{result.start} start, {result.objective}, {result.optimizer}, {result.steps} steps"


def train_rotations(
    capture: Capture,
    wiring: Wiring,
    kinds: Collection[str],
    *,
    r1: TrainConfig,
    r2: TrainConfig,
    held_out: float,
    judge: Judge | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> TrainedRotations:
    """Train R1 and R2, keep what is best, and set up the Hadamard rotations R3 and R4, as far as
    they are in ``kinds``.

    R1 is one matrix over the pooled residual samples; the R2 of all layers and kv heads are trained
    in one batch. R3 and R4 are plain Hadamard matrices: they run online, where a trained matrix
    would cost a dense product.

    The samples are split in three: ``held_out`` of them for the gate, as much of the rest to stop
    training by, and what remains to train on.

    Args:
        capture: samples of the model's norm-folded activations.
        wiring: that of the model.
        kinds: which of r1, r2, r3, r4.
        r1: how to train R1; ``fix_ones`` is set for LayerNorm models, ``scheme`` by ``judge``.
        r2: how to train R2; likewise.
        held_out: share of the samples that is only measured on.
        judge: the gate's measure, which also says what to train on; ``None`` trains on activations
            and keeps the result, whatever it is worth.
        device: where training runs.
        progress: called after every step.

    Raises:
        RotationError: the architecture refuses one of ``kinds``, or the samples cannot be trained
            on.
    """
    check_offered(kinds, wiring)
    rotations: list[Rotation] = []
    table: tuple[CandidateError, ...] = ()
    training: list[TrainingCurve] = []
    if "r1" in kinds:
        settings = replace(r1, fix_ones=wiring.layer_norm)
        chosen = choose(capture, "r1", settings, held_out, judge, device=device, progress=progress)
        if chosen.matrix is not None:
            rotations.append(fused_rotation("r1", chosen.matrix, origin=chosen.origin))
        table += chosen.table
        training.append(chosen.curve("R1"))
    if "r2" in kinds:
        chosen = choose(capture, "r2", r2, held_out, judge, device=device, progress=progress)
        if chosen.matrix is not None:
            rotations += [
                fused_rotation("r2", heads, layer=layer, origin=chosen.origin)
                for layer, heads in zip(capture.r2, chosen.matrix, strict=True)
            ]
        table += chosen.table
        training.append(chosen.curve("R2"))
    everything = RotationSet([*rotations, *online_rotations(wiring, kinds)])
    return TrainedRotations(everything, table, tuple(training))


def choose(
    capture: Capture,
    rotation: Literal["r1", "r2"],
    config: TrainConfig,
    held_out: float,
    judge: Judge | None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Choice:
    """Train one rotation and put it through its gate; arguments as for :func:`train_rotations`.

    Args:
        capture: samples of the model's norm-folded activations.
        rotation: which one.
        config: how to train; the quantizer of ``judge`` takes the place of ``config.scheme``.
        held_out: share of the samples for the gate, and of the rest to stop training by.
        judge: what decides; ``None``: trained on activations with ``config`` as it is, and kept.
        device: where training runs.
        progress: called after every step.
    """
    train, held = (_on(part, device) for part in capture.held_out(rotation, held_out))
    result = _train(rotation, *train.split(held_out), config, judge, progress)
    if judge is None:
        return Choice("trained", result.matrix, result, config.seed)
    chosen = select(
        rotation, result.matrix, train, held, judge, seed=config.seed, fix_ones=config.fix_ones
    )
    note = _stopped_words(result)
    table = tuple(
        replace(row, note=note) if row.candidate == "trained" else row for row in chosen.table
    )
    return Choice(chosen.name, chosen.matrix, result, config.seed, table)


def _stopped_words(result: TrainResult) -> str:
    """That training ended early because it would not have won; empty where it did not."""
    return f"stopped after {result.steps} steps: would not have won" if result.hopeless else ""


def _train(
    rotation: Literal["r1", "r2"],
    train: Samples,
    stop: Samples,
    config: TrainConfig,
    judge: Judge | None,
    progress: Progress,
) -> TrainResult:
    """Train on what the judge says that the rotation should serve."""
    group = None
    if judge is not None:
        config = replace(config, scheme=judge.quantizer)
        train, stop = (_served(rotation, part, judge) for part in (train, stop))
        group = train.group if rotation == "r2" else None
    weights = [part.weights for part in (train, stop)]
    if rotation == "r2":  # one weight for a token, whatever the kv head
        weights = [
            part.weights.unsqueeze(-2).expand(part.values.shape[:-1]) for part in (train, stop)
        ]

    def report(stage: str, done: int, total: int | None) -> None:
        progress(f"train {rotation}", done, total)

    def run(settings: TrainConfig, start: Tensor | None = None) -> TrainResult:
        return train_rotation(
            train.values,
            settings,
            weights=weights[0],
            held_out=stop.values,
            held_out_weights=weights[1],
            start=start,
            group=group,
            progress=report,
        )

    by_token = config.scheme is not None and config.scheme.granularity != "tensor"
    polishing = config.epochs // 2 if config.objective == "auto" and by_token else 0
    # what stands behind a gate need not be trained to the end where the gate will not take it
    look = None if judge is None else LOOK
    result = run(replace(config, epochs=config.epochs - polishing, look=look))
    if not polishing or result.hopeless:
        return result
    # The quantizer's own error has many shallow minima: from a Hadamard start it goes less far than
    # L4 does, from where L4 ends it goes farther.
    polished = run(replace(config, objective="scheme", epochs=polishing), result.matrix)
    return replace(
        polished,
        losses=result.losses + polished.losses,
        held_out_errors=result.held_out_errors + polished.held_out_errors[1:],
        start=result.start,
        objective=f"{result.objective} then {polished.objective}",
        steps=result.steps + polished.steps,
    )


def _served(rotation: Literal["r1", "r2"], samples: Samples, judge: Judge) -> Samples:
    if judge.trained_on == "activations":
        return samples
    rows = _on(judge.rows[rotation], samples.values.device)
    return unit_rows(rows) if judge.trained_on == "weights" else with_weight_rows(samples, rows)


def _on(samples: Samples, device: torch.device | str) -> Samples:
    return replace(samples, values=samples.values.to(device), weights=samples.weights.to(device))
