"""Write all locks anew with the newest versions that ``pyproject.toml`` admits: ``python
locks/update.py PATH_OF_UV``."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

LOCKS = Path(__file__).resolve().parent
PYPROJECT = LOCKS.parent / "pyproject.toml"

PLATFORM = "x86_64-manylinux_2_28"
"""Elsewhere the same versions hold, and what only another platform needs is not locked."""
CUDA = re.compile(r"cuda-.*|triton|nvidia-(?!ml-py$|modelopt$).*")
"""What torch's CUDA build brings along, in the versions that this build fixes itself. A lock leaves
it out, so that an index with a CPU build, which needs none of it, serves as well."""


def main(uv: str) -> None:
    """Resolve for every promised Python, and the oldest versions for the oldest of them."""
    content = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    project, groups = content["project"], content["dependency-groups"]
    extras = project["optional-dependencies"]
    pythons = promised(project["requires-python"])

    optional = [line for extra in extras.values() for line in extra]
    everything = [*project["dependencies"], *optional, *groups["package"]]
    everything += [*groups["browser"], *groups["docs"], *groups["notebook"]]
    for python in pythons:
        tripy = resolve(uv, groups["tripy"], python, "--no-deps")
        write("py", python, resolve(uv, everything, python) | tripy)

        alone = {canonicalize_name(Requirement(line).name) for line in groups["optimum"]}
        found = resolve(uv, groups["optimum"], python)
        write("optimum-py", python, {name: found[name] for name in alone})

    tested = [*project["dependencies"], *extras["test"]]
    oldest = resolve(uv, tested, pythons[0], "--resolution", "lowest-direct")
    write("oldest-py", pythons[0], oldest)


def promised(requires: str) -> list[str]:
    """The minor versions of Python 3 that ``requires-python`` admits."""
    return [f"3.{minor}" for minor in range(50) if f"3.{minor}" in SpecifierSet(requires)]


def resolve(uv: str, requirements: Iterable[str], python: str, *options: str) -> dict[str, str]:
    """Versions by name."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "requirements.in"
        asked.write_text("\n".join(requirements), encoding="utf-8")
        command = [uv, "pip", "compile", str(asked), "--quiet", "--no-header", "--no-annotate"]
        command += ["--no-config", "--system-certs", "--python-version", python]
        command += ["--python-platform", PLATFORM, *options]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    pins = dict(line.split("==") for line in printed.splitlines())
    return {name: version for name, version in pins.items() if not CUDA.fullmatch(name)}


def write(prefix: str, python: str, pins: dict[str, str]) -> None:
    """One lock, sorted by name."""
    header = f"# Made by `make update-lock`, for Python {python}."
    lines = [header, *(f"{name}=={pins[name]}" for name in sorted(pins))]
    lock = LOCKS / f"{prefix}{python.replace('.', '')}.txt"
    lock.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
