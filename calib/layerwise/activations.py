"""The hidden states between two blocks: in memory while they fit, on disk beyond."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from calib.errors import CheckpointError
from calib.files.reading import reason_of
from calib.files.sealed import digest
from calib.layerwise.files import write_tensors

_KEY = "hidden_states"
_AGAIN = "start again in another --work-dir"


class Activations:
    """Hidden states ``[rows, length, hidden]`` by batch, in their own dtype, bit for bit.

    A batch is a chunk: the unit that is held in memory, or written to a file of its own.
    """

    def __init__(
        self,
        folder: Path,
        max_memory: int,
        *,
        persist: bool,
        existing: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            folder: for the files; what else is in it is removed.
            max_memory: bytes that may be held in memory.
            persist: write every chunk to disk, those held in memory as well, so that another run
                finds them.
            existing: the :attr:`digests` of an earlier run that persisted its chunks in ``folder``,
                to go on with them.

        Raises:
            CheckpointError: an existing file is missing or damaged.
        """
        if existing is None:
            shutil.rmtree(folder, ignore_errors=True)
        for name, expected in (existing or {}).items():
            if not (folder / name).is_file() or digest(folder / name) != expected:
                raise CheckpointError(
                    f"'{folder / name}' is missing or damaged, so no run can go on from it",
                    hint=_AGAIN,
                )
        self._folder = folder
        self._free = max_memory
        self._persist = persist
        self._held: dict[int, Tensor] = {}
        self._digests = dict(existing or {})
        self._length = len(self._digests)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each file, by name in the folder."""
        return dict(self._digests)

    def append(self, hidden: Tensor) -> None:
        """Add the hidden states of the next batch."""
        hidden = hidden.detach().cpu()
        fits = hidden.nbytes <= self._free
        if fits:
            self._held[self._length] = hidden
            self._free -= hidden.nbytes
        if self._persist or not fits:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._path(self._length)
            self._digests[path.name] = write_tensors(path, {_KEY: hidden})
        self._length += 1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, batch: int) -> Tensor:
        """The hidden states of a batch.

        Raises:
            CheckpointError: their file is gone or damaged.
        """
        if batch in self._held:
            return self._held[batch]
        path = self._path(batch)
        try:
            return load_file(path)[_KEY]
        except (OSError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"'{path}' cannot be read: {reason_of(error)}", hint=_AGAIN
            ) from error

    def delete(self) -> None:
        """Free the memory and remove the files."""
        self._held.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, batch: int) -> Path:
        return self._folder / f"{batch:05d}.safetensors"
