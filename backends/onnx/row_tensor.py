"""Initializers that are made and written some rows at a time, so that no tensor need ever be whole
in memory.

A weight lies in the artifact as ``[out, in]``, mapped from disk, and in the graph as ``[in, out]``:
it cannot be written from where it is. The head of a large vocabulary takes gigabytes, and turning
it at once as many again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import BinaryIO

import onnx_ir as ir
from torch import Tensor

from backends.pages import release_pages

PART_BYTES = 128 * 2**20
"""What is made at once, about."""


class RowTensor(ir.LazyTensor):
    """A tensor ``[rows, columns]`` whose rows can be read apart.

    Args:
        read: gives rows ``start`` to ``stop``, in ``dtype``.
        dtype: of the elements; of those below a byte, rows are read an even number at a time, and
            so packed as a whole.
        shape: two sizes.
        name: of the initializer.
        sources: what the rows are read from; once they are written these need no longer be in
            memory.
    """

    def __init__(
        self,
        read: Callable[[int, int], ir.TensorProtocol],
        *,
        dtype: ir.DataType,
        shape: ir.Shape,
        name: str,
        sources: Sequence[Tensor],
    ) -> None:
        rows, columns = (int(size) for size in shape.numpy())
        super().__init__(lambda: read(0, rows), dtype=dtype, shape=shape, name=name)
        self._read = read
        self._rows = rows
        self._sources = sources
        self._step = max(2, int(PART_BYTES // max(1, columns * dtype.itemsize)) // 2 * 2)

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes, part by part."""
        for start in range(0, self._rows, self._step):
            file.write(self._read(start, min(start + self._step, self._rows)).tobytes())
        for source in self._sources:
            release_pages(source)
