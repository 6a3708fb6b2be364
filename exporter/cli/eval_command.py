"""The command ``eval``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calib.errors import DataError
from exporter.cli.charts import ChartFlag, check_chart, draw_compared
from exporter.cli.command import with_flags
from exporter.cli.errors import UsageError
from exporter.cli.options import TalkFlags
from exporter.cli.resolve import check_device
from exporter.cli.session import print_json, running, set_up

if TYPE_CHECKING:
    from exporter.commands.evaluate import EvalResult

EXAMPLES = (
    "rotq eval out/demo",
    "rotq eval out/mine --text test.txt --window 512 --stride 256",
    "rotq eval ./my-model --text test.txt --device cuda",
    "rotq eval out/mine --tasks arc_easy,hellaswag --limit 200",
    "rotq eval out/int8 out/int4 --reference ./my-model --chart sizes.svg",
)
TASKS = "Tasks"


@dataclass(frozen=True)
class TextFlags:
    """Which text is scored, and how."""

    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="File or hub data set; default: the embedded evaluation text.",
        ),
    ] = None
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="Also compare predictions with those of this one, as the float model: KL, top-1,"
            " top-5.",
        ),
    ] = None
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            metavar="TOKENS",
            min=2,
            help="Tokens the model sees at once; default: 2048, or what it takes.",
        ),
    ] = None
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            metavar="TOKENS",
            min=1,
            help="Tokens that windows move on by; default: the window.",
        ),
    ] = None
    nsamples: Annotated[
        int | None,
        typer.Option("--nsamples", metavar="N", min=1, help="Documents; default: all."),
    ] = None


@dataclass(frozen=True)
class TaskFlags:
    """Tasks of lm-evaluation-harness."""

    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAME",
            help="Instead of perplexity, tasks of lm-evaluation-harness, also as a list with"
            " commas; needs lm-eval.",
            rich_help_panel=TASKS,
        ),
    ] = None
    tasks_folder: Annotated[
        Path | None,
        typer.Option(
            "--tasks-folder",
            metavar="FOLDER",
            help="With tasks of your own, as YAML; Python code in it is run.",
            rich_help_panel=TASKS,
        ),
    ] = None
    shots: Annotated[
        int | None,
        typer.Option(
            "--shots",
            metavar="N",
            min=0,
            help="Examples before each question; default: as the task says.",
            rich_help_panel=TASKS,
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            min=1,
            help="Documents of each task; default: all.",
            rich_help_panel=TASKS,
        ),
    ] = None
    chat_template: Annotated[
        bool,
        typer.Option(
            "--chat-template",
            help="Put questions through the chat template.",
            rich_help_panel=TASKS,
        ),
    ] = False

    @property
    def names(self) -> list[str]:
        """One by one."""
        return [name for each in self.tasks or () for name in each.split(",") if name]


@with_flags
def evaluate(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Exported or calibrated folder, checkpoint folder or hub id; several are"
            " compared.",
        ),
    ],
    talk: TalkFlags,
    texts: TextFlags,
    harness: TaskFlags,
    charts: ChartFlag,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="auto, cpu, cuda or cuda:N; default: auto, CUDA where there is one.",
        ),
    ] = "auto",
) -> None:
    """Perplexity of exported folders in their runtimes, or of artifacts and checkpoints in torch;
    or with --tasks what lm-evaluation-harness makes of them.

    Windows slide by --stride, and each token counts once, so figures of different windows can be
    compared. Several sources are scored one after the other on the same text.
    """
    set_up(talk)
    check_device(device)
    _check_moot(texts, harness, charts)
    if texts.text is not None and Path(texts.text).suffix and not Path(texts.text).is_file():
        raise DataError(
            f"the text file '{texts.text}' does not exist", hint="give a readable file to --text"
        )
    if charts.chart is not None:
        check_chart(charts.chart)
    if harness.names:
        _run_tasks(source, harness, texts.window, device, talk)
        return

    results = []
    with running(talk) as progress:
        from exporter.commands.evaluate import evaluate as run

        for each in source:
            results.append(run(each, **asdict(texts), device=device, progress=progress))
    if charts.chart is not None:
        sizes = [
            (name, result.perplexity, result.nbytes)
            for name, result in zip(source, results, strict=True)
        ]
        draw_compared(sizes, charts.chart)
    _print(source, results, texts.text, talk)


def _check_moot(texts: TextFlags, harness: TaskFlags, charts: ChartFlag) -> None:
    """Refuse options that would do nothing.

    Raises:
        UsageError: naming them.
    """
    given = asdict(harness) if not harness.names else {**asdict(texts), **asdict(charts)}
    given.pop("window", None)  # of both
    moot = [
        f"--{name.replace('_', '-')}"
        for name, value in given.items()
        if value is not None and value is not False
    ]
    if moot:
        how = "with --tasks" if harness.names else "without --tasks"
        raise UsageError(f"{', '.join(moot)} has no effect {how}", hint="leave it out")


def _run_tasks(
    sources: Sequence[str],
    harness: TaskFlags,
    max_length: int | None,
    device: str,
    talk: TalkFlags,
) -> None:
    """Run them and print what they gave."""
    from exporter.commands.tasks import check_harness

    check_harness()
    results = []
    with running(talk) as progress:
        from exporter.commands.tasks import evaluate_tasks

        for source in sources:
            result = evaluate_tasks(
                source,
                harness.names,
                include=harness.tasks_folder,
                shots=harness.shots,
                limit=harness.limit,
                chat=harness.chat_template,
                max_length=max_length,
                device=device,
                progress=progress,
            )
            results.append(result)
    if talk.json_output:
        documents = [
            {"source": source, **asdict(result)}
            for source, result in zip(sources, results, strict=True)
        ]
        print_json(documents[0] if len(documents) == 1 else {"results": documents})
        return
    if talk.quiet:
        for result in results:
            for figure in result.figures:
                typer.echo(figure.value)
        return
    from exporter.console import output_console
    from exporter.console.show import show_line, show_table

    for source, result in zip(sources, results, strict=True):
        show_line(output_console(), source)
        show_table(output_console(), result.table())


def _print(
    sources: Sequence[str], results: Sequence[EvalResult], text: str | None, talk: TalkFlags
) -> None:
    """Write the results to stdout: the document, the figures alone, a sentence or a table."""
    if talk.json_output:
        documents: list[dict[str, Any]] = [
            {"source": source, "text": text, **asdict(result)}
            for source, result in zip(sources, results, strict=True)
        ]
        print_json(documents[0] if len(documents) == 1 else {"text": text, "results": documents})
    elif talk.quiet:
        for result in results:
            typer.echo(result.perplexity)
    else:
        from exporter.console import output_console, show_evaluation, show_evaluations

        if len(results) == 1:
            show_evaluation(output_console(), results[0])
        else:
            show_evaluations(output_console(), sources, results)
