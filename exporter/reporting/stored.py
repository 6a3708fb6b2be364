"""What a folder stores, by what it is: for ``rotq inspect`` and for the page of a report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from backends.base import StoredTensor


@dataclass(frozen=True)
class StoredBytes:
    """All tensors of one kind and dtype."""

    kind: str
    dtype: str
    tensors: int
    nbytes: int


def stored_bytes(tensors: Iterable[StoredTensor]) -> tuple[StoredBytes, ...]:
    """``tensors`` by kind and dtype, the largest share first."""
    sizes_of: dict[tuple[str, str], list[int]] = {}
    for tensor in tensors:
        sizes_of.setdefault((tensor.kind, tensor.dtype), []).append(tensor.nbytes)
    rows = [
        StoredBytes(kind, dtype, len(sizes), sum(sizes))
        for (kind, dtype), sizes in sizes_of.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.nbytes))
