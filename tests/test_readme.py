"""What README and docs tell a user to type does what it says, or at least is understood."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

import rotq
from exporter.cli.app import app
from exporter.flags import RECIPE_KEYS

ROOT = Path(__file__).parents[1]


def _python_blocks() -> list[str]:
    return re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )


def test_the_generation_example_runs_and_continues_the_prompt(exported: Path) -> None:
    code = _python_blocks()[0]
    assert 'folder = "out/demo"' in code
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code.replace("out/demo", str(exported)), "README.md", "exec"), {})
    text = output.getvalue().strip()
    assert text.startswith("once upon a time")
    assert len(text.split()) > 20  # 40 tokens of about one word each


def test_the_generation_example_is_ten_lines() -> None:
    lines = [
        line for line in _python_blocks()[0].splitlines() if line.strip() and "import" not in line
    ]
    assert len(lines) <= 10


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(
        re.findall(
            r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE
        )
    )
    named = set(re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named <= targets


def test_continuous_integration_runs_the_command_of_the_readme() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one_that_the_command_line_understands(page: Path) -> None:
    """Its options exist and their values are of the right kind; it is not run."""
    group = get_command(app)
    lines = re.findall(r"^    rotq (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for line in lines:
        name, *arguments = shlex.split(line, comments=True)
        command = group.commands[name]  # type: ignore[attr-defined]
        command.make_context(name, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_call_of_rotq_has_arguments_that_the_function_takes(page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    trees = [ast.parse(block) for block in blocks]
    for call in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if not ast.unparse(call.func).startswith("rotq."):
            continue
        function = getattr(rotq, ast.unparse(call.func).removeprefix("rotq."))
        keywords = {each.arg: None for each in call.keywords if each.arg is not None}
        bound = inspect.signature(function).bind(*[None] * len(call.args), **keywords)
        assert bound.arguments.get("settings", {}).keys() <= RECIPE_KEYS.keys()
