"""Rung 0, of the files beside the weights: what they say of the model, read back from the written
folder and held against it.

A runtime believes its settings, whatever the weights are: a wrong size of heads or a wrong format
is no error of arithmetic, so that no other rung sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from backends.base import ReadsMetadata
from backends.stated import config_differing
from calib.errors import RotqError
from calib.files.reading import read_json, reason_of
from calib.network.skeleton import portable_config
from calib.rotations.files import MANIFEST as ROTATIONS
from calib.rotations.files import load_rotations
from calib.rotations.rotation_set import Rotation
from exporter.parity.rows import row
from exporter.parity.subject import Subject
from exporter.reporting.describe import CONFIG_FILE, load_smoothing
from exporter.reporting.report import SMOOTHING_FILE, ParityRow

_NAME, _METRIC = "metadata, stated against stored", "altered"
_REWRITTEN = ("tokenizer_config.json",)
"""Side files that are spelled anew when they are copied; that they are there is looked at."""
_FIELDS = ("name", "kind", "space", "layer", "order", "seed", "block", "online")


def metadata_rows(subject: Subject) -> list[ParityRow]:
    """How many statements are wrong, and in which file the first of them is."""
    found: dict[str, list[str]] = {
        CONFIG_FILE: list(_config(subject)),
        ROTATIONS: list(_rotations(subject)),
        SMOOTHING_FILE: list(_smoothing(subject)),
        **{name: list(_side_file(name, path, subject)) for name, path in _files(subject).items()},
    }
    if isinstance(subject.backend, ReadsMetadata):
        of_backend = subject.backend.contradictions(
            subject.folder, subject.target, subject.quantized
        )
        for name, wrong in of_backend.items():
            found.setdefault(name, []).extend(wrong)
    wrong = [f"{name}: {statement}" for name, each in found.items() for statement in each]
    note = "; ".join([f"{len(found)} files compared", *wrong[:2]])
    return [row(0, _NAME, _METRIC, float(len(wrong)), 0.0, note)]


def _config(subject: Subject) -> Iterator[str]:
    """``config.json`` against the config of the artifact, and of the original where it is at
    hand.
    """
    try:
        stated = read_json(subject.folder / CONFIG_FILE)
    except (OSError, ValueError) as error:
        yield f"cannot be read: {reason_of(error)}"
        return
    yield from config_differing(stated, subject.quantized.config)
    if subject.fused is not None:
        # a later transformers may have further keys
        config = portable_config(subject.fused.config)
        yield from config_differing(
            stated, {key: value for key, value in config.items() if key in stated}
        )


def _rotations(subject: Subject) -> Iterator[str]:
    try:
        stored = load_rotations(subject.folder)
    except RotqError as error:
        yield error.message
        return
    expected = subject.quantized.rotations
    if list(stored) != list(expected):
        yield "it holds other rotations"
        return
    for name, rotation in expected.items():
        if not _same(stored[name], rotation):
            yield f"{name} is another rotation"


def _same(stored: Rotation, expected: Rotation) -> bool:
    if any(getattr(stored, field) != getattr(expected, field) for field in _FIELDS):
        return False
    one, other = stored.matrix, expected.matrix
    if one is None or other is None:
        return one is other
    return torch.equal(one.cpu(), other.cpu())


def _smoothing(subject: Subject) -> Iterator[str]:
    try:
        stored = load_smoothing(subject.folder)
    except RotqError as error:
        yield error.message
        return
    expected = subject.quantized.smoothing
    apart = stored.keys() ^ expected.keys()
    apart |= {name for name in stored.keys() & expected.keys() if _other(stored, expected, name)}
    if apart:
        yield f"the scales of {sorted(apart)[0]} are others"


def _other(
    stored: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], name: str
) -> bool:
    return not torch.equal(stored[name].cpu(), expected[name].cpu())


def _files(subject: Subject) -> Mapping[str, Path]:
    """Files of the checkpoint that travel along: those of the artifact, or else of the original."""
    files = dict(subject.quantized.files)
    if not files and subject.source is not None:
        files = subject.source.files
    return {name: path for name, path in files.items() if name != CONFIG_FILE}


def _side_file(name: str, original: Path, subject: Subject) -> Iterator[str]:
    path = subject.folder / name
    if not path.is_file():
        yield "it is missing"
    elif name not in _REWRITTEN and path.read_bytes() != original.read_bytes():
        yield "it is not that of the checkpoint"
