"""Figures of the house: how many homes its concepts have, and how its code reads.

    python -m benchmarks.house              # what can be read off the source, in seconds
    python -m benchmarks.house --run        # and how often one export does the same thing again
    python -m benchmarks.house --check      # exit code 1 where a figure is beyond its bar

| figure | before the redesign |
|---|---|
| import circles | 3 |
| import circles without ``if TYPE_CHECKING`` | 3 |
| modules in the largest circle | 7 |
| rooms at the top of calib | 39 |
| rooms at the top of exporter | 33 |
| arguments typed with Any | 8.1 % |
| arguments typed Any and nothing else | 4.9 % |
| functions of 15+ lines without a blank line | 74.9 % |
| lines over 100 columns | 4902 |
| functions over 60 lines | 5 |
| lines of the longest file | 397 |
| comment lines | 1.0 % |
| recipe -> scheme in one run | 5 |
| AutoConfig.for_model in one run | 19 (18 where the trace is kept from an earlier run) |
| meta module trees in one run | 24 (folded weights 17, quantized models 6, the trace 1) |

Figures without a bar are there to be watched. How each is counted stands at its function; they are
of exporter, calib and backends, except that circles are looked for in benchmarks as well, and long
lines in benchmarks and tests.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib
import io
import os
import pkgutil
import re
import runpy
import sys
import tempfile
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("exporter", "calib", "backends")
LONG, COLUMNS, PARAGRAPH = 60, 100, 15
ARGUMENTS = (
    *("export", "--rotate", "auto", "--quiet", "--nsamples", "4", "--seqlen", "32"),
    *("--r1-epochs", "1", "--r2-epochs", "1"),
)
"""The run that is counted in: all candidates of the embedded model, on few and short rows."""


@dataclass(frozen=True)
class Counted:
    """A function that should run seldom.

    Attributes:
        label: what a call of it does.
        bar: how often it may run.
        names: patterns of ``module:qualified name``. Of several the first that fits any function
            counts, so that both sides of a change of names can stand here.
        on_meta: count calls under ``torch.device("meta")`` alone.
    """

    label: str
    bar: int
    names: tuple[str, ...]
    on_meta: bool = False


COUNTED = (
    Counted(
        # what makes the scheme, not what looks it up
        "recipe -> scheme",
        1,
        (r"exporter\.[\w.]+:_customised", r"exporter\.[\w.]+:customised_scheme"),
    ),
    Counted("AutoConfig.for_model", 3, (r"transformers\.[\w.]+:AutoConfig\.for_model",)),
    Counted(
        "meta module trees", 3, (r"transformers\.[\w.]+:_BaseAutoModelClass\.from_config",), True
    ),
)


@dataclass(frozen=True)
class Figure:
    """One line of the output: a count, or a share where ``of`` is given."""

    name: str
    count: int
    of: int | None = None
    bar: float | None = None
    note: str = ""

    @property
    def value(self) -> float:
        """The count, or the share in percent."""
        return self.count if self.of is None else 100 * self.count / self.of

    @property
    def missed(self) -> bool:
        """Whether it is beyond its bar."""
        return self.bar is not None and self.value > self.bar

    @property
    def row(self) -> str:
        """As a line of the table."""
        value = f"{self.count}" if self.of is None else f"{self.value:.1f} %"
        note = self.note if self.of is None else f"{self.count} of {self.of}"
        bar = "" if self.bar is None else f"<= {self.bar:g}"
        return f"{self.name:<48}{value:>8}  {bar:<8}{'MISSED' if self.missed else '':<8}{note}"


@dataclass(frozen=True)
class Source:
    """One file of Python."""

    path: Path

    @cached_property
    def text(self) -> str:
        """What stands in it."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def lines(self) -> list[str]:
        """Its lines."""
        return self.text.splitlines()

    @cached_property
    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Functions and methods, inner ones as well."""
        tree = ast.walk(ast.parse(self.text))
        return [node for node in tree if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def sources(*folders: str) -> list[Source]:
    """The Python files below ``folders``."""
    return [Source(path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="also count in an export")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    arguments = parser.parse_args()
    files = sources(*PACKAGES)
    figures = [*circles(), *rooms(), *open_arguments(files), *layout(files)]
    figures += counted_run() if arguments.run else []
    for figure in figures:
        print(figure.row)
    return 1 if arguments.check and any(figure.missed for figure in figures) else 0


def circles() -> Iterator[Figure]:
    """Groups of modules that import each other, be it in functions or by way of other modules.

    They are the strongly connected components of more than one module. Importing a module of a
    package is no import of the package. With ``if TYPE_CHECKING`` the figure has its bar: what only
    a type checker follows, a reader follows too.
    """
    import grimp  # the graph that import-linter judges

    for typing_only, name in ((False, ""), (True, " without `if TYPE_CHECKING`")):
        graph = grimp.build_graph(
            *(*PACKAGES, "benchmarks"), exclude_type_checking_imports=typing_only, cache_dir=None
        )
        imports = {
            module: sorted(graph.find_modules_directly_imported_by(module))
            for module in sorted(graph.modules)
        }
        found = components(imports)
        note = "; ".join(", ".join(group) for group in found)
        yield Figure(f"import circles{name}", len(found), bar=0, note=note)
        if not typing_only:
            largest = max((len(group) for group in found), default=0)
            yield Figure("modules in the largest circle", largest)


def components(edges: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node, sorted."""
    reach = {node: reachable(edges, node) for node in edges}
    groups = {
        tuple(sorted(other for other in reach[node] if node in reach[other])) for node in edges
    }
    return sorted(list(group) for group in groups if len(group) > 1)


