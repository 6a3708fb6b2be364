"""What the walk has finished: one safetensors file per block, and the journal that says which of
them count.

The files are those of a :class:`~calib.artifact.QuantizedModel`, by name and by key, and can be
moved into its folder as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from calib.errors import CheckpointError, OutputError
from calib.files.reading import MALFORMED, is_file_in, read_json, reason_of
from calib.files.sealed import digest
from calib.layerwise.files import write_json, write_tensors

JOURNAL = "journal.json"
_FOLDER = "shards"
_AGAIN = "start again in another --work-dir"


class ShardStore:
    """The shards of one walk, in the order in which they were finished.

    A shard counts once it is in the journal, which is replaced whole after the shard: a process
    that is killed at any moment leaves a journal whose shards are complete.
    """

    def __init__(self, folder: Path, *, resume: bool = False) -> None:
        """
        Args:
            folder: the work folder; made if it does not exist.
            resume: go on with the walk that the folder holds, if it holds one.

        Raises:
            OutputError: the folder holds a walk and ``resume`` is not given.
            CheckpointError: the journal or a shard in it is damaged.
        """
        self.folder = folder
        self._settings: dict[str, str] = {}
        self._shards: dict[str, dict[str, Any]] = {}
        (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
        if not (folder / JOURNAL).is_file():
            return
        if not resume:
            raise OutputError(
                f"the work folder '{folder}' holds a layer-wise run already",
                hint="give --resume to go on, or another --work-dir",
            )
        self._read()

    def bind(self, settings: Mapping[str, str]) -> None:
        """State what the shards depend on; a resumed walk must state the same.

        Raises:
            OutputError: a setting differs from that of the walk that is resumed; the message names
                it.
        """
        for key in sorted({*settings, *self._settings} if self._settings else ()):
            before, now = self._settings.get(key, "not set"), settings.get(key, "not set")
            if before != now:
                raise OutputError(
                    f"cannot resume in '{self.folder}': {key} was {before} and is now {now}",
                    hint=(
                        "resume with the settings it was started with, or start in another"
                        " --work-dir"
                    ),
                )
        self._settings = dict(settings)
        self._write()

    def write(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        next_inputs: Mapping[str, str] | None = None,
    ) -> None:
        """Finish a shard.

        Args:
            name: such as ``block-00003``.
            tensors: by key in the artifact.
            next_inputs: digests of the hidden states with which a resumed walk goes on after this
                shard.
        """
        path = self._path(name)
        sha256 = write_tensors(path, tensors)
        self._shards[name] = {"sha256": sha256, "next_inputs": dict(next_inputs or {})}
        self._write()

    def finished(self) -> list[str]:
        """The names of the finished shards."""
        return list(self._shards)

    def paths(self) -> list[Path]:
        """The files of the finished shards."""
        return [self._path(name) for name in self._shards]

    def next_inputs(self, name: str) -> dict[str, str]:
        """What :meth:`write` was given with the finished shard ``name``."""
        return dict(self._shards[name]["next_inputs"])

    def _path(self, name: str) -> Path:
        return self.folder / _FOLDER / _file(name)

    def _write(self) -> None:
        write_json(self.folder / JOURNAL, {"settings": self._settings, "shards": self._shards})

    def _read(self) -> None:
        path = self.folder / JOURNAL
        try:
            journal = read_json(path)
            self._settings, self._shards = dict(journal["settings"]), dict(journal["shards"])
            expected = {name: str(shard["sha256"]) for name, shard in self._shards.items()}
            for name in self._shards:
                self.next_inputs(name)
        except MALFORMED as error:
            raise CheckpointError(
                f"'{path}' is damaged: {reason_of(error)}", hint=_AGAIN
            ) from error
        for name, sha256 in expected.items():
            shard = self._path(name)
            if not is_file_in(self.folder / _FOLDER, _file(name)) or digest(shard) != sha256:
                raise CheckpointError(
                    f"'{shard}' is missing or damaged, but {JOURNAL} lists it", hint=_AGAIN
                )


def _file(name: str) -> str:
    return f"quantized_model-{name}.safetensors"
