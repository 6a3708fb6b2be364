"""What lies in an exported folder beside its weights: the one way to read report and recipe of one,
and to tell whether it is still what was exported. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from calib.errors import CheckpointError, RecipeError
from exporter.output import sha256_tree
from exporter.recipe import RECIPE_FILE, Recipe, load_recipe
from exporter.reporting.report import REPORT_FILE, Report


def is_export(folder: Path) -> bool:
    """Whether ``folder`` says of itself that rotq exported it."""
    return (folder / REPORT_FILE).is_file()


def what_to_give(folder: Path, commands: str) -> str:
    """The hint for a folder that is not what it should be: those inside it that are, as after an
    export for several targets, or else which ``commands`` write one.
    """
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{REPORT_FILE}"))
    return f"give one of {', '.join(inside)}" if inside else f"give what {commands} wrote"


def read_report(folder: Path) -> Report:
    """The report of an exported folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return Report.load(folder)
    except (OSError, ValueError) as error:
        raise _incomplete(folder, error) from error


def read_export(folder: Path) -> tuple[Report, Recipe]:
    """Report and recipe of an exported folder.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    report = read_report(folder)
    try:
        return report, load_recipe(folder / RECIPE_FILE)
    except RecipeError as error:
        raise _incomplete(folder, error) from error


def edited_files(folder: Path, report: Report) -> dict[str, list[str]]:
    """Names of files that are ``missing`` from the folder or ``changed`` since it was exported."""
    checksums = sha256_tree(folder, exclude=(REPORT_FILE,))
    missing = sorted(report.checksums.keys() - checksums.keys())
    changed = sorted(
        name
        for name in report.checksums.keys() & checksums.keys()
        if report.checksums[name] != checksums[name]
    )
    return {what: names for what, names in (("missing", missing), ("changed", changed)) if names}


def check_unchanged(folder: Path, report: Report) -> None:
    """Refuse a folder that is not what was exported.

    Raises:
        CheckpointError: naming the files.
    """
    problems = [
        f"{what}: {', '.join(names)}" for what, names in edited_files(folder, report).items()
    ]
    if problems:
        raise CheckpointError(
            f"'{folder}' is not what was exported ({'; '.join(problems)})",
            hint="export the model again, or restore the files",
        )


def _incomplete(folder: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(
        f"'{folder}' is not a complete export ({REPORT_FILE}, {RECIPE_FILE}): {reason}",
        hint="export the model again",
    )
