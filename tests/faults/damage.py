"""Bytes that are damaged in whatever rotq keeps: refused, or found by ``rotq verify``, or without
any effect on the result.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.output import LIST_FILE, entries
from exporter.reporting.report import CARD_FILE
from tests.faults.cases import Content, Stage, content
from tests.faults.children import Ended, counted, rotq
from tests.faults.findings import Table, evenly
from tests.faults.operations import Operations
from tests.sealing import flipped

_FLIPS = 3
_RUN = 16
"""Bytes that are zeroed together."""
_ROTATED = ("rotations.json", "rotations.safetensors")
TARGETS = ("ort", "vllm", "transformers", "modelopt", "tensorrt", "tripy")
"""One of every layout of the files of an export."""


@dataclass(frozen=True)
class Kept:
    """A folder that rotq wrote, and what reads it."""

    name: str
    make: Callable[[Stage], Path]
    read: Callable[[Stage, Path, Path], Sequence[object]]
    """The command, of the folder and of one for its result, which the first may be."""
    verified: bool = False
    """Whether the command looks at the folder itself, and its result is what that says."""
    only: tuple[str, ...] = ()
    """Names of the files that are read; all."""


def _export(stage: Stage, result: Path, *more: object, **changes: object) -> list[object]:
    return ["export", *stage.recipe(**changes), *more, "-o", result]


def _artifact(stage: Stage) -> Path:
    return stage.made("artifact", "calibrate", *stage.recipe())


def _capture(stage: Stage) -> Path:
    return stage.made("capture", "capture", *stage.recipe(rotate="r1,r2"))


def _rotated(stage: Stage) -> Path:
    return stage.made("rotated", "rotate", *stage.recipe(rotate="r1,r2"))


def _work(stage: Stage) -> Path:
    work = stage.folder / "made" / "work"
    if not work.exists():
        options = ("--work-dir", work, *stage.recipe(rotate="r1,r2"))
        stage.made("of work", "export", *options)
    return work


def _walked(stage: Stage) -> Path:
    """The work folder of a walk that was killed before it wrote its artifact."""
    work = stage.folder / "made" / "walked"
    if not work.exists():
        aside = stage.folder / "walks"
        arguments = _export(
            stage, aside / "out", "--work-dir", aside / "work", layerwise={"enabled": True}
        )
        names = counted(arguments, aside)
        shutil.rmtree(aside)
        at = names.index("open quantized_model.json") + 1
        rotq(arguments, Operations(aside, at))
        shutil.rmtree(aside / "work" / ".artifact.rotq", ignore_errors=True)
        (aside / "work").rename(work)
    return work


def _exported(target: str) -> Kept:
    return Kept(
        f"export for {target}",
        lambda stage: stage.made(f"for {target}", "export", *stage.recipe(target)),
        lambda stage, folder, result: ["verify", folder, "-q"],
        verified=True,
    )


KEPT = (
    Kept("capture", _capture, lambda s, f, r: _export(s, r, "--from-capture", f, rotate="r1,r2")),
    Kept("artifact", _artifact, lambda s, f, r: _export(s, r, "--from-artifact", f)),
    Kept(
        "rotations",
        _rotated,
        lambda s, f, r: _export(s, r, "--rotations", f, rotate="r1,r2"),
        only=_ROTATED,
    ),
    Kept(
        "work folder",
        _work,
        lambda s, f, r: _export(s, r, "--work-dir", f, "--resume", rotate="r1,r2"),
    ),
    Kept(
        "work folder of a walk",
        _walked,
        lambda s, f, r: _export(s, r, "--work-dir", f, "--resume", layerwise={"enabled": True}),
    ),
    *map(_exported, TARGETS),
)


def damages(
    stage: Stage,
    folder: Path,
    table: Table,
    *,
    most: int | None = None,
    kept: Iterable[Kept] = KEPT,
) -> None:
    """Damage every file of each of ``kept`` in every way, or in ``most`` ways."""
    chance = random.Random(0)
    for each in kept:
        whole = each.make(stage)
        sound = _read(each, stage, whole, folder, "", None)
        expected = _result(each, folder)
        if sound.code != 0:
            raise RuntimeError(f"{each.name} without any damage: {sound.said}")
        for name in sorted(each.only or entries(whole)):
            data = (whole / name).read_bytes()
            for what, damaged in evenly(list(_damaged(data, chance)), most):
                ended = _read(each, stage, whole, folder, name, damaged)
                wrong, outcome = _judged(each, ended, folder, expected)
                table.add(f"damaged: {each.name}", f"{name}: {what}", wrong, outcome)


def _damaged(data: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """``data`` in other forms than it had, and how."""
    size = len(data)
    for _ in range(_FLIPS if size else 0):
        index, bit = chance.randrange(size), chance.randrange(8)
        yield f"bit {bit} of byte {index} flipped", flipped(data, index, bit)
    for length in sorted({0, size // 2, size - 1} - {size, -1}):
        yield f"cut to {length} of {size} bytes", data[:length]
    start = chance.randrange(max(1, size - _RUN))
    zeroed = data[:start] + bytes(min(_RUN, size - start)) + data[start + _RUN :]
    if zeroed != data:
        yield f"{_RUN} bytes from {start} zeroed", zeroed
    yield "a byte more at the end", data + b"\0"


def _read(
    each: Kept, stage: Stage, whole: Path, folder: Path, name: str, damaged: bytes | None
) -> Ended:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder / "kept")
    if damaged is not None:
        (folder / "kept" / name).write_bytes(damaged)
    return rotq(each.read(stage, folder / "kept", folder / "result"))


def _result(each: Kept, folder: Path) -> Content | None:
    """What matters of it: not what is for readers, and for whoever replaces the folder."""
    found = content(folder / ("kept" if each.verified else "result"))
    if found is None:
        return None
    return {name: own for name, own in found.items() if name not in (CARD_FILE, LIST_FILE)}


def _judged(each: Kept, ended: Ended, folder: Path, expected: Content | None) -> tuple[str, str]:
    if ended.code == 3:
        return "", "found by parity"
    if ended.code == 1 and "Traceback" not in ended.said and len(ended.errors) == 1:
        return "", "refused"
    if ended.code != 0:
        return f"ended with {ended.code}: {ended.said[-400:]}", ""
    now = _result(each, folder)
    if now == expected:
        return "", "same result"
    names = [
        name
        for name in {**(now or {}), **(expected or {})}
        if (now or {}).get(name) != (expected or {}).get(name)
    ]
    return f"accepted with another result: {', '.join(sorted(names))}", ""
