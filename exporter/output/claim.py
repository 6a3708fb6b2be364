"""Output folders that appear complete or not at all.

A run claims its target before the long job, by a hidden folder beside it (``.NAME.rotq``) that it
holds locked. It writes in there, and the result is moved into place at the very end: whoever looks
at the target sees the old folder or the new one, never a half-written one. What a killed run leaves
is removed by the next one that writes beside it.

Every file, and every folder that names it, is on the disk before the result is moved into place,
and the move is before what it replaced is removed: as far as the disk keeps what it says that it
has, a power cut leaves the old folder or the new one as well.

A failed parity check is not an exception: the caller finishes the block normally and the folder is
kept, marked failed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from calib.errors import OutputError
from calib.files.durable import sync_folder, sync_tree
from exporter.output.failures import why_not_written
from exporter.output.listing import LIST_FILE, read_list, remove_listed, unlisted, write_list
from exporter.output.lock import LOCK_FILE, held, locked, making, release, take
from exporter.output.swap import swap

logger = logging.getLogger(__name__)

_ANOTHER = "choose another -o/--output"
_WAIT = "wait for that run to end, or choose another -o/--output"
_NEW, _OLD, _SCRATCH = "new", "old", "scratch"
_BEFORE_LISTS = ("report.json", "rotq.yaml")
"""What exports of versions without lists hold, and maybe folders of others."""
_SHOWN = 3
"""Files of somebody else that an error names."""


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
        raise OutputError(f"the output '{target}' is a file, not a folder", hint=_ANOTHER)
    if target.exists() and not overwrite:
        raise OutputError(
            f"the output folder '{target}' exists already",
            hint="give --overwrite, or choose another -o/--output",
        )
    if target.exists():
        _check_replaceable(target)

    parent = _nearest_existing(_resolved(target).parent)
    if not parent.is_dir():
        raise OutputError(f"cannot create '{target}': '{parent}' is not a folder", hint=_ANOTHER)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"cannot create '{target}': no permission to write in '{parent}'", hint=_ANOTHER
        )


def check_free(target: Path, work_dir: Path | None = None) -> None:
    """Refuse, before anything is begun, what another run holds.

    Args:
        target: of the run.
        work_dir: its work folder.

    Raises:
        OutputError: naming that run.
    """
    holder = held(Claim(target, False).hidden)
    if holder is not None:
        raise OutputError(f"the output '{target}' is in use by {holder}", hint=_WAIT)
    holder = None if work_dir is None else held(work_dir)
    if holder is not None:
        raise OutputError(
            f"the work folder '{work_dir}' is in use by {holder}",
            hint="wait for that run to end, or choose another --work-dir",
        )


def is_in(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or lies below it, by its own name or by where it leads."""
    outer = _resolved(folder)
    starts = (path.absolute(), _resolved(path))
    return any(
        place == outer or (place.exists() and outer.exists() and place.samefile(outer))
        for start in starts
        for place in (start, *start.parents)
    )


class Claim:
    """A target that this process alone may write, for as long as :func:`claimed` lasts.

    Args:
        target: where the result shall appear.
        overwrite: whether a folder that rotq wrote is replaced.
    """

    def __init__(self, target: Path, overwrite: bool) -> None:
        self._target = target
        self._overwrite = overwrite
        self._final = _resolved(target)
        self.hidden = self._final.with_name(f".{self._final.name}.rotq")
        """Folder beside the target, for whatever is not finished."""

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield an empty folder that becomes the target when the block ends well, and vanishes when
        it does not.

        Raises:
            OutputError: the target cannot be written, or the disk is full; a result that is
                finished is kept beside it, and named.
        """
        new = self.hidden / _NEW
        try:
            new.mkdir()
            yield new
            _share(new)
            write_list(new)
            sync_tree(new)
        except BaseException as error:
            shutil.rmtree(new, ignore_errors=True)
            explained = self.explain(error)
            if explained is not None:
                raise explained from error
            raise
        self._put_in_place(new)

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Yield an empty folder on the file system of the target, which vanishes with the block."""
        folder = self.hidden / _SCRATCH / name
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def explain(self, error: BaseException) -> OutputError | None:
        """The known failure that ``error`` amounts to, or ``None`` where it is not about writing
        the target.
        """
        reason = why_not_written(error) if isinstance(error, Exception) else None
        if reason is not None:
            return OutputError(
                f"{reason}: '{self._target}' was not written",
                hint="free some space, raise the limit, or choose another -o/--output",
            )
        if not isinstance(error, OSError) or not isinstance(error.filename, str):
            return None
        # Only paths of the output itself: an unreadable *input* must not be reported as an output
        # that cannot be written.
        path = Path(error.filename)
        if path.is_relative_to(self.hidden) or self._final.is_relative_to(path):
            return OutputError(
                f"cannot write '{self._target}': {error.strerror} ({path})", hint=_ANOTHER
            )
        return None

    def _put_in_place(self, new: Path) -> None:
        try:
            self._check_unclaimed()
            before = swap(new, self._final, self.hidden / _OLD)
            sync_folder(self._final.parent)
        except (OSError, OutputError) as error:
            kept = _moved_aside(new, self._final, "new")
            reason = why_not_written(error) or getattr(error, "strerror", None) or error
            raise OutputError(
                f"cannot put the result at '{self._target}': {reason}. It is in '{kept}'",
                hint="it is complete: move it to where you want it",
            ) from error
        if before is not None:
            _discard(before, self._final)

    def _check_unclaimed(self) -> None:
        """Refuse to replace what somebody else has put at the target since the job began. Files
        that came into a folder of rotq are kept when it goes.
        """
        final = self._final
        if not final.exists():
            return
        if not self._overwrite:
            raise OutputError("it exists by now, and --overwrite was not given")
        if not final.is_dir():
            raise OutputError("it is a file by now")
        if read_list(final) is None and any(final.iterdir()):
            raise OutputError("it is a folder by now that rotq did not write")


