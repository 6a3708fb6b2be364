"""Writing one safetensors file tensor by tensor, so that memory holds one tensor, or two small
ones, and not the file.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the length of the
header, little endian; the header, JSON padded with spaces to a multiple of eight bytes; the
tensors, without gaps. Offsets follow from dtypes and shapes alone, so the header is written before
any tensor has been made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from backends.safetensors.layout import Entry

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
"""torch's dtypes by the format's names for them."""
_HELD_BYTES = 128 * 10**6
"""Two tensors are held at once only where they fit in here; enough to keep the disk busy."""


def write_tensors(path: Path, entries: Sequence[Entry], written: Callable[[], None]) -> str:
    """Write ``entries`` into ``path``.

    A tensor is made while the one before it is being written and hashed, in a thread each. The same
    entries give the same bytes.

    Args:
        path: the file; it is replaced.
        entries: its tensors; keys are unique.
        written: called after every tensor.

    Returns:
        SHA-256 of the file.

    Raises:
        ValueError: an entry reads as another dtype or shape than it says.
    """
    # Readers map the file and view a tensor's bytes as its dtype, which needs them aligned: the
    # widest come first.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header = _header(ordered)
    digest = hashlib.sha256(header)
    with path.open("wb") as file, ThreadPoolExecutor(2) as threads:
        file.write(header)

        def hand_over(data: memoryview) -> None:
            _finish(pending)
            pending.extend(
                threads.submit(_consume, take, [data]) for take in (file.write, digest.update)
            )

        pending: list[Future[Any]] = []
        bytes_before = 0
        for entry in ordered:
            if bytes_before + entry.nbytes > _HELD_BYTES:
                _finish(pending)
            hand_over(_bytes(entry))
            bytes_before = entry.nbytes
            written()
        _finish(pending)
    return digest.hexdigest()


def _consume(take: Callable[[memoryview], object], handed_over: list[memoryview]) -> None:
    """Give ``take`` what is held and let go of it: a thread keeps its arguments for longer than its
    job takes.
    """
    take(handed_over.pop())


def _finish(jobs: list[Future[Any]]) -> None:
    """Wait for ``jobs``, raise what they raise, and let go of what they hold."""
    for job in jobs:
        job.result()
    jobs.clear()


def _header(entries: Sequence[Entry]) -> bytes:
    # transformers asks for the framework that wrote the file
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0

    for entry in entries:
        end = start + entry.nbytes
        table[entry.key] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
        start = end

    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    return len(text).to_bytes(8, "little") + text


def _bytes(entry: Entry) -> memoryview:
    tensor = entry.read()
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != tuple(entry.shape):
        raise ValueError(
            f"'{entry.key}' was announced as {entry.dtype} {list(entry.shape)} "
            f"and is {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
