"""The samples of a saved capture as torch data sets, for training loops that take a ``DataLoader``.

Items are read from the memory-mapped files one at a time, so a data set costs no memory to speak
of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from calib.capture.storage import R1_SAMPLES, R2_SAMPLES
from calib.errors import CheckpointError, DataError
from calib.files.reading import reason_of, regular_file


class _SampleFile:
    """The ``values`` and ``weights`` of a samples file, opened on first use."""

    def __init__(self, path: Path, *, dimensions: int) -> None:
        """
        Args:
            path: of the file.
            dimensions: of ``values``: 2 for R1, 4 for R2.

        Raises:
            CheckpointError: the file holds something else.
        """
        self._path = path
        self._handle: Any = None
        self.shape: list[int] = self.slice("values").get_shape()
        weights: list[int] = self.slice("weights").get_shape()
        if len(self.shape) != dimensions or weights != [*self.shape[:-3], self.shape[-2]]:
            raise self._error(f"values {self.shape} and weights {weights} do not fit")

    def slice(self, name: str) -> Any:
        """A view of the tensor ``name`` that reads what it is indexed with."""
        if self._handle is None:
            try:
                self._handle = safe_open(regular_file(self._path), framework="pt")
            except (OSError, ValueError, SafetensorError) as error:
                raise self._error(reason_of(error)) from error
        try:
            return self._handle.get_slice(name)
        except SafetensorError as error:
            raise self._error(reason_of(error)) from error

    def _error(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"cannot read the samples '{self._path}': {reason}",
            hint="Give a folder that `rotq capture` wrote.",
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave the handle out: a worker process of a DataLoader opens the file itself."""
        return {**self.__dict__, "_handle": None}


class R1Dataset(Dataset[tuple[Tensor, Tensor]]):
    """The R1 samples of a capture.

    Item i is (token [hidden] float32, weight [] float32).

    Args:
        folder: what :meth:`calib.capture.storage.Capture.save` has written.

    Raises:
        CheckpointError: the folder holds no R1 samples.
    """

    def __init__(self, folder: Path) -> None:
        self._file = _SampleFile(folder / R1_SAMPLES, dimensions=2)

    def __len__(self) -> int:
        """The number of tokens."""
        return self._file.shape[0]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Read one token."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._file.slice("values")[index].float(), self._file.slice("weights")[index]


class R2Dataset(Dataset[tuple[Tensor, Tensor]]):
    """The R2 samples of one layer of a capture, in an order shuffled by a seed.

    Item i is (values [kv heads, head_dim] float32, weight [] float32): one sample for each
    key/value head.

    Args:
        folder: what :meth:`calib.capture.storage.Capture.save` has written.
        layer: the position of the layer among the captured ones, from 0.
        seed: the shuffle.

    Raises:
        CheckpointError: the folder holds no R2 samples.
        DataError: there is no such layer.
    """

    def __init__(self, folder: Path, layer: int, *, seed: int = 0) -> None:
        self._file = _SampleFile(folder / R2_SAMPLES, dimensions=4)
        layers, _, entries, _ = self._file.shape
        if not 0 <= layer < layers:
            raise DataError(
                f"the capture has no R2 layer {layer}", hint=f"Layers are 0 to {layers - 1}."
            )
        self._layer = layer
        self._order = torch.randperm(
            entries, generator=torch.Generator().manual_seed(seed)
        ).tolist()

    def __len__(self) -> int:
        """The number of samples of each head."""
        return len(self._order)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Read one sample of each head."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        entry = self._order[index]
        return (
            self._file.slice("values")[self._layer, :, entry].float(),
            self._file.slice("weights")[self._layer, entry],
        )
