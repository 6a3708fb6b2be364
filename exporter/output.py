"""Output folders that appear complete or not at all.

A run writes into a hidden sibling of the target, which is renamed into place at the very end. A
rename inside one directory is atomic, so whoever looks at the target sees the old folder or the new
one, never a half-written one. There is no fsync: this protects against interrupts, errors and full
disks, not against a power cut.

A failed parity check is not an exception: the caller finishes the block normally and the folder is
kept, marked failed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from calib.errors import OutputError

logger = logging.getLogger(__name__)

MARKERS = ("report.json", "rotq.yaml", "quantized_model.json")
"""A folder that holds one of these was written by rotq, so ``--overwrite`` may replace it."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error``, or what caused it, says that the disk is full.

    Writers in native code (safetensors, torch) raise their own exception types, which carry the
    system's message only.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return True
        if any(os.strerror(code) in str(cause) for code in _FULL):
            return True
        cause = cause.__cause__
    return False


def check_target(target: Path, overwrite: bool = False) -> None:
    """Refuse, before the long job, a target that could not be written after it.

    Raises:
        OutputError: the target exists and may not be replaced, or its parent cannot be written.
    """
    if target.is_symlink() and not target.exists():
        raise OutputError(
            f"the output '{target}' is a link to nothing",
            hint="remove it, or choose another -o/--output",
        )

    if target.exists() and not target.is_dir():
        raise OutputError(
            f"the output '{target}' is a file, not a folder", hint="choose another -o/--output"
        )
    if target.exists() and not overwrite:
        raise OutputError(
            f"the output folder '{target}' exists already",
            hint="give --overwrite, or choose another -o/--output",
        )
    if (
        target.exists()
        and any(target.iterdir())
        and not any((target / name).is_file() for name in MARKERS)
    ):
        raise OutputError(
            f"the folder '{target}' is not empty and was not written by rotq ({', '.join(MARKERS)}"
            " are all missing)",
            hint="choose another -o/--output, or remove the folder yourself",
        )

    parent = _nearest_existing(_resolved(target).parent)
    if not parent.is_dir():
        raise OutputError(
            f"cannot create '{target}': '{parent}' is not a folder",
            hint="choose another -o/--output",
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"cannot create '{target}': no permission to write in '{parent}'",
            hint="choose another -o/--output",
        )


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` when the block ends well, and vanishes when it
    does not.

    Args:
        target: where the result shall appear; missing parents are created, and removed again on
            failure.
        overwrite: replace an existing folder that rotq wrote. It is removed only once the new one
            is in place.

    Raises:
        OutputError: the target is refused (:func:`check_target`), cannot be written, or the disk is
            full.
    """
    check_target(target, overwrite)
    final = _resolved(target)
    created: list[Path] = []
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")

    try:
        _make_parents(final.parent, created)
        temporary.mkdir()
        yield temporary
        _share(temporary)
        # somebody else may have put something there since the job began
        check_target(target, overwrite)
        _put_in_place(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in reversed(created):
            with contextlib.suppress(OSError):
                folder.rmdir()
        explained = _explain(error, target, final, temporary)
        if explained is not None:
            raise explained from error
        raise


def sha256_tree(folder: Path, exclude: Collection[str] = ()) -> dict[str, str]:
    """SHA-256 of every file below ``folder`` by relative POSIX path, sorted; ``exclude`` names
    paths to leave out.
    """
    checksums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in exclude:
            with path.open("rb") as file:
                checksums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return checksums


def _resolved(target: Path) -> Path:
    # A link to a folder stays: what it points to is replaced. Also gives '.' and 'a/..' a name to
    # build siblings from.
    return Path(os.path.realpath(target))


def _nearest_existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _make_parents(folder: Path, created: list[Path]) -> None:
    """Create ``folder`` and its parents, noting each new one in ``created`` at once."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        created.append(new)


def _share(folder: Path) -> None:
    """Let others read the files as far as this user's umask does: some libraries (safetensors 0.8)
    write private ones.

    The umask shows in the permissions of ``folder``, which was created here.
    """
    allowed = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(allowed)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename ``temporary`` to ``final``; an old folder steps aside first and comes back if that
    fails.
    """
    old = final.with_name(f".{final.name}.{secrets.token_hex(4)}.old")
    try:
        if final.exists():
            final.replace(old)
        temporary.replace(final)
    except BaseException as error:
        if old.exists() and not final.exists():
            old.rename(final)
        if isinstance(error, OSError) and not is_disk_full(error):
            raise OutputError(
                f"cannot put the result at '{final}': {error.strerror or error}",
                hint="choose another -o/--output",
            ) from error
        raise

    if old.exists():
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            logger.warning(
                "the replaced folder could not be removed completely; remove '%s' yourself", old
            )


def _explain(
    error: BaseException, target: Path, final: Path, temporary: Path
) -> OutputError | None:
    """The known failure that ``error`` amounts to, or ``None`` where it is not about writing the
    output.
    """
    if isinstance(error, Exception) and is_disk_full(error):
        return OutputError(
            f"the disk is full: '{target}' was not written",
            hint="free some space, or choose another -o/--output",
        )
    if not isinstance(error, OSError) or not isinstance(error.filename, str):
        return None
    # Only paths of the output itself: an unreadable *input* must not be reported as an output that
    # cannot be written.
    path = Path(error.filename)
    if path.is_relative_to(temporary) or final.is_relative_to(path):
        return OutputError(
            f"cannot write '{target}': {error.strerror} ({path})", hint="choose another -o/--output"
        )
    return None
