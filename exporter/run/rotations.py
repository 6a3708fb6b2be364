"""Which rotations a recipe asks for, and where they come from: files, training, or a Hadamard
matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from calib.capture.storage import Capture
from calib.errors import RotationError
from calib.fusing import FusedModel
from calib.progress import Progress
from calib.rotations.foreign import import_rotations
from calib.rotations.from_capture import TrainedRotations, train_rotations
from calib.rotations.objectives import ActivationScheme
from calib.rotations.readers import residual_rows, value_rows
from calib.rotations.rotation_set import (
    RotationSet,
    check_offered,
    hadamard_rotations,
    online_rotations,
    ordered_kinds,
)
from calib.rotations.selection import Judge, integer_quantizer, judge_for
from calib.rotations.train_config import TrainConfig
from calib.schemes import FLOAT, Scheme
from exporter.recipe import Recipe, Training
from exporter.reporting.report import RotationSummary
from exporter.run.gate import CANDIDATES
from exporter.run.quantizing import customised_scheme
from exporter.source import Source


def kinds_of(rotate: str) -> list[str]:
    """The kinds in what ``--rotate`` takes, but for ``auto``."""
    return [] if rotate == "none" else rotate.split(",")


def candidate_sets(
    recipe: Recipe, source: Source, given: RotationSet, refused: Collection[str] = ()
) -> list[str]:
    """What ``--rotate auto`` compares on this architecture; else the one set that was asked for.

    Where nothing is quantized there is nothing to compare: rotations leave what a float model
    computes as it is.

    Args:
        recipe: names the set, or ``auto``.
        source: the float model.
        given: rotations from files.
        refused: kinds that a target cannot express.

    Raises:
        RotationError: ``given`` holds a rotation that no candidate has.
    """
    sets = [recipe.rotate]
    if recipe.rotate == "auto" and recipe.scheme == FLOAT:
        sets = ["none"]
    elif recipe.rotate == "auto":
        offered = [
            [
                kind
                for kind in kinds_of(rotate)
                if kind not in refused and source.wiring.refusal(kind) is None
            ]
            for rotate in CANDIDATES
        ]
        sets = list(dict.fromkeys(map(ordered_kinds, offered)))
    unused = set(given.kinds()) - {kind for rotate in sets for kind in kinds_of(rotate)}
    if unused:
        kinds = ordered_kinds({*unused, *given.kinds()})
        raise RotationError(
            f"the given files hold {', '.join(kind.upper() for kind in sorted(unused))}, which"
            f" --rotate {recipe.rotate} leaves out",
            hint=f"give --rotate {kinds}, or other files to --rotations",
        )
    return sets


def gate_sets(
    candidates: Sequence[str],
    recipe: Recipe,
    source: Source,
    given: RotationSet,
    trained: RotationSet,
) -> dict[str, RotationSet]:
    """The sets that the whole model decides between, the simplest first, by what the report calls
    them.

    Beside those of :func:`candidate_sets` there is the largest one with random Hadamard matrices in
    place of what was trained: the error that training lowers is that of one linear, and what the
    network makes of it may differ.

    Args:
        candidates: of :func:`candidate_sets`.
        recipe: its scheme and seed count.
        source: the float model.
        given: rotations from files.
        trained: rotations of all kinds that a set has.
    """
    sets = {rotate: trained.of(kinds_of(rotate)) for rotate in candidates}
    largest = list(sets)[-1]
    replaced = trainable(kinds_of(largest), given, recipe.scheme)
    if len(sets) > 1 and replaced:
        plain = hadamard_rotations(source.wiring, replaced, seed=recipe.seed)
        rest = [kind for kind in kinds_of(largest) if kind not in replaced]
        sets[f"{largest}, Hadamard"] = plain.merged(trained.of(rest).values())
    return sets


def given_rotations(recipe: Recipe, source: Source) -> RotationSet:
    """The rotations in the recipe's files, checked against the model.

    Raises:
        RotationError: a file cannot be read, or holds what does not fit the model or is not
            orthogonal.
    """
    if not recipe.rotation.files:
        return RotationSet()
    return import_rotations(recipe.rotation.files, source.wiring)


def trainable(kinds: Collection[str], given: RotationSet, scheme: str) -> list[str]:
    """Those of ``kinds`` that have to be trained for ``scheme``; for ``float`` none, as nothing
    says what is better.
    """
    return [] if scheme == FLOAT else _not_given(kinds, given)


def _not_given(kinds: Collection[str], given: RotationSet) -> list[str]:
    return sorted({"r1", "r2"} & set(kinds) - set(given.kinds()))


def rotations_of(
    kinds: Collection[str],
    recipe: Recipe,
    source: Source,
    given: RotationSet,
    statistics: Capture | None,
    folded: FusedModel | None,
    *,
    device: torch.device,
    progress: Progress,
) -> TrainedRotations:
    """Rotations of the wanted ``kinds``: those of ``given``, trained ones, and Hadamard matrices
    for R3 and R4.

    For the scheme ``float`` R1 and R2 are Hadamard matrices too.

    Args:
        kinds: which of r1, r2, r3, r4.
        recipe: how to train.
        source: the float model.
        given: rotations from files.
        statistics: what to train on; needed where something is :func:`trainable`.
        folded: the norm-folded model, whose weights the gate looks at too; needed for weight-only
            schemes.
        device: where training runs.
        progress: called after every step.

    Raises:
        RotationError: a kind is refused, or the samples cannot be trained on.
    """
    check_offered(kinds, source.wiring)
    wanted = set(kinds) - set(given.kinds())
    made = TrainedRotations(RotationSet(online_rotations(source.wiring, wanted)))
    if recipe.scheme == FLOAT:
        plain = hadamard_rotations(
            source.wiring,
            _not_given(kinds, given),
            seed=recipe.seed,
        )
        made = TrainedRotations(made.rotations.merged(plain.values()))
    if statistics is not None:
        settings, scheme = recipe.rotation, customised_scheme(recipe)
        judge = judge_of(scheme, folded) if settings.select else None
        quantizer = activation_scheme(scheme) if judge is None else judge.quantizer
        made = train_rotations(
            statistics,
            source.wiring,
            wanted,
            r1=_training(settings.r1, quantizer, recipe.seed),
            r2=_training(settings.r2, quantizer, recipe.seed),
            held_out=settings.held_out,
            judge=judge,
            device=device,
            progress=progress,
        )
    return TrainedRotations(made.rotations.merged(given.of(kinds).values()), made.table)


def activation_scheme(scheme: Scheme) -> ActivationScheme | None:
    """What the rotation trainer should know of how activations are quantized; ``None`` where they
    are not integers.
    """
    return None if scheme.activation is None else integer_quantizer(scheme.activation)


def judge_of(scheme: Scheme, folded: FusedModel | None) -> Judge:
    """What decides between the candidates of a rotation.

    Args:
        scheme: what is quantized, and how.
        folded: the norm-folded model, whose weight rows are judged too.

    Raises:
        RotationError: a weight-only scheme without ``folded``.
    """
    if folded is None:
        return judge_for(scheme)
    found = {
        "r1": residual_rows(folded.state, folded.wiring),
        "r2": value_rows(folded.state, folded.wiring),
    }
    return judge_for(scheme, {name: rows for name, rows in found.items() if rows is not None})


def rotation_summaries(rotations: RotationSet) -> list[RotationSummary]:
    """The rows of a report."""
    return [
        RotationSummary(
            name=rotation.name,
            space=(
                str(rotation.space)
                if rotation.layer is None
                else f"{rotation.space}[{rotation.layer}]"
            ),
            order=rotation.order or rotation.dense().shape[-1],
            online=rotation.online,
            origin=rotation.origin,
        )
        for rotation in rotations.values()
    ]


def _training(settings: Training, quantizer: ActivationScheme | None, seed: int) -> TrainConfig:
    return TrainConfig(**settings.model_dump(), scheme=quantizer, seed=seed)
