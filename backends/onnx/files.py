"""The files of a written graph: opening them, and saying what is wrong with them before a runtime
has to.

Only protobuf and raw bytes are read. Nothing in a folder is unpickled, and no library that it may
hold is ever loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

# its stubs are a package of their own
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from calib.errors import BackendError
from calib.files.reading import is_file_in, reason_of, regular_file

LARGEST = 2**28
"""Bytes of a graph, whose weights are files of their own; it takes some ten kilobytes a layer."""


@dataclass(frozen=True)
class DataRange:
    """Where an initializer's bytes lie."""

    location: str
    """File, relative to that of the graph."""
    offset: int
    length: int


def read_proto(path: Path) -> onnx.ModelProto:
    """The graph file at ``path`` without its external data.

    Raises:
        BackendError: it is missing, no ONNX file, or the files of weights that it names are missing
            or too short.
    """
    try:
        if regular_file(path).stat().st_size > LARGEST:
            raise unreadable(path, f"it is larger than {LARGEST:,} bytes")
        proto = onnx.load(path, load_external_data=False)
    except (OSError, ValueError, DecodeError) as error:
        raise unreadable(path, reason_of(error)) from error

    if not proto.graph.node:
        raise unreadable(path, "it holds no graph")
    if any(not isinstance(name, str) for name in _names(proto.graph)):
        raise unreadable(path, "it holds a name that is no text")

    try:
        _check_data(path, proto)
    except ValueError as error:
        raise unreadable(path, f"it says no place of its weights: {reason_of(error)}") from error
    return proto


def _names(graph: onnx.GraphProto) -> Iterator[object]:
    """All names in a graph; protobuf gives those that are no UTF-8 as bytes."""
    for named in (*graph.initializer, *graph.input, *graph.output):
        yield named.name
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)


def unreadable(path: Path, reason: str) -> BackendError:
    """The error for a graph that cannot be opened."""
    return BackendError(
        f"'{path}' cannot be loaded: {' '.join(reason.split())}",
        hint="the file or its data is missing, damaged or edited; export the model again",
    )


def data_range(tensor: onnx.TensorProto) -> DataRange | None:
    """Where the bytes of an external initializer lie; ``None`` where the graph file itself holds
    them.
    """
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return DataRange(
        entries.get("location", ""), int(entries.get("offset", 0)), int(entries.get("length", 0))
    )


def data_ranges(proto: onnx.ModelProto) -> Iterator[tuple[str, DataRange]]:
    """Name and place of each external initializer of the graph."""
    for tensor in proto.graph.initializer:
        place = data_range(tensor)
        if place is not None:
            yield tensor.name, place


def follow_links(path: Path, proto: onnx.ModelProto) -> dict[str, Path]:
    """Have ``proto``, read from ``path``, name the files that its data leads to: in the cache of
    the Hugging Face hub every file is a link, and readers that are told a folder follow none out of
    it.

    Returns:
        By external initializer, the folder of the file that is now named.
    """
    folders = {}
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                data = (path.parent / entry.value).resolve()
                entry.value, folders[tensor.name] = data.name, data.parent
    return folders


def _check_data(path: Path, proto: onnx.ModelProto) -> None:
    """Refuse a graph whose data is not all there, or is said to lie outside its folder."""
    needed: dict[str, tuple[int, str]] = {}
    for name, place in data_ranges(proto):
        if min(place.offset, place.length) < 0:
            raise unreadable(path, f"'{name}' is said to lie at {place.offset}, {place.length}")
        needed[place.location] = max(
            needed.get(place.location, (0, name)), (place.offset + place.length, name)
        )

    for location, (end, name) in needed.items():
        if not location or Path(location).name != location:
            raise unreadable(
                path, f"'{name}' is stored in '{location}', which is not a file beside it"
            )
        data = path.parent / location
        if not is_file_in(path.parent, location):
            raise unreadable(path, f"'{location}', which holds its weights, is missing")
        size = data.stat().st_size
        if size < end:
            raise unreadable(
                path, f"'{location}' is truncated: '{name}' ends at byte {end}, the file at {size}"
            )
