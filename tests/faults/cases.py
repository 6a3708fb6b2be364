"""The commands that faults are put into, on tiny models, and how their results are told apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calib.files.sealed import digest
from exporter.output import entries, is_partial
from exporter.reporting.exported import edited_files, is_export, read_report
from exporter.reporting.report import CARD_FILE
from tests.checkpoints import write_checkpoint
from tests.faults.children import rotq

_TEXT = "Once upon a time there was a fox, number {}, who liked to read and to walk until night.\n"
_LINES = 40
"""A third of the time of a run is that of a text of a usual size."""
_FEW = {
    "gate": {"nsamples": 1},
    "evaluation": {"nsamples": 2},
    "rotation": {
        "r1_tokens": 64,
        "r2_tokens": 32,
        "r1": {"epochs": 1},
        "r2": {"epochs": 1},
    },
}
_VARY = ("seconds", "cpu_seconds", "peak_bytes", "checksums", "sha256", "cpu")
"""What a report says of one run only, or of the card, in which such figures stand."""

Content = dict[str, str]
"""What a folder holds: by path, a digest of what does not change from run to run."""


@dataclass(frozen=True)
class Stage:
    """Where all commands run: a folder with their inputs."""

    folder: Path

    @property
    def model(self) -> Path:
        """A tiny Llama."""
        return self.folder / "model"

    def recipe(self, target: str = "vllm", **changes: Any) -> tuple[object, ...]:
        """Options of a short run on it."""
        backend = "onnx" if target == "ort" else "safetensors"
        text = {"nsamples": 2, "seqlen": 32, "dataset": str(self.folder / "text.txt")}
        own = {**_FEW, "backend": backend, "target": target, "rotate": "none", **changes}
        own["calibration"] = text
        path = self.folder / f"{abs(hash(json.dumps(own, sort_keys=True)))}.yaml"
        path.write_text(json.dumps(own))
        return ("-q", "-m", self.model, "--recipe", path)

    def made(self, name: str, *arguments: object) -> Path:
        """The folder ``name``, written by a command that ends with ``-o``."""
        folder = self.folder / "made" / name
        if not folder.exists():
            ended = rotq([*arguments, "-o", folder])
            if ended.code != 0:
                raise RuntimeError(f"{arguments} ended with {ended.code}: {ended.said}")
        return folder


def set_stage(folder: Path) -> Stage:
    """Make the inputs in ``folder``."""
    write_checkpoint(folder / "model", num_hidden_layers=1)
    lines = [_TEXT.format(number) for number in range(_LINES)]
    (folder / "text.txt").write_text("".join(lines))
    return Stage(folder)


@dataclass(frozen=True)
class Case:
    """A command."""

    name: str
    arguments: Callable[[Stage, Path], Sequence[object]]
    """Those of the command, in a folder of its own."""
    output: str = "out"
    """What it writes there, or changes."""
    before: Callable[[Stage, Path], object] = lambda stage, folder: None
    """Puts there what the command finds."""
    after: frozenset[str] = frozenset({"out"})
    """What it leaves there, and nothing else."""
    again: tuple[str, ...] = field(default=())
    """Options of the next run, where the output is there already."""

    def prepare(self, stage: Stage, folder: Path) -> Sequence[object]:
        """``folder`` as the command finds it, and the command."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.before(stage, folder)
        return self.arguments(stage, folder)

    def next_run(self, stage: Stage, folder: Path) -> Sequence[object]:
        """What a user types after a fault."""
        there = (folder / self.output).exists()
        return [*self.arguments(stage, folder), *(self.again if there else ())]


def _export(stage: Stage, folder: Path, **changes: Any) -> list[object]:
    return ["export", *stage.recipe(**changes), "-o", folder / "out"]


def _older(stage: Stage, folder: Path) -> None:
    made = stage.made("older", "export", *stage.recipe(seed=1))
    shutil.copytree(made, folder / "out")


def _graph(stage: Stage, folder: Path) -> None:
    shutil.copytree(stage.made("graph", "export", *stage.recipe("ort")), folder / "out")


def _working(stage: Stage, folder: Path, **changes: Any) -> list[object]:
    return [*_export(stage, folder, **changes), "--work-dir", folder / "work", "--resume"]


OVERWRITE = ("--overwrite",)
CASES = (
    Case("export", lambda s, f: _export(s, f, target="ort"), again=OVERWRITE),
    Case(
        "export --overwrite",
        lambda s, f: [*_export(s, f, seed=2), "--overwrite"],
        before=_older,
    ),
    Case(
        "export --resume",
        lambda s, f: _working(s, f, rotate="r1,r2"),
        after=frozenset({"out", "work"}),
        again=OVERWRITE,
    ),
    Case(
        "export --layerwise",
        lambda s, f: _working(s, f, layerwise={"enabled": True}),
        after=frozenset({"out", "work"}),
        again=OVERWRITE,
    ),
    Case(
        "calibrate",
        lambda s, f: ["calibrate", *s.recipe(), "-o", f / "out"],
        again=OVERWRITE,
    ),
    Case(
        "capture",
        lambda s, f: ["capture", *s.recipe(rotate="r1,r2"), "-o", f / "out"],
        again=OVERWRITE,
    ),
    Case(
        "rotate",
        lambda s, f: ["rotate", *s.recipe(rotate="r1"), "-o", f / "out"],
        again=OVERWRITE,
    ),
    Case("verify", lambda s, f: ["verify", f / "out", "-q"], before=_graph),
)


def content(folder: Path) -> Content | None:
    """What ``folder`` holds, but for what differs from run to run; ``None``: there is no such
    folder.

    Raises:
        ValueError: a report is no report: half of it was written.
    """
    if not folder.exists():
        return None
    return {name: _digest(folder / name) for name in entries(folder) if not is_partial(name)}


def _digest(path: Path) -> str:
    if path.name == CARD_FILE:
        return "card" if path.stat().st_size else "empty"
    if path.name in ("report.json", "rotation_report.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        return json.dumps({key: own for key, own in values.items() if key not in _VARY})
    if path.name == "quantized_model.json":
        values = json.loads(path.read_text(encoding="utf-8"))
        return json.dumps({key: own for key, own in values.items() if key != "sha256"})
    return digest(path)


def unsound(folder: Path) -> Iterator[str]:
    """What is wrong with an output beside its content, in words."""
    if folder.exists() and is_export(folder):
        for what, names in edited_files(folder, read_report(folder)).items():
            yield from (f"{what}: {name}" for name in names)


def leftovers(folder: Path) -> list[str]:
    """Files and folders below ``folder`` that a finished run does not leave, by their names."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if is_partial(path.name)
        or path.suffix in (".partial", ".rotq", ".tmp")
        or path.name.startswith((".tmp", "rotq.lock"))
    )