def reachable(edges: Mapping[str, Sequence[str]], start: str) -> set[str]:
    """All nodes that a path leads to from ``start``; ``start`` itself if a circle does."""
    found: set[str] = set()
    pending = list(edges[start])
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += edges[node]
    return found


def rooms() -> Iterator[Figure]:
    """Files and packages directly inside a package; the face ``__init__`` is one of them."""
    for package, bar in (("calib", 24), ("exporter", 16)):
        entries = list((ROOT / package).iterdir())
        files = [entry for entry in entries if entry.suffix == ".py"]
        folders = [entry for entry in entries if (entry / "__init__.py").is_file()]
        count = len(files) + len(folders)
        note = f"{count - 1} without __init__"
        yield Figure(f"rooms at the top of {package}", count, bar=bar, note=note)


def open_arguments(files: Sequence[Source]) -> Iterator[Figure]:
    """How many annotated arguments, but for ``*args`` and ``**kwargs``, are open to anything.

    One with Any somewhere in its annotation (``dict[str, Any]``) counts for the bar.
    """
    annotated = [
        ast.unparse(argument.annotation)
        for file in files
        for function in file.functions
        for argument in (
            *function.args.posonlyargs,
            *function.args.args,
            *function.args.kwonlyargs,
        )
        if argument.annotation is not None
    ]
    containing = sum(re.search(r"\bAny\b", annotation) is not None for annotation in annotated)
    yield Figure("arguments typed with Any", containing, len(annotated), bar=4)
    yield Figure("arguments typed Any and nothing else", annotated.count("Any"), len(annotated))


