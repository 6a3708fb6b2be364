"""The command ``stats``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calib.architectures import KINDS
from exporter.cli.command import with_flags
from exporter.cli.errors import UsageError
from exporter.cli.number_options import DataFlags, RotationFlags, SchemeFlag
from exporter.cli.options import (
    OUTPUT,
    QUANTIZATION,
    ModelFlags,
    OutputFlags,
    RecipeFlag,
    ResumeFlags,
    TalkFlags,
)
from exporter.cli.overrides import overrides
from exporter.cli.resolve import check_output, resolve
from exporter.cli.results import targets_for
from exporter.cli.session import print_json, running, set_up

if TYPE_CHECKING:
    from exporter.commands.stats import StatsResult
    from exporter.recipe import Recipe
    from exporter.run.options import RunOptions

EXAMPLES = (
    "rotq stats -m ./my-model --calib-dataset notes.jsonl -o out/stats",
    "rotq stats -m ./my-model --rotate none --scheme w4a4 -o out/stats",
    "rotq stats -m ./my-model --clusters 8 --cluster-jointly -o out/stats",
)
ROWS_SHOWN = 20
"""Linears in the table unless -v asks for all."""


@dataclass(frozen=True)
class StatsOutputFlags:
    """Where the result goes."""

    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FOLDER",
            help=("To create; default: out/ and a name made of model, scheme and target."),
            rich_help_panel=OUTPUT,
        ),
    ] = None
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace a folder that rotq wrote.", rich_help_panel=OUTPUT
        ),
    ] = False


@with_flags
def stats(
    models: ModelFlags,
    schemes: SchemeFlag,
    rotations: RotationFlags,
    data: DataFlags,
    recipes: RecipeFlag,
    resuming: ResumeFlags,
    outputs: StatsOutputFlags,
    talk: TalkFlags,
    clusters: Annotated[
        int | None,
        typer.Option(
            "--clusters",
            metavar="N",
            help=(
                "One static activation scale for each of so many clusters of channels; "
                "default: one."
            ),
            min=1,
            rich_help_panel=QUANTIZATION,
        ),
    ] = None,
    cluster_jointly: Annotated[
        bool,
        typer.Option(
            "--cluster-jointly",
            help="Cluster all linears that read the same channels at once.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = False,
) -> None:
    """Measure every decoder linear before and after rotation, and what the scheme does to it.

    Writes stats.json, stats.csv and stats.safetensors; the table is sorted by damage. --rotate is
    r1,r2,r4 unless given, as far as the model takes them.
    """
    set_up(talk)
    recipe = resolve(recipes.recipe, overrides(models, schemes, rotations, data))
    output = check_output(OutputFlags(outputs.output, outputs.overwrite), recipe, "stats", resuming)
    if clusters is not None:
        recipe = _clustered(recipe, clusters)
    if cluster_jointly and not (recipe.activations.granularity or "").startswith("cluster:"):
        raise UsageError(
            "--cluster-jointly has no effect without --clusters", hint="add --clusters K, such as 8"
        )
    from exporter.run.options import RunOptions
    from exporter.run.reservation import check_paths

    options = RunOptions(
        output,
        overwrite=outputs.overwrite,
        work_dir=resuming.work_dir,
        resume=resuming.resume,
        from_capture=resuming.from_capture,
    )
    check_paths(recipe, options)
    if outputs.output is None and not talk.quiet:
        typer.echo(f"no -o/--output given: writes '{output}'", err=True)
    _announce(recipe, options, talk)
    with running(talk, options.work_dir) as progress:
        from exporter.commands.stats import stats as run

        result = run(recipe, options, jointly=cluster_jointly, progress=progress)
    _print(result, talk)


def _announce(recipe: Recipe, options: RunOptions, talk: TalkFlags) -> None:
    """Say on stderr, before the long job, what it is going to do."""
    if talk.quiet:
        return
    from exporter.cli.settings import settings
    from exporter.console import error_console, show_settings

    typer.echo("rotq stats", err=True)
    shown = settings(recipe, options, "calibrate")
    if recipe.rotate.auto:
        shown["rotate"] = f"{recipe.rotate.sets(KINDS)[-1]}, as far as the model takes them"
    show_settings(error_console(), shown)


def _print(result: StatsResult, talk: TalkFlags) -> None:
    """Write the result to stdout: the document, the path alone, or the table."""
    if talk.json_output:
        print_json({"output": str(result.output), **result.report.model_dump(mode="json")})
        return
    if talk.quiet:
        typer.echo(result.output)
        return
    from exporter.console import output_console
    from exporter.console.show_stats import show_stats

    show_stats(output_console(), result.report, result.output, None if talk.verbose else ROWS_SHOWN)
    typer.echo(f"next:\n  {_after(result)}", err=True)


def _after(result: StatsResult) -> str:
    """What can be done next: an export, where some installed target can express the scheme."""
    from calib.rotations.rotate import Rotate
    from exporter.recipe import EMBEDDED, RECIPE_FILE

    recipe, rotate = result.recipe, result.report.rotate
    able = targets_for(recipe, Rotate.parse(rotate).certain)
    if not able:
        saved = shlex.quote(str(result.output / RECIPE_FILE))
        return (
            f"rotq calibrate --recipe {saved} --rotate {rotate} -o OUT"
            "  (no installed target can express it: see 'rotq backends')"
        )
    model = "" if recipe.model == EMBEDDED else f"-m {shlex.quote(recipe.model)} "
    backend, target = able[0]
    return (
        f"rotq export {model}--backend {backend} --target {target} --scheme {recipe.scheme}"
        f" --rotate {rotate} -o OUT"
    )


def _clustered(recipe: Recipe, clusters: int) -> Recipe:
    from exporter.run.quantizing import check_names

    activations = recipe.activations.model_copy(update={"granularity": f"cluster:{clusters}"})
    recipe = recipe.model_copy(update={"activations": activations})
    check_names(recipe)
    return recipe
