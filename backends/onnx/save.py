"""Writing a graph and its weights, one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from calib.process.progress import Progress

_INLINE_BYTES = 1024
"""Initializers up to this size stay in the ``.onnx`` file, where shape inference sees them; others
are external.
"""
_PAGE = 4096
"""Offsets of whole pages, as the ONNX specification advises, so that runtimes map weights instead
of copying them.
"""


def save(graph: ir.Model, path: Path, *, max_shard_bytes: int | None, progress: Progress) -> None:
    """Write ``graph`` to ``path`` and its weights beside it, and have the ONNX checker look at the
    result.

    Weights go to ``model.onnx.data``, or where they exceed ``max_shard_bytes`` to
    ``model-00001-of-0000n.onnx.data`` and so on, of which each is as large as allowed, or holds a
    single larger tensor.

    Args:
        graph: with initializers that are read when they are written, and not kept.
        path: of the graph, in an empty folder.
        max_shard_bytes: limit of a file of weights; ``None``: one file, however large.
        progress: called after each tensor.
    """
    external = [size for size in _sizes(graph) if size > _INLINE_BYTES]
    one_file = max_shard_bytes is None or sum(size + _PAGE for size in external) <= max_shard_bytes

    def report(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        progress("write", info.index + 1, info.total)

    ir.save(
        graph,
        path,
        external_data=f"{path.name}.data",
        size_threshold_bytes=_INLINE_BYTES,
        max_shard_size_bytes=None if one_file else max_shard_bytes,
        alignment=_PAGE,
        align_threshold=_PAGE,
        callback=report,
    )
    onnx.checker.check_model(path)


def _sizes(graph: ir.Model) -> list[int]:
    return [
        value.const_value.nbytes
        for value in graph.graph.initializers.values()
        if value.const_value is not None
    ]
