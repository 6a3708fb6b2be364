"""The command ``verify``, and what commands ask of an exported folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from calib.errors import CheckpointError
from exporter.cli.command import with_flags
from exporter.cli.errors import UsageError
from exporter.cli.options import TalkFlags
from exporter.cli.results import parity_exit_code, print_exported
from exporter.cli.session import running, set_up

EXAMPLES = (
    "rotq verify out/demo",
    "rotq verify out/mine -m ./my-model --rows 8",
    "rotq verify out/demo --json",
    "rotq verify out/demo --expect-sha256 DIGEST",
)
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@with_flags
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What 'rotq export' wrote.")],
    talk: TalkFlags,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="The float model, if it is no longer where it was.",
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows", metavar="ROWS", min=1, help="Evaluation rows; default: the recipe's."
        ),
    ] = None,
    expect_sha256: Annotated[
        str | None,
        typer.Option(
            "--expect-sha256",
            metavar="DIGEST",
            help="Refuse another export than this: what 'rotq export' printed.",
        ),
    ] = None,
) -> None:
    """Repeat the parity check on an exported folder, in its runtime, and update its report.

    Exit code 3 means: parity failed; the folder is marked failed.
    """
    set_up(talk)
    if expect_sha256 is not None and not _SHA256.fullmatch(expect_sha256):
        raise UsageError(
            f"--expect-sha256 '{expect_sha256}' is no SHA-256",
            hint="give the 64 hexadecimal digits that 'rotq export' printed",
        )
    check_exported(folder)
    with running(talk) as progress:
        from exporter.commands.verify import verify as run

        report = run(folder, model=model, rows=rows, expect_sha256=expect_sha256, progress=progress)
    print_exported(folder, [(folder, report)], talk, stages=("verify",))
    raise typer.Exit(parity_exit_code(report, folder, talk))


def check_exported(folder: Path) -> None:
    """Refuse what is no exported folder.

    Raises:
        CheckpointError: it has no report.
    """
    # Before torch is imported: a mistyped path should not take ten seconds to be refused.
    from exporter.reporting.exported import is_export, what_to_give
    from exporter.reporting.report import REPORT_FILE

    if not is_export(folder):
        raise CheckpointError(
            f"'{folder}' is not an exported folder: it has no {REPORT_FILE}",
            hint=what_to_give(folder, "'rotq export -o'"),
        )
