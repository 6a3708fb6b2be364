"""The commands that only tell: ``backends``, ``explain`` and ``env``. None imports torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from exporter.cli.command import with_flags
from exporter.cli.options import TalkFlags
from exporter.cli.session import print_json, set_up

BACKENDS_EXAMPLES = ("rotq backends", "rotq backends --json")
EXPLAIN_EXAMPLES = ("rotq explain", "rotq explain floor")
ENV_EXAMPLES = ("rotq env", "rotq env --json > env.json")


@with_flags
def backends(talk: TalkFlags) -> None:
    """List what can be written: backends, their targets, and the schemes that each target can
    express.
    """
    from backends.registry import available

    set_up(talk)
    registered = available()
    broken = [info for info in registered if info.error is not None]
    if talk.json_output:
        print_json([asdict(info) for info in registered])
    else:
        from exporter.console import output_console, show_backends

        show_backends(output_console(), [info for info in registered if info.error is None])
    for info in broken:
        typer.echo(
            f"warning: backend '{info.name}' of {info.distribution} does not load: {info.error}",
            err=True,
        )
    if not registered:
        typer.echo("warning: no backend is installed; reinstall rotq", err=True)


@with_flags
def explain(
    talk: TalkFlags,
    term: Annotated[
        str | None, typer.Argument(metavar="TERM", help="A word of a report; default: all of them.")
    ] = None,
) -> None:
    """Say what a word means that reports and messages use."""
    from calib.errors import did_you_mean
    from exporter.cli.errors import UsageError
    from exporter.console.terms import TERMS

    set_up(talk)
    if term is not None and term.lower() not in TERMS:
        raise UsageError(
            f"nothing is known of '{term}'",
            hint=f"{did_you_mean(term, TERMS)}the terms are: {', '.join(TERMS)}",
        )
    chosen = TERMS if term is None else {term.lower(): TERMS[term.lower()]}
    if talk.json_output:
        print_json(chosen)
        return
    from exporter.console import output_console
    from exporter.console.show import show_line

    for name, meaning in chosen.items():
        show_line(output_console(), f"{name}: {meaning}")


@with_flags
def env(talk: TalkFlags) -> None:
    """Print versions and hardware: what a bug report needs."""
    from exporter.environment import environment

    set_up(talk)
    if talk.json_output:
        print_json(environment().as_dict())
    else:
        from exporter.console import output_console, show_environment

        show_environment(output_console(), environment())
