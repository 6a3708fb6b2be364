"""What a run writes to, checked and held before the long job. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calib.errors import OutputError
from exporter.output import Claim, check_target, claimed, is_in, locked, making, sweep
from exporter.recipe import Recipe
from exporter.run.options import RunOptions


def check_paths(recipe: Recipe, options: RunOptions) -> None:
    """Refuse an output that cannot be written, or with which something would go that the run reads.

    Raises:
        OutputError: as :func:`~exporter.output.check_target`; or the output is an input or the work
            folder of the run, or holds it; the profile cannot be written.
    """
    check_target(options.output, options.overwrite)
    for what, path in _inputs(recipe, options):
        if _is_here(path) and is_in(path, options.output):
            raise OutputError(
                f"the output '{options.output}' is {what} '{path}', or holds it",
                hint="choose another -o/--output: what a run reads is never overwritten",
            )
    profile = options.profile
    if profile is not None and (profile.is_dir() or not profile.absolute().parent.is_dir()):
        raise OutputError(
            f"the profile '{profile}' cannot be written: it is a folder, or is in none",
            hint="--profile takes a file in a folder that exists",
        )
    work = options.work_dir
    if work is not None and (is_in(work, options.output) or is_in(options.output, work)):
        raise OutputError(
            f"the output '{options.output}' and the work folder '{work}' are one, or one holds the"
            " other",
            hint="choose another -o/--output or --work-dir",
        )


@contextmanager
def reserved(recipe: Recipe, options: RunOptions) -> Iterator[Claim]:
    """Hold the output and the work folder of a run for this process alone.

    Raises:
        OutputError: as :func:`check_paths`; one of them is in use by another run, or cannot be
            written.
    """
    check_paths(recipe, options)
    with claimed(options.output, overwrite=options.overwrite) as claim:
        if options.work_dir is None:
            yield claim
            return
        with _work_folder(options.work_dir):
            yield claim


@contextmanager
def _work_folder(folder: Path) -> Iterator[None]:
    hint = "wait for that run to end, or choose another --work-dir"
    ready = False
    try:
        with making(folder), locked(folder, f"the work folder '{folder}'", hint):
            sweep(folder)
            ready = True
            yield
    except OSError as error:
        if ready:
            raise
        raise OutputError(
            f"cannot write in the work folder '{folder}': {error.strerror or error}",
            hint="choose another --work-dir",
        ) from error


def _is_here(path: Path) -> bool:
    """Whether there is such a path, as far as anybody can tell: names on the hub are none."""
    try:
        return path.exists()
    except OSError:  # too long for a path, or in a folder that is closed to this user
        return False


def _inputs(recipe: Recipe, options: RunOptions) -> Iterator[tuple[str, Path]]:
    """Everything that a run may read, in words and where it would be if it is here."""
    yield "the model", _expanded(recipe.model)
    if options.from_artifact is not None:
        yield "the artifact", options.from_artifact
    if options.from_capture is not None:
        yield "the capture", options.from_capture
    for file in recipe.rotation.files:
        yield "the rotations", Path(file)
    yield "the calibration text", Path(recipe.calibration.dataset)
    if recipe.evaluation.dataset is not None:
        yield "the evaluation text", Path(recipe.evaluation.dataset)


def _expanded(model: str) -> Path:
    try:
        return Path(model).expanduser()
    except RuntimeError:  # there is no such user
        return Path(model)
