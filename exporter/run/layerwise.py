"""Layer-wise runs: the walk that quantizes block by block.

Rotations are trained as in any run, on what a walk captures. No sets of them are compared, which
takes the whole model.
"""

from __future__ import annotations

from pathlib import Path

from calib.artifact import QuantizedModel
from calib.data.batches import length_batches
from calib.files.sealed import seal_of
from calib.layerwise.calibrator import WalkSettings, quantize_blockwise
from calib.layerwise.prefix import with_prefix_blockwise
from calib.rotations.from_capture import TrainedRotations
from calib.rotations.rotation_set import RotationSet
from calib.smoothing.methods import smoothing_named
from exporter.recipe import parse_size
from exporter.run.calibrating import Calibrating
from exporter.run.contents import rotations_digest
from exporter.run.options import RunOptions
from exporter.run.rotations import trained_rotations
from exporter.run.stopwatch import Stopwatch
from exporter.run.workdir import WorkDir


def layerwise_rotations(
    calibrating: Calibrating,
    imported: RotationSet,
    options: RunOptions,
    work: WorkDir,
    clock: Stopwatch,
) -> TrainedRotations:
    """The rotations that the recipe names: those of ``imported``, and trained ones; arguments and
    errors as for :func:`~exporter.run.rotations.trained_rotations`.
    """
    inputs, rows = calibrating.inputs, calibrating.rows.train
    kinds = inputs.recipe.rotate.certain
    return trained_rotations(
        kinds, inputs, imported, rows, options, work, clock, calibrating.tokens
    )


def quantize_layerwise(
    calibrating: Calibrating,
    rotations: RotationSet,
    options: RunOptions,
    clock: Stopwatch,
    work: Path,
    folder: Path,
) -> QuantizedModel:
    """Quantize block by block into ``folder``.

    Args:
        calibrating: what is done, to a model that is read by memory map.
        rotations: all of them.
        options: whether the walk is resumed, and whether it can be.
        clock: times the walk.
        work: folder for shards and hidden states, on the same disk as ``folder``.
        folder: empty folder for the saved model.
    """
    inputs = calibrating.inputs
    recipe, settings = inputs.recipe, inputs.recipe.layerwise
    folded = inputs.fuse(rotations, clock, fold_norms=calibrating.fold_norms, lazy=True)
    reason = "" if calibrating.prefix is None else calibrating.prefix.reason
    fused = with_prefix_blockwise(folded, calibrating.tokens, reason, inputs.device)

    with clock.stage("calibrate"):
        return quantize_blockwise(
            fused,
            calibrating.quantization,
            length_batches(calibrating.rows.train, recipe.calibration.batch_size),
            calibrating.provenance,
            work,
            folder,
            smoothing=smoothing_named(recipe.smoothing),
            files=inputs.source.files,
            walk=WalkSettings(
                device=inputs.device,
                asym=settings.asym,
                w_quant=settings.quantize_weights,
                a_quant=settings.quantize_activations,
                max_memory=parse_size(settings.max_memory),
                resume=options.resume,
                resumable=options.work_dir is not None,
                # a target, which a resume may change, decides on blocks, tables and a prefix
                depends_on={
                    "model": inputs.source.fingerprint,
                    "rotations": rotations_digest(rotations),
                    "quantization": seal_of({"": repr(calibrating.quantization)}),
                    "prefix": repr(calibrating.tokens),
                },
            ),
            progress=clock.progress,
        )
