"""Checksums that fit damaged content: what somebody who edits a folder can write as well."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from calib.files.sealed import digest, seal_of

_SHA256 = hashlib.sha256().digest_size


def none(folder: Path) -> None:
    """Nothing is under a checksum."""


def sealed(*names: str) -> Callable[[Path], None]:
    """The manifests ``names``: their own seal, and the sums of the files that they list."""

    def repair(folder: Path) -> None:
        for name in names:
            with suppress(OSError, ValueError, RecursionError, TypeError, AttributeError):
                values = _json(folder / name)
                values.pop("sha256", None)
                for file in values.get("files", ()):
                    if _is_file(folder / file):
                        values["files"][file] = digest(folder / file)
                _write(folder / name, {**values, "sha256": seal_of(values)})

    return repair


def bundle(folder: Path) -> None:
    """The manifest of a bundle, and those of rotations in it."""
    sealed("rotations.json")(folder)
    path = folder / "rotq_bundle.json"
    with suppress(OSError, ValueError, RecursionError, TypeError, AttributeError, KeyError):
        values = _json(path)
        values.pop("sha256", None)
        for file, entry in values["files"].items():
            if _is_file(folder / file) and isinstance(entry, dict):
                entry["sha256"] = digest(folder / file)
                entry["bytes"] = (folder / file).stat().st_size
        _write(path, {**values, "sha256": seal_of(values)})


def entries(folder: Path) -> None:
    """Entries of the user's cache begin with the digest of what follows."""
    for path in folder.iterdir():
        if _is_file(path):
            data = path.read_bytes()[_SHA256:]
            path.unlink()
            path.write_bytes(hashlib.sha256(data).digest() + data)


def everything(folder: Path) -> None:
    """Every folder of what the command line is given, and the checksums of reports."""
    for inner in folder.iterdir():
        sealed("quantized_model.json", "rotations.json", "manifest.json", "prefix.json")(inner)
        bundle(inner)
        report = inner / "report.json"
        with suppress(OSError, ValueError, RecursionError, TypeError, AttributeError, KeyError):
            values = _json(report)
            for file in values["checksums"]:
                if _is_file(inner / file):
                    values["checksums"][file] = digest(inner / file)
            _write(report, values)


def _json(path: Path) -> Any:
    if not _is_file(path):
        raise ValueError("nothing to repair")
    return json.loads(path.read_bytes())


def _is_file(path: Path) -> bool:
    with suppress(OSError, ValueError):
        return path.is_file() and path.stat().st_size < 2**24
    return False


def _write(path: Path, values: Any) -> None:
    text = json.dumps(values)
    path.unlink()
    path.write_text(text, encoding="utf-8")
