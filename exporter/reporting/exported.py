"""What lies in an exported folder beside its weights: the one way to read report and recipe of one,
and to tell whether it is still what was exported. Imports no torch.
"""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from calib.errors import CheckpointError, RecipeError
from calib.files.reading import reason_of
from calib.files.sealed import digest
from exporter.output import LIST_FILE, entries, is_hidden, replace_text
from exporter.recipe import RECIPE_FILE, Recipe, load_recipe
from exporter.reporting.card import PICTURES, render_card, stated_license
from exporter.reporting.report import CARD_FILE, PAGE_FILE, REPORT_FILE, Report

logger = logging.getLogger(__name__)

_LOADED = (
    *("*.safetensors", "*.onnx*", "*.bin", "*.pt", "*.pth", "*.gguf"),
    *("*.json", "*.py", "*.jinja", "*.model", "vocab.txt", "merges.txt"),
)
"""What runtimes and transformers look for in a folder, whether it was exported or not."""


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
    """Names of files that are ``missing`` from the folder, ``changed`` since it was exported, or
    ``added``; of the last, hidden ones (``.git``, ``.cache``) are no part of the export.

    Raises:
        CheckpointError: the report names no file.
    """
    if not report.checksums:
        raise CheckpointError(
            f"'{folder / REPORT_FILE}' holds no checksums: nothing says what was exported",
            hint="export the model again",
        )
    listed, here = report.checksums, set(entries(folder))
    added = here - listed.keys() - {REPORT_FILE, LIST_FILE}
    found = {
        "missing": [name for name in listed if name not in here],
        "changed": [name for name in here & listed.keys() if not _has(folder / name, listed[name])],
        "added": [name for name in added if not is_hidden(name)],
    }
    return {what: sorted(names) for what, names in found.items() if names}


def check_unchanged(folder: Path, report: Report) -> None:
    """Refuse a folder that is not what was exported. The card is for readers: an edited one passes.
    So do files that were added and that nothing loads, such as a licence, with a warning.

    Raises:
        CheckpointError: naming the files.
    """
    edited = {
        what: [name for name in names if name != CARD_FILE]
        for what, names in edited_files(folder, report).items()
    }
    harmless = [name for name in edited.get("added", ()) if not _is_loaded(name)]
    if harmless:
        logger.warning("'%s' holds what was not exported: %s", folder, ", ".join(harmless))
        edited["added"] = [name for name in edited["added"] if name not in harmless]
    problems = [f"{what}: {', '.join(names)}" for what, names in edited.items() if names]
    if problems:
        raise CheckpointError(
            f"'{folder}' is not what was exported ({'; '.join(problems)})",
            hint="restore the files, take away what was added, or export the model again",
        )


def check_expected(folder: Path, report: Report, sha256: str) -> None:
    """Refuse an export, which is unchanged, that is not the one meant. What nothing listed vouches
    for is refused here as well.

    Args:
        folder: the export.
        report: its report.
        sha256: :attr:`~exporter.reporting.report.Report.export_sha256` of the one that is meant.

    Raises:
        CheckpointError: it has another digest, or holds files beside those that it lists.
    """
    if report.export_sha256 != sha256.lower():
        raise CheckpointError(
            f"'{folder}' is not the export that was expected: its SHA-256 is"
            f" {report.export_sha256}, not {sha256.lower()}",
            hint="get the folder again, or the digest, from whoever exported it",
        )
    added = edited_files(folder, report).get("added")
    if added:
        raise CheckpointError(
            f"'{folder}' holds what was not exported, and the expected SHA-256 does not cover:"
            f" {', '.join(added)}",
            hint="take away what was added",
        )


def update_export(folder: Path, report: Report, recipe: Recipe) -> Report:
    """Write what a later check found into a folder: the report, and the card unless somebody has
    edited it. Each is replaced as a whole, and a link is not followed. Where the folder cannot be
    written, or holds another export by now, it stays as it is, with a warning.

    Args:
        folder: an exported one.
        report: with the new findings.
        recipe: the one in the folder.

    Returns:
        The report, with the checksum of the new card.

    Raises:
        CheckpointError: the folder is no longer an export.
    """
    try:
        before = read_report(folder)
        if before.checksums != report.checksums:
            logger.warning("'%s' was written anew meanwhile and is left as it is", folder)
            return report
        card = folder / CARD_FILE
        if CARD_FILE in report.checksums and card.is_file():
            pictures = [name for name in PICTURES if name in report.checksums]
            text = render_card(recipe, report, stated_license(card), pictures)
            ours = _has(card, report.checksums[CARD_FILE])
            if ours or card.read_bytes() == text.encode():  # it may have been killed after the card
                replace_text(card, text)
                checksums = {**report.checksums, CARD_FILE: digest(card)}
                report = report.model_copy(update={"checksums": checksums})
            else:
                logger.warning("'%s' was edited and is left as it is", card)
        if PAGE_FILE in report.checksums and report.status != before.status:
            logger.warning(
                "'%s' shows the check of the export and stays as it is, as the digest of the export"
                " covers it: 'rotq report %s' draws what was found now",
                *(folder / PAGE_FILE, folder),
            )
        report.save(folder)
    except OSError as error:
        logger.warning(
            "'%s' cannot be written (%s): what it says of itself stays as it was",
            folder,
            error.strerror or error,
        )
    return report


def _has(path: Path, checksum: str) -> bool:
    """Whether a file has this checksum; a link to a folder, or to nothing, has none."""
    return path.is_file() and digest(path) == checksum


def _is_loaded(name: str) -> bool:
    own = PurePosixPath(name).name.lower()
    return any(fnmatchcase(own, pattern) for pattern in _LOADED)


def _incomplete(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"'{folder}' is not a complete export ({REPORT_FILE}, {RECIPE_FILE}): {reason_of(error)}",
        hint="export the model again",
    )
