"""Opening what an earlier run has calibrated, for ``--from-artifact`` and ``--resume``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from calib.artifact import QuantizedModel, load_artifact
from calib.errors import CheckpointError, RotqError
from exporter.recipe import recipe_of_artifact
from exporter.run.workdir import WALK
from exporter.run.writing import check_writable

if TYPE_CHECKING:
    from exporter.commands.export import Run


def open_artifact(run: Run, folder: Path, *, write: bool) -> QuantizedModel:
    """The artifact in ``folder``, of ``run``'s ``--from-artifact`` or of its work folder.

    With ``--from-artifact`` the recipe of ``run`` becomes the one that the artifact was made by,
    but for what is still to be done: a recipe that says otherwise would describe another model.

    Args:
        run: the run.
        folder: what ``rotq calibrate`` wrote, or a finished step.
        write: whether a backend will write it, and so must be able to express it.

    Raises:
        CheckpointError: the artifact is damaged, or made from another model than the one it is to
            be compared with.
        BackendError: the target cannot express it.
    """
    found, options = load_artifact(folder), run.options
    if write:
        cache = None if found.cache is None else found.cache.scheme
        check_writable(run, found.config, found.schemes(), cache, found.rotations.kinds())
    if options.from_artifact is not None:
        if write and options.verify:
            _check_original(run, found, folder)
        run.recipe = recipe_of_artifact(found.provenance.recipe, run.recipe, folder)
    else:
        _check_original(run, found, folder)
        assert options.work_dir is not None  # the artifact was found in it
        # A run may have ended between keeping the artifact and removing what it was made in.
        shutil.rmtree(options.work_dir / WALK, ignore_errors=True)
    return found


def _check_original(run: Run, artifact: QuantizedModel, folder: Path) -> None:
    """Refuse an artifact of other weights than those at hand."""
    travelled = run.options.from_artifact is not None
    try:
        fingerprint = run.fingerprint
    except RotqError:
        if travelled:
            return  # without its original; the parity check says what it cannot compare
        raise
    if fingerprint != artifact.provenance.fingerprint:
        raise CheckpointError(
            f"'{run.source.name}' is not the model that '{folder}' was made from: the fingerprint"
            " of its weights differs",
            hint=(
                "name the original with -m/--model, or give --no-verify"
                if travelled
                else "use another --work-dir"
            ),
        )
