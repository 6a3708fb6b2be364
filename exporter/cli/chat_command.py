"""``rotq chat``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calib.errors import DataError, RotqError
from exporter.cli.command import with_flags
from exporter.cli.errors import UsageError
from exporter.cli.options import TalkFlags
from exporter.cli.session import print_json, running, set_up
from exporter.cli.signals import told_to_end
from exporter.cli.verify_command import check_exported

if TYPE_CHECKING:
    import torch

    from exporter.commands.chat import Conversation, Sampling
    from exporter.commands.continuing import Speed

EXAMPLES = (
    "rotq chat out/demo",
    'rotq chat out/mine --prompt "What is the capital of France?"',
    "rotq chat out/mine --temperature 0.7 --top-p 0.9 --seed 1",
)
_EXIT, _RESET = "/exit", "/reset"


@with_flags
def chat(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What 'rotq export' wrote.")],
    talk: TalkFlags,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT", help="Answer this, and stop."),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", help="A message before all others."),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", metavar="N", min=1, help="Of an answer at most; default: 256."
        ),
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            metavar="T",
            min=0.0,
            help="Draw tokens, from flatter chances the higher; default: 0, the most likely one.",
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            metavar="P",
            help="Draw from the likeliest tokens that have this probability together; default: 1.",
        ),
    ] = 1.0,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, help="Of the draws; default: 0.")
    ] = 0,
) -> None:
    """Talk to an exported folder, in its runtime, through its chat template.

    /reset forgets what was said, /exit or the end of the input ends it, Ctrl-C ends an answer.
    Answers go to stdout, all else to stderr.
    """
    set_up(talk)
    if not 0 < top_p <= 1:
        raise UsageError(
            f"--top-p {top_p:g} is not above 0 and at most 1", hint="give 0.9, for example"
        )
    if talk.json_output and prompt is None:
        raise UsageError("--json prints one answer", hint="give --prompt")
    check_exported(folder)
    with running(talk):
        from exporter.commands.chat import Sampling, open_conversation

        conversation = open_conversation(folder, system=system)
    sampling = Sampling(temperature, top_p, seed)
    generator = sampling.chooser()
    if prompt is not None and talk.json_output:
        answer = "".join(conversation.answer(prompt, sampling, generator, most=max_new_tokens))
        speed = asdict(conversation.speed)
        print_json({"answer": answer, "runtime": conversation.words, "speed": speed})
        return
    if prompt is not None:
        _answer(conversation, prompt, sampling, generator, most=max_new_tokens, talk=talk)
        return

    if not talk.quiet:
        typer.echo(f"{conversation.words}; {_RESET}, {_EXIT}", err=True)
    for line in _lines():
        if line == _EXIT:
            return
        if line == _RESET:
            conversation.reset()
        elif line:
            try:
                _answer(conversation, line, sampling, generator, most=max_new_tokens, talk=talk)
            except DataError as error:  # too long: the next line may be /reset
                _complain(error)


def _answer(
    conversation: Conversation,
    text: str,
    sampling: Sampling,
    generator: torch.Generator,
    *,
    most: int,
    talk: TalkFlags,
) -> None:
    """Stream one answer; Ctrl-C ends it."""
    pieces = conversation.answer(text, sampling, generator, most=most)
    try:
        for piece in pieces:
            typer.echo(piece, nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if told_to_end():
            raise
        pieces.close()  # type: ignore[attr-defined]
    typer.echo()
    if not talk.quiet:
        typer.echo(_said(conversation.speed), err=True)


def _said(speed: Speed) -> str:
    rate = "" if speed.rate is None else f", then {speed.rate:.1f} tokens/s"
    return (
        f"[{speed.read} tokens read, {speed.written} written; the first after"
        f" {speed.first:.2f} s{rate}]"
    )


def _lines() -> Iterator[str]:
    """What is typed, or comes through a pipe, line by line."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            typer.echo("> ", nl=False, err=True)
            sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:  # nothing is being answered: the end
            typer.echo(err=True)
            return
        if not line:
            return
        yield line.strip()


def _complain(error: RotqError) -> None:
    typer.echo(f"error: {error.message}", err=True)
    if error.hint:
        typer.echo(f"hint: {error.hint}", err=True)
