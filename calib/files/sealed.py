"""JSON manifests that show whether they, or the files that they list, are as they were written.

A manifest holds the SHA-256 of each file beside it (``files``), and its own (``sha256``): that of
everything else in it as JSON with sorted keys, however the file lays it out. A flipped bit, a
truncated file and an edit show. Who edits a file can seal it anew, so it is no proof of origin.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from calib.files.reading import MALFORMED, is_file_in, read_json, reason_of

_SEAL, _FILES = "sha256", "files"


class DamagedError(ValueError):
    """A manifest or a file is not as it was written; says which and how, not what to do."""


def digest(path: Path) -> str:
    """The SHA-256 of a file, as hex, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal_of(values: Mapping[str, Any]) -> str:
    """The SHA-256 of ``values`` as JSON, as hex."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed(path: Path, values: Mapping[str, Any], files: Iterable[str] = ()) -> None:
    """Write ``values`` as a sealed manifest.

    Args:
        path: the manifest.
        values: what JSON can hold; keys are strings.
        files: names of files beside it, complete, that it shall vouch for.

    Raises:
        OSError: it cannot be written, or a file cannot be read.
    """
    sums = {name: digest(path.parent / name) for name in sorted(set(files))}
    path.write_text(sealed_text({**values, _FILES: sums}), encoding="utf-8")


def sealed_text(values: Mapping[str, object]) -> str:
    """A sealed manifest of ``values`` as text, for whoever writes the file in a way of its own; it
    vouches for those files alone that ``values`` lists.
    """
    # as a reader will have them: tuples are lists then
    whole = json.loads(json.dumps({**values, _FILES: values.get(_FILES, {})}, allow_nan=False))
    return json.dumps({**whole, _SEAL: seal_of(whole)}, indent=2) + "\n"


def read_sealed(
    path: Path, check: Callable[[dict[str, Any]], None], *, required: bool = True
) -> dict[str, Any]:
    """The values of a sealed manifest, its seal and the files that it lists (``files``: SHA-256 by
    name) checked.

    Args:
        path: the manifest.
        check: called with the values before the seal is looked at: another format may have
            another one. An error of rotq that it raises passes through.
        required: whether one without a seal is damaged; rotq did not always write them.

    Raises:
        DamagedError: it is no JSON object of a manifest, or it or a file is not as it was written.
        OSError: a file cannot be read.
    """
    try:
        values = read_json(path)
        check(values)
        seal = values.pop(_SEAL, None)
        fits = seal == seal_of(values)  # no NaN or Inf: they are no JSON
    except DamagedError:
        raise
    except MALFORMED as error:
        raise DamagedError(f"{path.name} is damaged: {reason_of(error)}") from error
    if seal is None and not required:
        return values
    if not fits:
        raise DamagedError(f"{path.name} is damaged or was edited: its checksum does not fit")
    sums = values.get(_FILES)
    if not isinstance(sums, dict):
        raise DamagedError(f"{path.name} is damaged: it has no checksums of files")
    check_files(path.parent, sums)
    return values


def check_files(folder: Path, sums: Mapping[str, str]) -> None:
    """Compare files with their SHA-256 by name.

    Raises:
        DamagedError: one is missing, or another than was written.
    """
    for name, expected in sums.items():
        if not is_file_in(folder, name):
            raise DamagedError(f"{name} is missing")
        if digest(folder / name) != expected:
            raise DamagedError(f"{name} is damaged or was changed: its checksum does not fit")
