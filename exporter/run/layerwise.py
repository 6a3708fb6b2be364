"""Layer-wise runs: the walk that quantizes block by block.

Nothing that needs the whole model is done: rotations are Hadamard matrices or come from files, and
no sets of them are compared.
"""

from __future__ import annotations

from pathlib import Path

from calib.artifact import QuantizedModel
from calib.data.batches import length_batches
from calib.layerwise.calibrator import WalkSettings, quantize_blockwise
from calib.rotations.rotate import Rotate
from calib.rotations.rotation_set import RotationSet, check_offered, hadamard_rotations
from calib.smoothing.methods import smoothing_named
from exporter.recipe import parse_size
from exporter.run.calibrating import Calibrating
from exporter.run.inputs import Inputs
from exporter.run.options import RunOptions
from exporter.run.stopwatch import Stopwatch


def layerwise_rotations(inputs: Inputs, imported: RotationSet) -> RotationSet:
    """The rotations that the recipe names: those of ``imported``, and Hadamard matrices.

    Raises:
        RotationError: the architecture refuses one.
    """
    source, kinds = inputs.source, inputs.recipe.rotate.certain
    check_offered(kinds, source.wiring)
    missing = Rotate.of(set(kinds) - set(imported.kinds())).certain
    seed, block = inputs.recipe.seed, inputs.online_block
    own = hadamard_rotations(source.wiring, missing, seed=seed, online_block=block)
    return own.merged(imported.of(kinds).values())


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
    fused = inputs.fuse(rotations, clock, fold_norms=calibrating.fold_norms, lazy=True)

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
                depends_on={"model": inputs.source.fingerprint},
            ),
            progress=clock.progress,
        )
