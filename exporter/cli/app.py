"""The application: its commands, ``--version``, and the one place where a run becomes an exit
code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from calib.errors import OutputError
from exporter.cli import (
    chat_command,
    eval_command,
    info_commands,
    inspect_command,
    report_commands,
    run_commands,
    stats_command,
    sweep_command,
    verify_command,
)
from exporter.cli.command import Command, Group
from exporter.cli.errors import exit_code_of
from exporter.cli.standard_streams import escape_what_cannot_be_encoded, stand_in_for_closed

HELP = (
    "Turn a Hugging Face causal LM into a rotated, calibrated, quantized model for a deployment"
    " runtime, and check it."
)

# rich's help would cost start-up time and draw boxes into pipes; its tracebacks hide frames of the
# libraries.
app = typer.Typer(
    cls=Group,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for name, function, summary, examples in (
    (
        "export",
        run_commands.export,
        "Rotate, quantize, write and verify.",
        run_commands.EXPORT_EXAMPLES,
    ),
    (
        "capture",
        run_commands.capture,
        "Only capture activation statistics.",
        run_commands.CAPTURE_EXAMPLES,
    ),
    (
        "calibrate",
        run_commands.calibrate,
        "Everything but writing for a runtime.",
        run_commands.CALIBRATE_EXAMPLES,
    ),
    (
        "rotate",
        run_commands.rotate,
        "Write the rotated float checkpoint.",
        run_commands.ROTATE_EXAMPLES,
    ),
    (
        "sweep",
        sweep_command.sweep,
        "A grid of exports, compared.",
        sweep_command.EXAMPLES,
    ),
    (
        "stats",
        stats_command.stats,
        "Statistics before and after rotation, by damage.",
        stats_command.EXAMPLES,
    ),
    (
        "verify",
        verify_command.verify,
        "Repeat the parity check on a folder.",
        verify_command.EXAMPLES,
    ),
    (
        "inspect",
        inspect_command.inspect,
        "What a folder holds, and how it runs.",
        inspect_command.EXAMPLES,
    ),
    (
        "report",
        report_commands.report,
        "One page of an export, with charts.",
        report_commands.REPORT_EXAMPLES,
    ),
    (
        "diff",
        report_commands.diff,
        "In what two exports differ.",
        report_commands.DIFF_EXAMPLES,
    ),
    (
        "eval",
        eval_command.evaluate,
        "Perplexity of folders or checkpoints.",
        eval_command.EXAMPLES,
    ),
    (
        "chat",
        chat_command.chat,
        "Talk to a folder, in its runtime.",
        chat_command.EXAMPLES,
    ),
    (
        "backends",
        info_commands.backends,
        "What can be written, and for what.",
        info_commands.BACKENDS_EXAMPLES,
    ),
    (
        "explain",
        info_commands.explain,
        "What a word of a report means.",
        info_commands.EXPLAIN_EXAMPLES,
    ),
    ("env", info_commands.env, "Versions and hardware.", info_commands.ENV_EXAMPLES),
):
    app.command(name, cls=Command, short_help=summary, epilog="\n".join(examples))(function)


def _print_version(asked: bool) -> None:
    if asked:
        from exporter.environment import installed_version

        typer.echo(f"rotq {installed_version('rotq') or '(not installed)'}")
        raise typer.Exit


@app.callback(
    epilog="\n".join(
        ("rotq export --backend onnx -o out/demo", "rotq verify out/demo", "rotq COMMAND --help")
    )
)
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options before the command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: see ``docs/cli.md``.

    Args:
        arguments: without the program's name; ``None``: those of the process.
    """
    stdout_is_there = stand_in_for_closed()
    escape_what_cannot_be_encoded()

    def run() -> None:
        if not stdout_is_there:
            raise OutputError(
                "stdout is closed: there is no place for the result",
                hint="redirect it to a file, or to /dev/null",
            )
        app(list(sys.argv[1:] if arguments is None else arguments), prog_name="rotq")

    return exit_code_of(run)
