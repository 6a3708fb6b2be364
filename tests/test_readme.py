"""What the README tells a new user to type does what it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

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
