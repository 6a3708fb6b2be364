"""Where the rotations of a run come from: files, training, or a Hadamard matrix."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from calib.architectures import Kind
from calib.capture.storage import Capture
from calib.errors import RotationError
from calib.files.reading import MALFORMED, reason_of
from calib.files.sealed import read_sealed, write_sealed
from calib.fusing import FusedModel
from calib.rotations.files import load_rotations, save_rotations
from calib.rotations.foreign import import_rotations
from calib.rotations.from_capture import TrainedRotations, TrainingCurve, train_rotations
from calib.rotations.quantizer import ActivationScheme
from calib.rotations.readers import residual_rows, value_rows
from calib.rotations.rotate import GateSet, Rotate, gate_sets, trainable, union
from calib.rotations.rotation_set import (
    RotationSet,
    check_offered,
    hadamard_rotations,
    online_rotations,
)
from calib.rotations.selection import CandidateError, Judge, integer_quantizer, judge_for
from calib.rotations.train_config import TrainConfig
from calib.schemes import Scheme
from exporter.recipe import Recipe, Training
from exporter.run.capturing import captured
from exporter.run.inputs import Inputs
from exporter.run.options import RunOptions
from exporter.run.stopwatch import Stopwatch
from exporter.run.workdir import ROTATIONS, WorkDir
from exporter.source import Source

_CHOICE = "choice.json"
"""In the folder of kept rotations: what they were made of, and how each was chosen."""


def imported_rotations(recipe: Recipe, source: Source) -> RotationSet:
    """The rotations in the recipe's files, checked against the model.

    Raises:
        RotationError: a file cannot be read, or holds what does not fit the model or is not
            orthogonal.
    """
    if not recipe.rotation.files:
        return RotationSet()
    return import_rotations(recipe.rotation.files, source.wiring)


def candidate_sets(
    inputs: Inputs, imported: RotationSet, refused: Collection[str] = ()
) -> tuple[Rotate, ...]:
    """What ``--rotate auto`` compares on this model; else the one set that was asked for.

    Args:
        inputs: the model, and what is asked for.
        imported: rotations from files.
        refused: kinds that a target cannot express.

    Raises:
        RotationError: a kind that is asked for is refused for this model, or ``imported`` holds a
            rotation that no candidate has.
    """
    check_offered(inputs.recipe.rotate.certain, inputs.source.wiring)
    offered = [kind for kind in inputs.offered if kind not in refused]
    rotate = inputs.recipe.rotate
    sets = rotate.sets(offered, quantizes=inputs.quantizes)

    unused = Rotate.of(set(imported.kinds()) - set(union(sets))).certain
    if unused:
        raise RotationError(
            f"the given files hold {', '.join(kind.upper() for kind in unused)}, which"
            f" --rotate {rotate} leaves out",
            hint=f"give --rotate {Rotate.of(imported.kinds())}, or other files to --rotations",
        )
    return sets


def gate_rotations(
    sets: Sequence[Rotate], inputs: Inputs, imported: RotationSet, trained: RotationSet
) -> dict[GateSet, RotationSet]:
    """The rotations of every set that the whole model decides between, the simplest first.

    Args:
        sets: of :func:`candidate_sets`.
        inputs: the model, and the seed of random matrices.
        imported: rotations from files.
        trained: rotations of all kinds that a set has.
    """
    rotations = {}
    for candidate in gate_sets(sets, imported.kinds()):
        rest = set(candidate.rotate.certain) - set(candidate.plain)
        plain = _hadamards(candidate.plain, inputs)
        rotations[candidate] = plain.merged(trained.of(rest).values())
    return rotations


def trained_rotations(
    kinds: Collection[str],
    inputs: Inputs,
    imported: RotationSet,
    rows: Sequence[Tensor],
    options: RunOptions,
    work: WorkDir,
    clock: Stopwatch,
    prefix: Sequence[int] = (),
) -> TrainedRotations:
    """Rotations of these ``kinds``: those of ``imported``, trained ones, each behind its gate, and
    Hadamard matrices for R3 and R4.

    For the scheme ``float`` R1 and R2 are Hadamard matrices too: nothing says what is better.

    Args:
        kinds: which of r1, r2, r3, r4.
        inputs: the model, and how to train.
        imported: rotations from files.
        rows: calibration rows ``[tokens]``, on which statistics are captured where something is
            trained.
        options: may name statistics to use again.
        work: may hold them, or what was trained, and keeps both.
        clock: times the stages.
        prefix: ids of the tokens that stand before every row while statistics are captured.

    Raises:
        RotationError: a kind is refused, or the samples cannot be trained on.
    """
    check_offered(kinds, inputs.source.wiring)
    if not inputs.quantizes or not trainable(kinds, imported.kinds()):
        with clock.stage("train"):
            plain = () if inputs.quantizes else _missing(kinds, imported)
            own = TrainedRotations(_hadamards(trainable(plain), inputs))
            return _completed(own, kinds, inputs, imported)

    made_of = {
        "kinds": list(Rotate.of(kinds).certain),
        "prefix": list(prefix),
        "block": inputs.online_block,
        "scheme": repr(inputs.scheme),
    }
    kept = work.finished(ROTATIONS)
    if kept is not None:
        trained = load_trained(kept, made_of)
        if trained is not None:
            return trained
        work.remove(ROTATIONS)  # of a target that takes other kinds or blocks, or no prefix

    statistics = captured(inputs, rows, options, work, clock, prefix)
    folded = inputs.fuse(RotationSet(), clock, lazy=True)
    with clock.stage("train"):
        own = _trained(_missing(kinds, imported), inputs, statistics, folded, clock)
        trained = _completed(own, kinds, inputs, imported)
    work.keep(ROTATIONS, partial(save_trained, trained, made_of))
    return trained


def _missing(kinds: Collection[str], imported: RotationSet) -> tuple[Kind, ...]:
    """Those of ``kinds`` that no file holds."""
    return Rotate.of(set(kinds) - set(imported.kinds())).certain


def _completed(
    own: TrainedRotations, kinds: Collection[str], inputs: Inputs, imported: RotationSet
) -> TrainedRotations:
    """``own`` with the Hadamard matrices that run online, and what files hold in place of it."""
    online = online_rotations(
        inputs.source.wiring, _missing(kinds, imported), block=inputs.online_block
    )
    rotations = own.rotations.merged(online).merged(imported.of(kinds).values())
    return TrainedRotations(rotations, own.table, own.training)


def save_trained(trained: TrainedRotations, made_of: Mapping[str, object], folder: Path) -> None:
    """Keep rotations, with the tables that they were chosen by.

    Args:
        trained: what is kept.
        made_of: all that decides them beside recipe and inputs; what JSON can hold.
        folder: a new one.
    """
    save_rotations(trained.rotations, folder)
    values = {
        "format_version": 1,
        "of": dict(made_of),
        "table": [asdict(row) for row in trained.table],
        "training": [asdict(curve) for curve in trained.training],
    }
    write_sealed(folder / _CHOICE, values)


def load_trained(folder: Path, made_of: Mapping[str, object]) -> TrainedRotations | None:
    """What :func:`save_trained` has kept; ``None`` where it was made of something else.

    Raises:
        RotationError: it is damaged.
    """
    try:
        values = read_sealed(folder / _CHOICE, lambda values: None)
        if values["of"] != made_of:
            return None
        rows = [{**row, "layers": tuple(row["layers"])} for row in values["table"]]
        table = tuple(CandidateError(**row) for row in rows)
        training = tuple(map(_curve, values.get("training", ())))
    except (OSError, *MALFORMED) as error:
        raise RotationError(
            f"the rotations kept in '{folder}' cannot be read: {reason_of(error)}",
            hint="start in another --work-dir; what is in this one cannot be trusted",
        ) from error
    return TrainedRotations(load_rotations(folder), table, training)


def _curve(values: Mapping[str, Any]) -> TrainingCurve:
    """From JSON."""
    lists = {name: tuple(values[name]) for name in ("losses", "held_out_errors")}
    return TrainingCurve(**{**values, **lists})


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
    rows = {
        "r1": residual_rows(folded.state, folded.wiring),
        "r2": value_rows(folded.state, folded.wiring),
    }
    return judge_for(scheme, {name: own for name, own in rows.items() if own is not None})


def _trained(
    kinds: Collection[str],
    inputs: Inputs,
    statistics: Capture,
    folded: FusedModel | None,
    clock: Stopwatch,
) -> TrainedRotations:
    settings, seed = inputs.recipe.rotation, inputs.recipe.seed
    judge = judge_of(inputs.scheme, folded) if settings.select else None
    quantizer = activation_scheme(inputs.scheme) if judge is None else judge.quantizer
    return train_rotations(
        statistics,
        inputs.source.wiring,
        kinds,
        r1=_training(settings.r1, quantizer, seed),
        r2=_training(settings.r2, quantizer, seed),
        held_out=settings.held_out,
        judge=judge,
        device=inputs.device,
        progress=clock.progress,
    )


def _hadamards(kinds: Sequence[Kind], inputs: Inputs) -> RotationSet:
    source = inputs.source
    return hadamard_rotations(source.wiring, kinds, seed=inputs.recipe.seed)


def _training(settings: Training, quantizer: ActivationScheme | None, seed: int) -> TrainConfig:
    return TrainConfig(**settings.model_dump(), scheme=quantizer, seed=seed)
