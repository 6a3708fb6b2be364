"""All inputs of one kind, in a process of their own: a seed and a number make an input."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from tests.fuzz.examine import SENTINEL, Failure, examine
from tests.fuzz.kinds import Kind
from tests.fuzz.readers import remove

MOST_HANGS = 5
"""Each costs its whole time; a kind that has found so many is done."""
_ATTEMPTS = 120
"""Shorter inputs that are tried for a failure."""


@dataclass
class Tally:
    """What a kind came to."""

    kind: str
    inputs: int = 0
    found: Counter[str] = field(default_factory=Counter)
    """Failures by what they are."""
    distinct: dict[str, str] = field(default_factory=dict)
    """Where each different one is, by the name of its folder."""


class Inputs:
    """Damaged folders of one kind, one after the other at the same place.

    Args:
        kind: what is damaged.
        pristine: where :func:`tests.fuzz.pristine.build` wrote.
        scratch: an empty folder.
        seed: with the number of an input, all that decides it.
    """

    def __init__(self, kind: Kind, pristine: Path, scratch: Path, seed: int) -> None:
        self.kind = kind
        self.folder = scratch / "here"
        self._pristine = pristine / kind.folder
        self._seed = seed
        self._names = kind.matching(self._pristine)
        self._stale = True
        os.environ["ROTQ_FUZZ_PRISTINE"] = str(pristine)
        os.chdir(scratch)  # where payloads leave their mark

    def make(self, number: int) -> dict[str, Path]:
        """Input ``number``; the files that were changed, by name."""
        rng = Random(f"{self._seed} {self.kind.name} {number}")
        self._restore()
        (self.folder.parent / "input").write_text(f"{self._seed} {number}")
        changed = rng.sample(self._names, min(len(self._names), rng.choice((1, 1, 1, 2, 3))))
        for name in changed:
            self.kind.change(self.folder / name, rng)
        if rng.random() < 0.75:
            self.kind.repair(self.folder)
        self._stale = True
        return {name: self.folder / name for name in changed}

    def examine(self) -> Failure | None:
        """What comes of the input that lies there."""
        found = examine(self.kind.read, self.folder, starts=self.kind.starts)
        mark = self.folder.parent / SENTINEL
        if mark.exists():
            shutil.rmtree(mark, ignore_errors=True)
            return Failure("code run", "a payload", "it left its mark")
        return found

    def keep(self, folder: Path, number: int, failure: Failure, changed: dict[str, Path]) -> None:
        """Keep an input that failed: what was changed of it, and how to make it again."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in changed.items():
            if path.is_file() and path.stat().st_size < 2**24:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)
        described = {"kind": self.kind.name, "seed": self._seed, "number": number}
        text = json.dumps({**described, **asdict(failure)}, indent=1)
        (folder / "failure.json").write_text(text + "\n")

    def _restore(self) -> None:
        """The pristine folder, whose files are replaced and never written to."""
        if not self._stale:
            return
        remove(self.folder)
        shutil.copytree(self._pristine, self.folder, copy_function=_copy)
        self._stale = False


def _copy(source: str, target: str) -> None:
    """Large files are written to by no reader, and are linked; onnx_ir refuses links to data."""
    linked = Path(source).stat().st_size > 2**16 and not source.endswith(".onnx.data")
    (os.link if linked else shutil.copy2)(source, target)


def minimised(inputs: Inputs, failure: Failure, changed: dict[str, Path]) -> None:
    """Cut what is not needed for ``failure`` out of the changed files."""
    left = _ATTEMPTS if failure.what == "traceback" else 0
    for path in changed.values():
        if not path.is_file() or path.is_symlink() or path.stat().st_size > 2**16:
            continue
        size = path.stat().st_size // 2
        while size and left:
            at = 0
            while at < path.stat().st_size and left:
                data = path.read_bytes()
                _replace(path, data[:at] + data[at + size :])
                left -= 1
                again = inputs.examine()
                if again is None or again.key != failure.key:
                    _replace(path, data)
                    at += size
            size //= 2


def _replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def run(inputs: Inputs, tally: Tally, *, until: float, most: int, failures: Path) -> Tally:
    """Examine inputs from number ``tally.inputs`` on.

    Args:
        inputs: of one kind.
        tally: what came of those before; gets what comes of these.
        until: on the monotonic clock.
        most: inputs in all.
        failures: gets a folder for each different failure.
    """
    while tally.inputs < most and time.monotonic() < until:
        number, tally.inputs = tally.inputs, tally.inputs + 1
        changed = inputs.make(number)
        failure = inputs.examine()
        if failure is None:
            continue
        tally.found[failure.what] += 1
        if failure.key not in tally.distinct:
            tally.distinct[failure.key] = f"{failure.what}: {failure.where}"
            if not inputs.kind.writes:
                minimised(inputs, failure, changed)
            inputs.keep(place(failures, inputs.kind, failure), number, failure, changed)
        if tally.found["hang"] >= MOST_HANGS:
            break
    return tally


def place(failures: Path, kind: Kind, failure: Failure) -> Path:
    """The folder of a failure."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in kind.name)
    return failures / f"{slug}-{failure.key}"
