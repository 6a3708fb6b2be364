"""The locks are complete, hold to pyproject.toml, and say nothing of the machine they were made
on."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, GROUPS = PYPROJECT["project"], PYPROJECT["dependency-groups"]
EXTRAS = PROJECT["optional-dependencies"]
MINORS = [minor for minor in range(50) if f"3.{minor}" in SpecifierSet(PROJECT["requires-python"])]

EVERYTHING = [
    *PROJECT["dependencies"],
    *(line for extra in EXTRAS.values() for line in extra),
    *GROUPS["tripy"],
    *GROUPS["package"],
    *PYPROJECT["build-system"]["requires"],
]
OLDEST = [*PROJECT["dependencies"], *EXTRAS["test"]]
CUDA = re.compile(r"triton|cuda-.*|nvidia-(?!ml-py|modelopt).*")


def held(lock: Path) -> dict[str, Version]:
    lines = lock.read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    return {name: Version(version) for name, version in pins.items()}


def test_there_is_one_for_every_promised_python() -> None:
    names = {f"{kind}py3{minor}.txt" for kind in ("", "optimum-") for minor in MINORS}
    assert {lock.name for lock in LOCKS} == names | {f"oldest-py3{MINORS[0]}.txt"}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_it_holds_names_and_versions_only(lock: Path) -> None:
    """No host, no path, no build of one index, nothing that a CPU build of torch does without."""
    first, *lines = lock.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# Made by `make update-lock`")
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)
        assert not CUDA.fullmatch(line.partition("==")[0])
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0])


@pytest.mark.parametrize(
    ("lock", "line"),
    [
        (f"{kind}py3{minor}", line)
        for kind, minors, lines in (
            ("", MINORS, EVERYTHING),
            ("optimum-", MINORS, GROUPS["optimum"]),
            ("oldest-", MINORS[:1], OLDEST),
        )
        for minor in minors
        for line in dict.fromkeys(lines)
    ],
)
def test_it_satisfies_what_is_required(lock: str, line: str) -> None:
    requirement = Requirement(line)
    version = held(ROOT / "locks" / f"{lock}.txt")[canonicalize_name(requirement.name)]
    assert version in requirement.specifier


@pytest.mark.parametrize("line", OLDEST)
def test_every_floor_is_what_the_oldest_versions_were_tested_with(line: str) -> None:
    """A lower floor would promise what was never tried: other packages ask for more."""
    requirement = Requirement(line)
    floor = next(part.version for part in requirement.specifier if part.operator == ">=")
    pins = held(ROOT / "locks" / f"oldest-py3{MINORS[0]}.txt")
    assert pins[canonicalize_name(requirement.name)] == Version(floor)
