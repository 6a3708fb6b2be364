"""The commands that look at a result again: ``verify`` and ``eval``."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calib.errors import CheckpointError, DataError
from exporter.cli.command import with_flags
from exporter.cli.errors import UsageError
from exporter.cli.options import TalkFlags
from exporter.cli.resolve import check_device
from exporter.cli.results import parity_exit_code, print_exported
from exporter.cli.session import print_json, running, set_up

if TYPE_CHECKING:
    from exporter.commands.evaluate import EvalResult

VERIFY_EXAMPLES = (
    "rotq verify out/demo",
    "rotq verify out/mine -m ./my-model --rows 8",
    "rotq verify out/demo --json",
    "rotq verify out/demo --expect-sha256 DIGEST",
)
EVAL_EXAMPLES = (
    "rotq eval out/demo",
    "rotq eval out/mine --text test.txt --window 512 --stride 256",
    "rotq eval ./my-model --text test.txt --device cuda",
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


@with_flags
def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Exported or calibrated folder, checkpoint folder or hub id."
        ),
    ],
    talk: TalkFlags,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="File or hub data set; default: the embedded evaluation text.",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            metavar="TOKENS",
            min=2,
            help="Tokens the model sees at once; default: 2048, or what it takes.",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            metavar="TOKENS",
            min=1,
            help="Tokens that windows move on by; default: the window.",
        ),
    ] = None,
    nsamples: Annotated[
        int | None,
        typer.Option("--nsamples", metavar="N", min=1, help="Documents; default: all."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="auto, cpu, cuda or cuda:N; default: auto, CUDA where there is one.",
        ),
    ] = "auto",
) -> None:
    """Perplexity of an exported folder in its runtime, or of an artifact or a checkpoint in torch.

    Windows slide by --stride, and each token counts once, so figures of different windows can be
    compared.
    """
    set_up(talk)
    check_device(device)
    if text is not None and Path(text).suffix and not Path(text).is_file():
        raise DataError(
            f"the text file '{text}' does not exist", hint="give a readable file to --text"
        )

    with running(talk) as progress:
        from exporter.commands.evaluate import evaluate as run

        result = run(
            source,
            text,
            window=window,
            stride=stride,
            nsamples=nsamples,
            device=device,
            progress=progress,
        )
    _print_evaluation(result, source, text, talk)


def _print_evaluation(result: EvalResult, source: str, text: str | None, talk: TalkFlags) -> None:
    """Write the result to stdout: the document, the figure alone, or a sentence."""
    if talk.json_output:
        print_json({"source": source, "text": text, **asdict(result)})
    elif talk.quiet:
        typer.echo(result.perplexity)
    else:
        from exporter.console import output_console, show_evaluation

        show_evaluation(output_console(), result)


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
