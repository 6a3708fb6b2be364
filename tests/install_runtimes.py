"""Install the runtimes that exported folders are tested in, each for itself: ``python -m
tests.install_runtimes``; or another group of optional packages: ``... real``.

One that cannot be had on this machine is named with pip's reason and leaves the others alone; its
tests are skipped. Nothing that rotq itself depends on is upgraded or downgraded.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

OPTIMUM = Path(sys.prefix) / "optimum"
"""Optimum takes an older transformers than rotq does, so both live in a folder of their own, which
only the process that loads an exported folder in Optimum sees. The other packages it needs are
those of this environment."""
_OPTIMUM = (
    "optimum-onnx>=0.1,<0.2",
    "optimum>=2.1,<2.2",
    "transformers<4.58",
    "huggingface_hub<1",
    "tokenizers<0.23",
)
_TRIPY = ("nvtripy>=0.1.7,<0.2", "colored")
"""Tripy's front end; the compiler below it, which it asks for, is not on PyPI."""


def main() -> None:
    """Install what is not there yet, and say what could not be."""
    project = tomllib.loads(
        (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    )["project"]
    constraints = [f"{name}=={installed}" for name, installed in _held()]
    groups = sys.argv[1:] or ["runtimes"]
    for group in groups:
        for requirement in project["optional-dependencies"][group]:
            _install(requirement, [requirement, *constraints])
    if "runtimes" not in groups:
        return
    _install("Tripy", ["--no-deps", *_TRIPY])
    if not OPTIMUM.is_dir():
        _install("Optimum", ["--no-deps", "--target", str(OPTIMUM), *_OPTIMUM])


def _held() -> list[tuple[str, str]]:
    """Packages that an installation must leave as they are."""
    from importlib.metadata import version

    return [(name, version(name)) for name in ("torch", "transformers", "onnxruntime")]


def _install(name: str, arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next(
            (line for line in done.stderr.splitlines() if line.startswith("ERROR")),
            done.stderr.strip(),
        )
        sys.stderr.write(f"not installed: {name}: {reason}\n")


if __name__ == "__main__":
    main()
