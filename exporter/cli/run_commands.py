"""The commands that make something: ``export``, ``capture``, ``calibrate`` and ``rotate``."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calib.errors import RecipeError
from exporter.cli.command import with_flags
from exporter.cli.errors import UsageError
from exporter.cli.number_options import (
    DataFlags,
    EvalDataFlag,
    QuantizationFlags,
    RotationFlags,
    SchemeFlag,
)
from exporter.cli.options import (
    OUTPUT,
    ROTATION,
    RUN,
    BackendFlags,
    ModelFlags,
    OutputFlags,
    RecipeFlag,
    ResumeFlags,
    TalkFlags,
    WritingFlags,
)
from exporter.cli.overrides import overrides
from exporter.cli.resolve import check_backend, check_output, resolve
from exporter.cli.results import parity_exit_code, print_exported, targets_for
from exporter.cli.session import print_json, running, set_up

if TYPE_CHECKING:
    from exporter.planning.stages import Goal
    from exporter.recipe import Recipe
    from exporter.run.options import RunOptions

EXPORT_EXAMPLES = (
    "rotq export --backend onnx -o out/demo",
    "rotq export -m meta-llama/Llama-3.2-1B --backend onnx --rotate r1,r2,r4 -o out/llama",
    "rotq export -m ./my-model --calib-dataset notes.jsonl --nsamples 64 -o out/mine",
    "rotq export --recipe int8-reference -m ./my-model --dry-run",
    (
        "rotq export --from-artifact out/calibrated --backend onnx --target ort --target openvino"
        " -o out/onnx"
    ),
)
CAPTURE_EXAMPLES = (
    "rotq capture -m ./my-model --calib-dataset wikitext2 -o out/capture",
    "rotq export -m ./my-model --from-capture out/capture -o out/mine",
)
ROTATE_EXAMPLES = (
    "rotq rotate -m ./my-model --calib-dataset notes.jsonl -o out/rotated",
    "rotq rotate -m ./my-model --rotations r1.pt --rotations r2.pt -o out/rotated",
    "rotq rotate -m ./my-model --dtype float32 --write-dartquant -o out/rotated",
)
CALIBRATE_EXAMPLES = (
    "rotq calibrate -m ./my-model --scheme int8 -o out/calibrated",
    "rotq calibrate -m ./my-model --scheme int4-weight-only --weight-algorithm gptq -o out/gptq",
    (
        "rotq calibrate -m ./my-model --scheme w4a8 --override '*.down_proj=int8' --kv int8 -o"
        " out/mixed"
    ),
    "rotq calibrate -m ./large-model --layerwise --rotate r1,r2 --work-dir work -o out/large",
    "rotq export --from-artifact out/calibrated --backend onnx -o out/onnx",
)


@with_flags
def export(
    models: ModelFlags,
    backends: BackendFlags,
    writing: WritingFlags,
    schemes: SchemeFlag,
    quantization: QuantizationFlags,
    rotations: RotationFlags,
    data: DataFlags,
    evaluation: EvalDataFlag,
    recipes: RecipeFlag,
    resuming: ResumeFlags,
    outputs: OutputFlags,
    talk: TalkFlags,
    from_artifact: Annotated[
        Path | None,
        typer.Option(
            "--from-artifact",
            metavar="FOLDER",
            help="Of 'rotq calibrate': only write and verify.",
            rich_help_panel=RUN,
        ),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip the parity check.", rich_help_panel=RUN)
    ] = False,
    retry: Annotated[
        bool,
        typer.Option(
            "--retry",
            help="Where parity fails, try what would most likely mend it, and keep the first that"
            " passes.",
            rich_help_panel=RUN,
        ),
    ] = False,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Draw report.html into the folder, and two pictures for the card.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
) -> None:
    """Rotate, calibrate, quantize, write for a runtime, and check parity in that runtime.

    Several targets share one calibration, and either all of their folders appear or none. Exit code
    3 means: exported, but parity failed; the folder is kept and marked failed.
    """
    set_up(talk)
    if retry:
        _check_retry(verify=not no_verify, from_artifact=from_artifact)
    flags = overrides(models, backends, writing, schemes, quantization, rotations, data, evaluation)
    recipe = resolve(recipes.recipe, flags, from_artifact)
    check_backend(recipe, flags)
    options = _run_options(
        outputs,
        resuming,
        recipe,
        "export",
        verify=not no_verify,
        from_artifact=from_artifact,
        report=report,
    )
    if _announced_only(recipe, options, "export", outputs, talk):
        return
    with running(talk, options.work_dir) as progress:
        if retry:
            from exporter.commands.retry import export_until_passed as run
        else:
            from exporter.commands.export import export as run

        result = run(recipe, options, progress=progress)
    exported = [(folder, result.reports[target]) for target, folder in result.folders.items()]
    print_exported(result.output, exported, talk)
    if not talk.quiet:
        folder = shlex.quote(str(exported[0][0]))
        _say(
            "next:",
            f"rotq verify {folder}",
            f"rotq inspect {folder}",
            f"rotq eval {folder} --text FILE",
            f"rotq report {folder}",
        )
    raise typer.Exit(max(parity_exit_code(own, folder, talk) for folder, own in exported))


@with_flags
def capture(
    models: ModelFlags, data: DataFlags, recipes: RecipeFlag, outputs: OutputFlags, talk: TalkFlags
) -> None:
    """Capture the statistics that rotations are trained on, and stop there.

    Memory and disk stay bounded whatever --nsamples is: covariances and a token reservoir, not
    activations.
    """
    set_up(talk)
    recipe = resolve(recipes.recipe, overrides(models, data))
    options = _run_options(outputs, None, recipe, "capture")
    if _announced_only(recipe, options, "capture", outputs, talk):
        return
    with running(talk, options.work_dir) as progress:
        from exporter.commands.export import run_capture

        folder = run_capture(recipe, options, progress=progress)
    _print_folder(folder, talk)
    if not talk.quiet:
        _say(
            "next:",
            f"rotq export {_model_option(recipe)}--from-capture {shlex.quote(str(folder))} -o OUT",
        )


@with_flags
def calibrate(
    models: ModelFlags,
    backends: BackendFlags,
    schemes: SchemeFlag,
    quantization: QuantizationFlags,
    rotations: RotationFlags,
    data: DataFlags,
    recipes: RecipeFlag,
    resuming: ResumeFlags,
    outputs: OutputFlags,
    talk: TalkFlags,
) -> None:
    """Rotate, calibrate and quantize, and stop at the saved model that no runtime has shaped yet.

    'rotq export --from-artifact' writes it for a runtime, without a GPU and without calibrating
    again. --backend and --target only decide the dtype here: every scheme can be calibrated, also
    one that no installed backend writes.
    """
    set_up(talk)
    flags = overrides(models, backends, schemes, quantization, rotations, data)
    recipe = resolve(recipes.recipe, flags)
    check_backend(recipe, flags, write=False)
    options = _run_options(outputs, resuming, recipe, "calibrate")
    if _announced_only(recipe, options, "calibrate", outputs, talk):
        return
    with running(talk, options.work_dir) as progress:
        from exporter.commands.export import calibrate as run

        result = run(recipe, options, progress=progress)
    _print_folder(result.output, talk)
    if not talk.quiet:
        _say(
            "next:",
            *_after_calibrating(
                recipe, result.quantized.rotations.kinds(), shlex.quote(str(result.output))
            ),
        )


@with_flags
def rotate(
    models: ModelFlags,
    schemes: SchemeFlag,
    rotations: RotationFlags,
    data: DataFlags,
    recipes: RecipeFlag,
    resuming: ResumeFlags,
    outputs: OutputFlags,
    talk: TalkFlags,
    write_dartquant: Annotated[
        bool,
        typer.Option(
            "--write-dartquant", help="Also write r1.pt and r2.pt.", rich_help_panel=ROTATION
        ),
    ] = False,
) -> None:
    """Fold norms and rotations into the weights, and write a float checkpoint that loads like the
    original.

    Rotations are chosen for --scheme, but nothing is quantized. --rotate is r1,r2 unless given:
    what runs online (r3, r4) cannot be in a stock folder. --dtype auto is the source's own.
    """
    set_up(talk)
    recipe = resolve(recipes.recipe, overrides(models, schemes, rotations, data))
    options = _run_options(outputs, resuming, recipe, "rotate")
    if _announced_only(recipe, options, "rotate", outputs, talk):
        return
    with running(talk, options.work_dir) as progress:
        from exporter.commands.rotate import rotate as run

        result = run(recipe, options, write_dartquant=write_dartquant, progress=progress)
    if talk.json_output:
        print_json({"output": str(result.output), **result.report.model_dump(mode="json")})
    elif talk.quiet:
        typer.echo(result.output)
    else:
        from exporter.console import output_console, show_rotated

        show_rotated(output_console(), result.report, result.output)
        folder = shlex.quote(str(result.output))
        _say(
            "next:",
            f"rotq eval {folder} --text FILE",
            f"rotq export -m {folder} --rotate none -o OUT",
        )


def _check_retry(*, verify: bool, from_artifact: Path | None) -> None:
    """As the run does, but before the recipe is read, and as wrong usage."""
    from exporter.run.options import check_retry

    try:
        check_retry(verify=verify, from_artifact=from_artifact)
    except RecipeError as error:
        raise UsageError(error.message, error.hint or "") from error


def _run_options(
    outputs: OutputFlags,
    resuming: ResumeFlags | None,
    recipe: Recipe,
    goal: Goal,
    *,
    verify: bool = True,
    from_artifact: Path | None = None,
    report: bool = False,
) -> RunOptions:
    output = check_output(outputs, recipe, goal, resuming)
    from exporter.run.options import RunOptions

    return RunOptions(
        output=output,
        overwrite=outputs.overwrite,
        verify=verify,
        work_dir=resuming.work_dir if resuming else None,
        resume=bool(resuming and resuming.resume),
        from_artifact=from_artifact,
        from_capture=resuming.from_capture if resuming else None,
        report=report,
        profile=outputs.profile,
    )


def _announced_only(
    recipe: Recipe, options: RunOptions, goal: Goal, outputs: OutputFlags, talk: TalkFlags
) -> bool:
    """Print the plan of a dry run, or the settings of a real one; whether it was a dry run."""
    from exporter.run.reservation import check_paths

    if outputs.output is not None or not outputs.dry_run:
        check_paths(recipe, options)
    if outputs.output is None and not talk.quiet and not outputs.dry_run:
        _say(f"no -o/--output given: writes '{options.output}'")
    if outputs.dry_run:
        _print_plan(recipe, options, goal, talk)
    else:
        _print_settings(recipe, options, goal, talk)
    return outputs.dry_run


def _print_plan(recipe: Recipe, options: RunOptions, goal: Goal, talk: TalkFlags) -> None:
    from exporter.planning.plan import plan

    planned = plan(recipe, options, goal=goal)
    if talk.json_output:
        print_json(planned.as_dict())
    else:
        from exporter.console import output_console, show_plan

        show_plan(output_console(), planned)


def _print_settings(recipe: Recipe, options: RunOptions, goal: Goal, talk: TalkFlags) -> None:
    """Say on stderr, before the long job, what it is going to do."""
    if talk.quiet:
        return
    from exporter.cli.settings import settings
    from exporter.console import error_console, show_settings

    _say(f"rotq {goal}")
    show_settings(error_console(), settings(recipe, options, goal))


def _print_folder(folder: Path, talk: TalkFlags) -> None:
    if talk.json_output:
        print_json({"output": str(folder)})
    else:
        typer.echo(folder)


def _after_calibrating(recipe: Recipe, rotations: Collection[str], artifact: str) -> list[str]:
    """What can be done with an artifact: written, where some installed target can express it; else
    only measured.
    """
    able = targets_for(recipe, rotations)
    if not able:
        return [
            f"rotq eval {artifact} --text FILE  (no installed target can express it: see 'rotq"
            " backends')"
        ]
    backend, target = able[0]
    return [f"rotq export --from-artifact {artifact} --backend {backend} --target {target} -o OUT"]


def _model_option(recipe: Recipe) -> str:
    from exporter.recipe import EMBEDDED

    return "" if recipe.model == EMBEDDED else f"-m {shlex.quote(recipe.model)} "


def _say(*lines: str) -> None:
    typer.echo("\n  ".join(lines), err=True)
