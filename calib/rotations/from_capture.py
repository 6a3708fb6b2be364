"""The rotations of a whole model, trained on what was captured from it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

import torch

from calib.architectures import KINDS, Architecture
from calib.capture.storage import Capture
from calib.errors import RotationError
from calib.progress import Progress, silent
from calib.rotations.rotation_set import Rotation, RotationSet, fused_rotation, hadamard_rotation
from calib.rotations.train import TrainConfig, TrainResult, train_rotation


def train_rotations(
    capture: Capture,
    config: Any,
    architecture: Architecture,
    kinds: Collection[str],
    *,
    r1: TrainConfig,
    r2: TrainConfig,
    held_out: float,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> RotationSet:
    """Train R1 and R2, and set up the Hadamard rotations R3 and R4, as far as they are in ``kinds``.

    R1 is one matrix over the pooled residual samples; the R2 of all layers and kv heads are trained in one batch. R3
    and R4 are plain Hadamard matrices: they run online, where a trained matrix would cost a dense product.

    Args:
        capture: samples of the model's norm-folded activations.
        config: the model's Hugging Face config.
        architecture: its table entry.
        kinds: which of r1, r2, r3, r4.
        r1: how to train R1; ``fix_ones`` is set for LayerNorm models.
        r2: how to train R2.
        held_out: share of the samples that is only measured on.
        device: where training runs.
        progress: called after every step.

    Raises:
        RotationError: the architecture refuses one of ``kinds``, or the samples cannot be trained on.
    """
    for kind in kinds:
        reason = architecture.refusal(kind, config)
        if reason is not None:
            raise RotationError(
                f"{kind.upper()} is refused for {architecture.name}: {reason}",
                hint=f"leave {kind} out of --rotate",
            )
    rotations: list[Rotation] = []
    if "r1" in kinds:
        fix_ones = architecture.norm_kind == "layer"
        result = _train(capture, "r1", replace(r1, fix_ones=fix_ones), held_out, device, progress)
        rotations.append(fused_rotation("r1", result.matrix, origin=_origin(result)))
    if "r2" in kinds:
        result = _train(capture, "r2", r2, held_out, device, progress)
        rotations += [
            fused_rotation("r2", matrix, layer=layer, origin=_origin(result))
            for layer, matrix in zip(capture.r2, result.matrix, strict=True)
        ]
    return RotationSet([*rotations, *online_rotations(config, architecture, kinds)])


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


def _train(
    capture: Capture,
    rotation: Literal["r1", "r2"],
    config: TrainConfig,
    held_out: float,
    device: torch.device | str,
    progress: Progress,
) -> TrainResult:
    train, held = capture.held_out(rotation, held_out)
    weights = train.weights.to(device)
    if rotation == "r2":  # one weight for a token, whatever the kv head
        weights = weights.unsqueeze(-2).expand(train.values.shape[:-1])

    def report(stage: str, done: int, total: int | None) -> None:
        progress(f"train {rotation}", done, total)

    return train_rotation(
        train.values.to(device),
        config,
        weights=weights,
        held_out=held.values.to(device),
        progress=report,
    )


def _origin(result: TrainResult) -> str:
    return f"{result.start} start, {result.objective}, {result.optimizer}, {result.steps} steps"