@contextlib.contextmanager
def claimed(target: Path, *, overwrite: bool = False) -> Iterator[Claim]:
    """Claim ``target`` for this process: nobody else can write it until the block ends.

    Args:
        target: where a result shall appear; missing parents are created, and removed again where
            none does.
        overwrite: replace an existing folder that rotq wrote. It is removed only once the new one
            is in place.

    Raises:
        OutputError: the target is refused (:func:`check_target`), in use by another run, or cannot
            be written.
    """
    claim = Claim(target, overwrite)
    hidden = claim.hidden
    with contextlib.ExitStack() as held:
        try:
            sweep(hidden.parent)
            check_target(target, overwrite)
            held.enter_context(making(hidden))
            held.enter_context(
                locked(
                    hidden,
                    f"the output '{target}'",
                    "wait for that run to end, or choose another -o/--output",
                )
            )
            _check_no_leftovers(hidden, target)
            held.callback(_clear, hidden)
        except OSError as error:
            raise claim.explain(error) or OutputError(
                f"cannot write '{target}': {error.strerror or error}", hint=_ANOTHER
            ) from error
        yield claim


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Claim ``target`` and write it, where nothing long comes before: :func:`claimed` and
    :meth:`Claim.folder` in one.
    """
    with claimed(target, overwrite=overwrite) as claim, claim.folder() as folder:
        yield folder


def sweep(parent: Path) -> None:
    """Remove what killed runs left of their claims in ``parent``; a result that one of them had
    moved aside comes back. Claims of running processes stay: their locks are held. So do those on a
    file system without locks, where nobody can tell.
    """
    for hidden in parent.glob(".*.rotq"):
        with contextlib.suppress(OSError):
            if (hidden / LOCK_FILE).is_file() and (lock := take(hidden)) is not None:
                try:
                    _clear(hidden)
                finally:
                    release(lock, hidden)
            hidden.rmdir()  # nothing but an empty one


def _check_no_leftovers(hidden: Path, target: Path) -> None:
    """Refuse to go on with what :func:`sweep` left, which it does where nothing can be locked."""
    if any((hidden / name).exists() for name in (_NEW, _OLD, _SCRATCH)):
        raise OutputError(
            f"another run writes the output '{target}', or was killed: what it has not finished is"
            f" in '{hidden}'",
            hint="wait for it to end, remove that folder if it has, or choose another -o/--output",
        )


def _clear(hidden: Path) -> None:
    """Remove whatever of a claim is not finished; its lock stays."""
    final = hidden.with_name(hidden.name.removeprefix(".").removesuffix(".rotq"))
    old = hidden / _OLD
    if old.exists() and not final.exists():  # killed between two renames
        old.rename(final)
    for path in filter(Path.is_dir, (hidden / _OLD, hidden / _NEW)):
        if path.name == _OLD or read_list(path) is not None:
            _discard(path, final)
    for name in (_NEW, _SCRATCH):
        shutil.rmtree(hidden / name, ignore_errors=True)


def _discard(folder: Path, final: Path) -> None:
    """Remove a folder that was replaced; what rotq did not write, and came there in the last
    moment, is kept beside the target.
    """
    if remove_listed(folder):
        return
    kept = _moved_aside(folder, final, "old")
    logger.warning(
        "what could not be removed of the folder that was replaced, or is not of rotq, is in '%s'",
        kept,
    )


def _moved_aside(folder: Path, final: Path, suffix: str) -> Path:
    """Move a folder to a free name beside the target; where nothing can be put there any more, to
    one where nothing removes it.
    """
    name = f"{final.name}.{secrets.token_hex(4)}.{suffix}"
    try:
        return folder.rename(final.with_name(name))
    except OSError:
        return folder.rename(folder.with_name(name))


def _check_replaceable(target: Path) -> None:
    if is_in(Path.cwd(), target):
        raise OutputError(
            f"the output '{target}' is the current folder, or holds it", hint=_ANOTHER
        )
    older = all((target / name).is_file() for name in _BEFORE_LISTS)
    if older and not (target / LIST_FILE).exists():
        raise OutputError(
            f"the folder '{target}' has no {LIST_FILE}, which older versions of rotq did not write:"
            " nothing says what in it is yours",
            hint="remove it by hand, or choose another -o/--output",
        )
    foreign = unlisted(target)
    if foreign is None and any(target.iterdir()):
        raise OutputError(
            f"the folder '{target}' is not empty and was not written by rotq ({LIST_FILE} is"
            " missing or damaged)",
            hint="choose another -o/--output, or remove the folder yourself",
        )
    if foreign:
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        raise OutputError(
            f"the folder '{target}' holds what rotq did not write:"
            f" {', '.join(foreign[:_SHOWN])}{more}",
            hint="move that elsewhere, or choose another -o/--output",
        )


def _resolved(target: Path) -> Path:
    # A link to a folder stays: what it points to is replaced. Also gives '.' and 'a/..' a name to
    # build siblings from.
    return Path(os.path.realpath(target))


def _nearest_existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _share(folder: Path) -> None:
    """Let others read the files as far as this user's umask does: some libraries (safetensors 0.8)
    write private ones.

    The umask shows in the permissions of ``folder``, which was created here.
    """
    allowed = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(allowed)
