"""How commands look: options in sections, examples at the end, an unknown option answered with
those that exist.

typer can draw all this with rich; doing it here keeps ``--help`` fast, plain, and readable in any
encoding.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn, get_type_hints

from typer import TyperException
from typer.core import TyperCommand, TyperGroup

# The contexts and formatters below are typer's private click classes: they are typed as Any on
# purpose.


class Command(TyperCommand):
    """A command whose options are grouped by ``rich_help_panel`` and whose epilog holds example
    lines.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; an unknown option lists the known ones."""
        try:
            return super().parse_args(ctx, args)
        except TyperException as error:
            fail: Callable[[str], NoReturn] = ctx.fail
            param = getattr(error, "param", None)
            if param is not None and param.name == "overrides":
                # the one pair of options whose names differ by a letter
                fail(f"{error.format_message()} Did you mean --override PATTERN=SCHEME?")
            unknown = getattr(error, "option_name", None)
            if unknown is None or not hasattr(error, "possibilities"):
                raise
            close = sorted(error.possibilities or ())
            guess = f" Did you mean {' or '.join(close)}?" if close else ""
            known = ", ".join(
                max(param.opts, key=len)
                for param in self.get_params(ctx)
                if param.opts[0][0] == "-"
            )
            fail(
                f"No such option: {unknown}.{guess} The options of '{ctx.command_path}' are:"
                f" {known}."
            )

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each panel, in the order of the options."""
        sections: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                default = "Arguments" if param.param_type_name == "argument" else "Options"
                sections[getattr(param, "rich_help_panel", None) or default].append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are: click would join their lines."""
        _write_examples(self.epilog, formatter)


class Group(TyperGroup):
    """The top level."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are."""
        _write_examples(self.epilog, formatter)


def _write_examples(epilog: str | None, formatter: Any) -> None:
    if epilog:
        with formatter.section("Examples"):
            for line in epilog.splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def with_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses of options.

    typer sees one parameter for each field of each dataclass, so that commands share options, with
    one description, without repeating thirty parameters each.
    """
    groups: dict[str, type[Any]] = {
        name: hint
        for name, hint in get_type_hints(function).items()
        if isinstance(hint, type) and is_dataclass(hint)
    }
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        group = groups.get(parameter.name)
        if group is None:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in fields(group)
        ]

    def command(**values: Any) -> None:
        built = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        function(**built, **values)

    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command
