"""Layer-wise runs: what a recipe's ``layerwise`` section means, and the walk that produces the
artifact.

Nothing that needs the whole model is done: rotations are Hadamard matrices or come from files, and
no sets of them are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calib.errors import RecipeError
from exporter.recipe import Recipe, parse_size

if TYPE_CHECKING:
    from calib.artifact import QuantizedModel
    from exporter.commands.export import Run


def check_layerwise(recipe: Recipe) -> None:
    """Refuse what layer-wise mode cannot do, before anything is read.

    Raises:
        RecipeError: with the key and the reason.
    """
    settings = recipe.layerwise
    if not settings.enabled:
        if settings.asym:
            raise RecipeError(
                "recipe key 'layerwise.asym' has no effect",
                hint="add --layerwise, or leave --asym out",
            )
        return
    if recipe.rotate == "auto":
        raise RecipeError(
            "layer-wise mode cannot compare sets of rotations, which takes the whole model",
            hint=(
                "name them: --rotate none, or --rotate r1,r2,r4 for Hadamard matrices or those of"
                " --rotations"
            ),
        )


def quantize_layerwise(run: Run, work: Path, folder: Path) -> QuantizedModel:
    """Quantize block by block into ``folder``.

    Args:
        run: the run; its model is read by memory map.
        work: folder for shards and hidden states, on the same disk as ``folder``.
        folder: empty folder for the saved model.
    """
    from calib.data.batches import length_batches
    from calib.layerwise.calibrator import WalkSettings, quantize_blockwise
    from calib.rotations.rotation_set import hadamard_rotations
    from calib.smoothing.methods import smoothing_named
    from exporter.run.rotations import kinds_of

    recipe, settings = run.recipe, run.recipe.layerwise
    kinds = kinds_of(recipe.rotate)
    wanted = [kind for kind in kinds if kind not in run.given.kinds()]
    made = hadamard_rotations(run.source.wiring, wanted, seed=recipe.seed)
    fused = run.fuse(made.merged(run.given.of(kinds).values()), lazy=True)
    with run.stage("calibrate"):
        return quantize_blockwise(
            fused,
            run.quantization,
            length_batches(run.rows.train, recipe.calibration.batch_size),
            run.provenance(),
            work,
            folder,
            smoothing=smoothing_named(recipe.smoothing),
            files=run.source.files,
            walk=WalkSettings(
                device=run.device,
                asym=settings.asym,
                w_quant=settings.quantize_weights,
                a_quant=settings.quantize_activations,
                max_memory=parse_size(settings.max_memory),
                resume=run.options.resume,
                resumable=run.options.work_dir is not None,
                depends_on={"model": run.fingerprint},
            ),
            progress=run.progress,
        )
