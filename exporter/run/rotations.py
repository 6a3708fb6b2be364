"""Where the rotations of a run come from: files, training, or a Hadamard matrix."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from calib.architectures import Kind
from calib.capture.storage import Capture
from calib.errors import RotationError
from calib.fusing import FusedModel
from calib.rotations.foreign import import_rotations
from calib.rotations.from_capture import TrainedRotations, train_rotations
from calib.rotations.objectives import ActivationScheme
from calib.rotations.readers import residual_rows, value_rows
from calib.rotations.rotate import GateSet, Rotate, gate_sets, trainable, union
from calib.rotations.rotation_set import (
    RotationSet,
    check_offered,
    hadamard_rotations,
    online_rotations,
)
from calib.rotations.selection import Judge, integer_quantizer, judge_for
from calib.rotations.train_config import TrainConfig
from calib.schemes import Scheme
from exporter.recipe import Recipe, Training
from exporter.run.capturing import captured
from exporter.run.inputs import Inputs
from exporter.run.options import RunOptions
from exporter.run.stopwatch import Stopwatch
from exporter.run.workdir import WorkDir
from exporter.source import Source


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
        work: may hold them, and keeps them.
        clock: times the stages.
        prefix: ids of the tokens that stand before every row while statistics are captured.

    Raises:
        RotationError: a kind is refused, or the samples cannot be trained on.
    """
    source = inputs.source
    check_offered(kinds, source.wiring)
    statistics = folded = None
    if inputs.quantizes and trainable(kinds, imported.kinds()):
        statistics = captured(inputs, rows, options, work, clock, prefix)
        folded = inputs.fuse(RotationSet(), clock, lazy=True)

    with clock.stage("train"):
        missing = Rotate.of(set(kinds) - set(imported.kinds())).certain
        if statistics is not None:
            own = _trained(missing, inputs, statistics, folded, clock)
        else:
            plain = () if inputs.quantizes else trainable(missing)
            own = TrainedRotations(_hadamards(plain, inputs))
        online = online_rotations(source.wiring, missing, block=inputs.online_block)
        rotations = own.rotations.merged(online).merged(imported.of(kinds).values())
        return TrainedRotations(rotations, own.table)


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
