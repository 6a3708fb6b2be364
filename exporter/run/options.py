"""What a run is told besides its recipe. Apart from the pipeline, so that the command line can
build and check it without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calib.errors import RecipeError


@dataclass(frozen=True)
class RunOptions:
    """Where a run writes, and what it may reuse. None of it changes the numbers, so none of it is
    in the recipe.
    """

    output: Path
    overwrite: bool = False
    verify: bool = True
    work_dir: Path | None = None
    resume: bool = False
    from_artifact: Path | None = None
    """A saved quantized model to write: nothing is calibrated."""
    from_capture: Path | None = None
    """Captured statistics to train on: nothing is captured."""
    shared_capture: Path | None = None
    """A folder for the statistics of several runs: those in it are used where they are of the same
    prefix, and where there is none, it is written."""
    report: bool = False
    """Write the page of the report, with charts, into the folder of each target."""
    profile: Path | None = None
    """A file to write what every stage took into: see
    :meth:`exporter.run.stopwatch.Stopwatch.profile`."""


def check_retry(*, verify: bool, from_artifact: Path | None) -> None:
    """Refuse ``--retry`` where nothing is checked, or nothing that is checked can change.

    Raises:
        RecipeError: with the option that is in the way.
    """
    if not verify:
        raise RecipeError(
            "--retry needs the parity check that --no-verify skips", hint="give one of them"
        )
    if from_artifact is not None:
        raise RecipeError(
            "--retry has no effect with --from-artifact: the artifact is quantized already",
            hint="export from the model, or leave --retry out",
        )
