"""What rotq wrote into a folder: ``rotq_files.json``, which every output has.

``--overwrite`` goes by it alone. A file that it does not name belongs to somebody else, whatever
else the folder looks like.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from calib.files.reading import read_json
from calib.files.sealed import digest
from exporter.output.strays import is_disposable

LIST_FILE = "rotq_files.json"
_FORMAT_VERSION = 1


def write_list(folder: Path) -> None:
    """Name every file below ``folder`` in its :data:`LIST_FILE`."""
    listed = {"format_version": _FORMAT_VERSION, "files": sorted(entries(folder))}
    (folder / LIST_FILE).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")


def read_list(folder: Path) -> frozenset[str] | None:
    """The files that rotq wrote into ``folder``, by relative POSIX path; ``None`` where it wrote
    none, or nothing sound says so.
    """
    try:
        listed = read_json(folder / LIST_FILE)
        names, version = listed["files"], listed["format_version"]
        paths = [PurePosixPath(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    inside = all(not path.is_absolute() and ".." not in path.parts for path in paths)
    return frozenset({*names, LIST_FILE}) if inside and version == _FORMAT_VERSION else None


def unlisted(folder: Path) -> list[str] | None:
    """What ``folder`` holds beside what rotq wrote, sorted: files, links, and empty folders, but
    nothing disposable; ``None`` where it is not of rotq.
    """
    listed = read_list(folder)
    if listed is None:
        return None
    return sorted(
        name
        for name in entries(folder, empty=True)
        if name not in listed and not is_disposable(name)
    )


def remove_listed(folder: Path) -> bool:
    """Remove what rotq wrote into ``folder`` and what is disposable, and the folder if that was
    all; whether it was.

    The list goes last, so that what an interrupt leaves is still known.
    """
    listed = read_list(folder) or frozenset()
    disposable = {name for name in entries(folder) if is_disposable(name)}
    for name in sorted(listed | disposable, key=lambda name: name == LIST_FILE):
        with contextlib.suppress(OSError, ValueError):  # a name that no file can have
            if not _is_behind_link(folder, name):
                (folder / name).unlink(missing_ok=True)
    for inner, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            Path(inner).rmdir()
    return not folder.exists()


def _is_behind_link(folder: Path, name: str) -> bool:
    """Whether a link to a folder leads to ``name``, which then lies elsewhere."""
    return any((folder / inner).is_symlink() for inner in PurePosixPath(name).parents[:-1])


def sha256_tree(folder: Path, exclude: Collection[str] = ()) -> dict[str, str]:
    """SHA-256 of every file below ``folder`` by relative POSIX path, sorted; ``exclude`` names
    paths to leave out.
    """
    checksums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in exclude:
            checksums[name] = digest(path)
    return checksums


def entries(folder: Path, *, empty: bool = False) -> Iterator[str]:
    """Every file and every link below ``folder``, by relative POSIX path, and every ``empty``
    folder; links are not followed.
    """
    for inner, folders, files in os.walk(folder):
        here = Path(inner)
        links = [name for name in folders if (here / name).is_symlink()]
        for path in [here / name for name in (*files, *links)]:
            yield path.relative_to(folder).as_posix()
        if empty and not folders and not files and here != folder:
            yield here.relative_to(folder).as_posix()
