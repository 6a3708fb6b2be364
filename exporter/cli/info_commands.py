"""The commands that only tell: ``backends`` and ``env``. Neither imports torch."""

from __future__ import annotations

from dataclasses import asdict

import typer

from exporter.cli.command import with_flags
from exporter.cli.options import TalkFlags
from exporter.cli.session import print_json, set_up

BACKENDS_EXAMPLES = ("rotq backends", "rotq backends --json")
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
def env(talk: TalkFlags) -> None:
    """Print versions and hardware: what a bug report needs."""
    from exporter.environment import environment

    set_up(talk)
    if talk.json_output:
        print_json(environment().as_dict())
    else:
        from exporter.console import output_console, show_environment

        show_environment(output_console(), environment())
