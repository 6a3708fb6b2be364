"""What a command that exports or verifies prints at its end, and its exit code."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from exporter.cli.errors import DONE, PARITY_FAILED
from exporter.cli.options import TalkFlags
from exporter.cli.session import print_json

if TYPE_CHECKING:
    from exporter.recipe import Recipe
    from exporter.reporting.report import Report


def print_exported(
    output: Path,
    exported: Sequence[tuple[Path, Report]],
    talk: TalkFlags,
    stages: Collection[str] = (),
) -> None:
    """Write the result to stdout: the document, the path alone, or the summaries.

    Args:
        output: what ``-o`` named.
        exported: folder and report of each target; of the only one, ``output`` itself.
        talk: how much.
        stages: whose time is shown; by default that of all.
    """
    if talk.json_output:
        from exporter.reporting.summary import remedy_commands

        documents = [
            {
                "output": str(folder),
                "export_sha256": report.export_sha256,
                **({"commands": remedy_commands(report, folder)} if report.remedies else {}),
                **report.model_dump(mode="json"),
            }
            for folder, report in exported
        ]
        print_json(
            documents[0] if len(documents) == 1 else {"output": str(output), "targets": documents}
        )
    elif talk.quiet:
        typer.echo(output)
    else:
        from exporter.console import output_console, show_report

        for folder, report in exported:
            show_report(output_console(), report, folder, stages)


def parity_exit_code(report: Report, folder: Path, talk: TalkFlags) -> int:
    """0, or 3 with a line on stderr for a report that is marked failed; what was not run is warned
    of.
    """
    from exporter.reporting.summary import failed_rows, remedy_commands, runtime_lines

    if report.status == "failed":
        typer.echo(f"error: parity failed: {'; '.join(failed_rows(report))}", err=True)
        commands = remedy_commands(report, folder)
        advice = f"; try: {commands[0]}" if commands else "; try another --rotate or --scheme"
        typer.echo(
            f"hint: '{folder}' is kept and marked failed; do not deploy it{advice}", err=True
        )
        return PARITY_FAILED
    if report.status == "unverified" and report.parity and not talk.quiet:
        reasons = "; ".join(runtime_lines(report))
        typer.echo(
            f"warning: '{folder}' was not verified: {reasons}; run 'rotq verify' where it can run",
            err=True,
        )
    return DONE


def targets_for(recipe: Recipe, rotations: Collection[str]) -> list[tuple[str, str]]:
    """Installed backends and targets that can express a calibrated model; the recipe's own come
    first.

    Args:
        recipe: its scheme, overrides and cache.
        rotations: kinds of rotations that it has.
    """
    from backends.asking import expressible
    from backends.registry import available, get_backend
    from calib.schemes import KV_SCHEMES, scheme_named
    from exporter.run.quantizing import customised_scheme

    names = [info.name for info in available() if info.error is None]
    presets = [customised_scheme(recipe), *map(scheme_named, recipe.overrides.values())]
    linears = [preset.linear for preset in presets if preset.linear is not None]
    cache = None if recipe.kv is None else KV_SCHEMES[recipe.kv]
    able = [
        (name, target)
        for name in sorted(names, key=lambda name: name != recipe.backend)
        for backend in [get_backend(name)]
        for target in backend.targets
        if expressible(backend, target, linears, cache, rotations)
    ]
    return sorted(able, key=lambda pair: pair[1] not in recipe.targets)
