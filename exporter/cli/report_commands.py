"""The commands that show what is known of an export: ``report`` and ``diff``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calib.errors import OutputError
from exporter.cli.command import with_flags
from exporter.cli.options import OUTPUT, TalkFlags
from exporter.cli.session import print_json, running, set_up
from exporter.cli.verify_command import check_exported

REPORT_EXAMPLES = (
    "rotq report out/demo",
    "rotq report out/demo -o demo.html",
    "rotq export --backend onnx --report -o out/demo",
    "rotq report out/demo --json",
)
DIFF_EXAMPLES = ("rotq diff out/one out/other", "rotq diff out/one out/other --json")
_SUFFIX = ".html"


@with_flags
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What 'rotq export' wrote.")],
    talk: TalkFlags,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="To write, or to replace; default: the folder's name and .html, beside it.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """Draw one page of all that is known of an export: quality, choices, values before and after
    rotation, noise by layer, bytes, parity.

    The page needs nothing from a network. 'rotq export --report' puts it into the folder instead,
    and two pictures on the card. --json prints what is on it, and draws nothing.
    """
    set_up(talk)
    check_exported(folder)
    if talk.json_output:
        from exporter.commands.report import report_page

        print_json(report_page(folder).as_dict())
        return
    page = output or Path(f"{folder.resolve()}{_SUFFIX}")
    _check_page(page, folder)
    with running(talk) as progress:
        from exporter.commands.report import write_report

        progress("report", 0, 1)
        write_report(folder, page)
        progress("report", 1, 1)
    typer.echo(page)


def _check_page(page: Path, folder: Path) -> None:
    """Refuse a file that is not one, or that would be in the way, before anything is drawn.

    Raises:
        OutputError: with what to give instead.
    """
    if page.is_dir():
        raise OutputError(f"'{page}' is a folder", hint="give a file name to -o")
    if page.suffix.lower() != _SUFFIX:
        raise OutputError(
            f"'{page}' is no page: its name does not end in {_SUFFIX}",
            hint=f"give a name that ends in {_SUFFIX} to -o",
        )
    if not page.parent.is_dir():
        raise OutputError(f"the folder '{page.parent}' does not exist", hint="make it first")
    if page.resolve().parent.is_relative_to(folder.resolve()):
        raise OutputError(
            f"'{page}' is inside the export, which would no longer be what was exported",
            hint="write it elsewhere, or export with --report",
        )


@with_flags
def diff(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="What 'rotq export' wrote.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Another.")],
    talk: TalkFlags,
) -> None:
    """Show in what two exports differ: settings, rotations, stored numbers, figures, files.

    It goes by what each says of itself; 'rotq verify' tells whether that is still so. -v names
    every tensor.
    """
    from exporter.commands.diff import diff as run

    set_up(talk)
    for folder in (first, second):
        check_exported(folder)
    found = run(first, second)
    if talk.json_output:
        print_json(found.as_dict())
    elif talk.quiet:
        typer.echo("same" if found.same else "different")
    else:
        from exporter.console import output_console
        from exporter.console.show_diff import show_diff

        show_diff(output_console(), found, every=talk.verbose)
