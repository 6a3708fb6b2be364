"""The command ``sweep``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from calib.errors import RecipeError
from exporter.cli.charts import ChartFlag, check_chart, draw_compared
from exporter.cli.command import with_flags
from exporter.cli.errors import UsageError
from exporter.cli.number_options import DataFlags, EvalDataFlag, QuantizationFlags
from exporter.cli.options import (
    OUTPUT,
    RUN,
    BackendFlags,
    ModelFlags,
    RecipeFlag,
    TalkFlags,
    WritingFlags,
)
from exporter.cli.overrides import overrides
from exporter.cli.resolve import check_backend, resolve
from exporter.cli.session import print_json, running, set_up

EXAMPLES = (
    "rotq sweep --schemes int8,int4-weight-only --rotations none --rotations r1,r2,r4 -o out/sweep",
    "rotq sweep -m ./my-model --schemes int4-weight-only --vary weights.block_size=32,64,128 --vary"
    " weights.algorithm=rtn,gptq -o out/blocks",
    "rotq sweep --schemes int8,w4a8 -o out/sweep --resume --jobs 2",
)
GRID = "Grid"


@dataclass(frozen=True)
class GridFlags:
    """What is varied."""

    schemes: Annotated[
        list[str] | None,
        typer.Option(
            "--schemes",
            metavar="NAMES",
            help="Schemes, with commas or one at a time.",
            rich_help_panel=GRID,
        ),
    ] = None
    rotations: Annotated[
        list[str] | None,
        typer.Option(
            "--rotations",
            metavar="SET",
            help="A set of rotations as --rotate takes it (none, r1,r2,r4, auto); repeatable.",
            rich_help_panel=GRID,
        ),
    ] = None
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="KEY=VALUES",
            help="A recipe key and its values, with commas: weights.block_size=32,64; repeatable.",
            rich_help_panel=GRID,
        ),
    ] = None


@dataclass(frozen=True)
class SideBySideFlags:
    """How much runs at once."""

    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            metavar="N",
            min=1,
            help="Exports at once; default: as many as cores and memory allow.",
            rich_help_panel=RUN,
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="That all of them may take, such as 16GB; default: what is free.",
            rich_help_panel=RUN,
        ),
    ] = None
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the points that -o holds.", rich_help_panel=RUN),
    ] = False
    no_speed: Annotated[
        bool,
        typer.Option("--no-speed", help="Measure no tokens per second.", rich_help_panel=RUN),
    ] = False


@with_flags
def sweep(
    models: ModelFlags,
    backends: BackendFlags,
    writing: WritingFlags,
    quantization: QuantizationFlags,
    data: DataFlags,
    evaluation: EvalDataFlag,
    recipes: RecipeFlag,
    talk: TalkFlags,
    grids: GridFlags,
    beside: SideBySideFlags,
    charts: ChartFlag,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FOLDER",
            help="Gets an export for each point, and sweep.json.",
            rich_help_panel=OUTPUT,
        ),
    ] = Path("out/sweep"),
) -> None:
    """Export every combination of schemes, rotations and settings, and show what each costs.

    Exports run side by side and share what they capture. A point that fails is in the table with
    the reason. Exit code 1 means that none can be used.
    """
    set_up(talk)
    grid = _grid(grids)
    flags = overrides(models, backends, writing, quantization, data, evaluation)
    recipe = resolve(recipes.recipe, flags)
    check_backend(recipe, flags)
    if charts.chart is not None:
        check_chart(charts.chart)

    from exporter.recipe import parse_size
    from exporter.sweeping.sweep import SweepOptions
    from exporter.sweeping.sweep import sweep as run

    options = SweepOptions(
        output,
        resume=beside.resume,
        jobs=beside.jobs,
        max_memory=None if beside.memory is None else parse_size(beside.memory),
        speed=not beside.no_speed,
    )
    with running(talk, light=True) as progress:
        found = run(recipe, grid, options, progress=progress)

    if charts.chart is not None:
        known = [
            (point.name, point.perplexity, point.nbytes)
            for point in found.points
            if point.perplexity is not None
        ]
        draw_compared(known, charts.chart)
    if talk.json_output:
        print_json(found.as_dict())
    elif talk.quiet:
        for point in found.best:
            typer.echo(output / "points" / point.name)
    else:
        from exporter.console import output_console
        from exporter.console.show_sweep import show_sweep

        show_sweep(output_console(), found)
        if found.best:
            typer.echo(f"next:\n  rotq report {shlex.quote(str(output))}/points/NAME", err=True)
    raise typer.Exit(int(not found.best))


def _grid(given: GridFlags) -> dict[str, list[str]]:
    """Values by recipe key.

    Raises:
        UsageError: nothing varies, or an option cannot be read.
    """
    from exporter.recipe import Recipe

    grid: dict[str, list[str]] = {}
    if given.schemes:
        grid["scheme"] = [name for each in given.schemes for name in each.split(",") if name]
    if given.rotations:
        grid["rotate"] = list(given.rotations)
    for text in given.vary or ():
        key, sign, values = text.partition("=")
        try:
            Recipe.scope(key)
        except (RecipeError, KeyError) as error:
            raise UsageError(
                f"--vary '{text}': there is no recipe key '{key}'",
                hint="'rotq export --dry-run' prints the recipe with all keys",
            ) from error
        if not sign or not values:
            raise UsageError(f"--vary '{text}' has no values", hint="give KEY=VALUE,VALUE")
        grid[key] = [value for value in values.split(",") if value]
    if not grid:
        raise UsageError(
            "there is nothing to sweep over", hint="give --schemes, --rotations or --vary"
        )
    return grid
