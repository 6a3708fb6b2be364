"""The command ``inspect``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from calib.errors import CheckpointError
from exporter.cli.command import with_flags
from exporter.cli.options import TalkFlags
from exporter.cli.session import print_json, running, set_up

EXAMPLES = (
    "rotq inspect out/demo",
    "rotq inspect out/calibrated -v",
    "rotq inspect out/demo --json",
)


@with_flags
def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What 'rotq export' or 'rotq calibrate' wrote.")
    ],
    talk: TalkFlags,
) -> None:
    """Show what a folder holds: what is quantized how, which kernels the runtime makes of it, bytes
    by kind.

    Everything is read from the files themselves; -v lists every linear. Files that were edited are
    named.
    """
    set_up(talk)
    _check_folder(folder)
    with running(talk) as progress:
        from exporter.commands.inspect import inspect_folder

        progress("inspect", 0, 1)
        inspection = inspect_folder(folder)
        progress("inspect", 1, 1)
    for what, names in inspection.edited.items():
        typer.echo(f"warning: {what} since the export: {', '.join(names)}", err=True)
    if talk.json_output:
        print_json(
            {
                **asdict(inspection),
                "schemes": inspection.schemes,
                "unfused": inspection.unfused,
                "nbytes": inspection.nbytes,
            }
        )
    elif talk.quiet:
        typer.echo(inspection.nbytes)
    else:
        from exporter.console import output_console
        from exporter.console.show_inspection import show_inspection

        show_inspection(output_console(), inspection, every=talk.verbose)


def _check_folder(folder: Path) -> None:
    # Before torch is imported: a mistyped path should not take ten seconds to be refused.
    from exporter.reporting.exported import is_export, what_to_give
    from exporter.reporting.report import REPORT_FILE

    if not is_export(folder) and not (folder / "quantized_model.json").is_file():
        raise CheckpointError(
            f"'{folder}' holds nothing that rotq wrote: neither {REPORT_FILE} nor"
            " quantized_model.json",
            hint=what_to_give(folder, "'rotq export' or 'rotq calibrate'"),
        )