def layout(files: Sequence[Source]) -> Iterator[Figure]:
    """Paragraphs, and the lengths of lines, functions and files."""
    bodies = [file.lines[start:end] for file in files for start, end in map(body, file.functions)]
    long = [lines for lines in bodies if len(lines) >= PARAGRAPH]
    dense = sum(all(line.strip() for line in lines) for lines in long)
    yield Figure(f"functions of {PARAGRAPH}+ lines without a blank line", dense, len(long), bar=40)

    everywhere = sources(*PACKAGES, "tests", "benchmarks")
    wide = sum(len(line) > COLUMNS for file in everywhere for line in file.lines)
    total = sum(len(file.lines) for file in everywhere)
    share = f"{100 * wide / total:.1f} % of {total}"
    yield Figure(f"lines over {COLUMNS} columns", wide, bar=0, note=share)

    large = sum(
        (node.end_lineno or 0) - node.lineno >= LONG for file in files for node in file.functions
    )
    yield Figure(f"functions over {LONG} lines", large)
    longest = max(files, key=lambda file: len(file.lines))
    note = longest.path.relative_to(ROOT).as_posix()
    yield Figure("lines of the longest file", len(longest.lines), note=note)
    comments = sum(
        token.type == tokenize.COMMENT
        for file in files
        for token in tokenize.generate_tokens(io.StringIO(file.text).readline)
    )
    yield Figure("comment lines", comments, sum(len(file.lines) for file in files))


def body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, int]:
    """The lines of a function, from the one after its docstring, which has blank lines of its own.

    Without a docstring, from its ``def``.
    """
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    start = first.end_lineno or 0 if documented else function.lineno - 1
    return start, function.end_lineno or 0


def counted_run() -> list[Figure]:
    """Export the embedded model in this process, and count the calls of :data:`COUNTED`.

    Everything is imported before, so that a function is found wherever it lives.

    Raises:
        SystemExit: the run failed, or a pattern fits no function.
    """
    for package in PACKAGES:
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            if not module.name.endswith("__main__"):
                with contextlib.suppress(ImportError):  # of an optional library
                    importlib.import_module(module.name)
    calls = {one.label: [0] for one in COUNTED}
    found = [(one, functions_of(one)) for one in COUNTED]  # before the first exchange
    for one, functions in found:
        for function in functions:
            count(function, calls[one.label], on_meta=one.on_meta)

    with tempfile.TemporaryDirectory() as work:
        line = ["rotq", *ARGUMENTS, "--output", f"{work}/out"]
        own = {"ROTQ_CACHE": f"{work}/cache", "HF_HUB_OFFLINE": "1"}  # traces are made anew
        with patch.object(sys, "argv", line), patch.dict(os.environ, own):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    runpy.run_module("exporter.cli", run_name="__main__")
            except SystemExit as end:
                if end.code:
                    raise
    return [Figure(f"{one.label} in one run", calls[one.label][0], bar=one.bar) for one in COUNTED]


def functions_of(counted: Counted) -> list[FunctionType]:
    """The functions that the first fitting pattern names."""
    # its type, not isinstance: that would ask deprecated objects for their class, and they warn
    known = [thing for thing in gc.get_objects() if type(thing) is FunctionType]
    for pattern in counted.names:
        found = [
            function
            for function in known
            if re.fullmatch(pattern, f"{function.__module__}:{function.__qualname__}")
        ]
        if found:
            return found
    raise SystemExit(f"no function is called {' or '.join(counted.names)}: mend COUNTED")


def count(function: FunctionType, calls: list[int], *, on_meta: bool) -> None:
    """Add to ``calls`` at every call of ``function``, whoever holds it.

    Its code is exchanged, not its name: modules and tables that have it already are counted too.
    """
    import torch

    if function.__closure__:
        raise SystemExit(f"{function.__qualname__} is a closure: its code cannot be exchanged")
    original = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    original.__kwdefaults__ = function.__kwdefaults__

    def counting(*given: Any, **named: Any) -> Any:
        calls[0] += not on_meta or torch.get_default_device().type == "meta"
        return original(*given, **named)

    name = f"_counting_{id(function)}_{id(calls)}"
    function.__globals__[name] = counting
    scope: dict[str, Callable[..., Any]] = {}
    exec(f"def calling(*given, **named): return {name}(*given, **named)", scope)
    function.__code__ = scope["calling"].__code__


if __name__ == "__main__":
    sys.exit(main())
