"""Install the runtimes that exported folders are tested in, each for itself: ``python -m
tests.install_runtimes``; or another group of optional packages: ``... real``.

One that cannot be had on this machine is named with pip's reason and leaves the others alone; its
tests are skipped. The versions are those of the lock, or with ``--versions newest`` the newest that
leave alone what rotq itself depends on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from locks.install import lock_of

OPTIMUM = Path(sys.prefix) / "optimum"
"""Optimum takes an older transformers than rotq does, so both live in a folder of their own, which
only the process that loads an exported folder in Optimum sees. The other packages it needs are
those of this environment."""


def main() -> None:
    """Install what is not there yet, and say what could not be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "group", nargs="?", choices=["runtimes", "real", "docs"], default="runtimes"
    )
    parser.add_argument("--versions", choices=["locked", "newest"], default="locked")
    options = parser.parse_args()
    locked = options.versions == "locked"

    content = tomllib.loads(
        (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    )
    groups = content["dependency-groups"]

    python = Path(sys.executable)
    lock, optimum = lock_of(python), lock_of(python, prefix="optimum-py")
    if locked:
        how = ["-c", str(lock), "--build-constraint", str(lock)]
        alone, beside = ["-c", str(lock)], ["-c", str(optimum)]
    else:
        how, alone, beside = ["--upgrade", *_held()], ["--upgrade"], []

    if options.group == "docs":
        _install("what builds the documentation", [*how, *groups["docs"]])
        return
    for requirement in content["project"]["optional-dependencies"][options.group]:
        _install(requirement, [requirement, *how])
    if options.group != "runtimes":
        return

    _install("Tripy", ["--no-deps", *alone, *groups["tripy"]])
    _install("a browser", [*how, *groups["browser"]])
    _install("what runs notebooks", [*how, *groups["notebook"]])
    if not (locked and _holds(optimum)):
        folder = ["--no-deps", "--upgrade", "--target", str(OPTIMUM)]
        _install("Optimum", [*folder, *beside, *groups["optimum"]])


def _held() -> list[str]:
    """Packages that an installation must leave as they are."""
    from importlib.metadata import version

    return [f"{name}=={version(name)}" for name in ("torch", "transformers", "onnxruntime")]


def _holds(lock: Path) -> bool:
    """Whether Optimum's folder is what its lock names."""
    from importlib.metadata import distributions

    there = {f"{found.name}=={found.version}" for found in distributions(path=[str(OPTIMUM)])}
    lines = lock.read_text(encoding="utf-8").splitlines()
    asked = {line for line in lines if not line.startswith("#")}
    return asked <= {line.replace("_", "-") for line in there}


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
