"""Traced graphs kept between runs: neither the scheme nor the target changes one, and a trace takes
its time.

An entry (:mod:`backends.user_cache`) holds the ONNX protobuf, without any weight. Its name is a
hash of all that the trace depends on. An entry that does not fit its digest is made again.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import onnx
import onnx_ir as ir

# its stubs are a package of their own
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from backends.onnx import complex_rotary, frequencies, placeholders
from backends.onnx import trace as tracing
from backends.onnx.trace import TraceRequest, trace
from backends.user_cache import cache_folder, read_entry, write_entry
from calib.architectures import generic, trials
from calib.files.reading import MALFORMED
from calib.modules import attention, tree
from calib.network import cache_layout, online, skeleton
from calib.process.progress import Progress
from calib.rotations import hadamard, rotation_set

_KEPT = 256
"""Entries that are kept; the oldest go. Each takes some ten kilobytes a layer."""
_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")
_SOURCES = (
    *(tracing, placeholders, frequencies, complex_rotary),
    *(attention, generic, trials, tree, cache_layout, online, skeleton, hadamard, rotation_set),
)
"""Modules that decide what a trace looks like: an entry of an older version of them must not be
found.
"""


def cached_trace(request: TraceRequest, progress: Progress) -> ir.Model:
    """The graph of ``request``, from the cache or traced now. Changing it changes nothing in the
    cache.

    Raises:
        BackendError: see :func:`backends.onnx.trace.trace`.
    """
    path = cache_folder() / "traces" / f"{key_of(request)}.trace"
    progress("trace", 0, 1)
    proto = _read(path)

    if proto is None:
        proto = ir.to_proto(trace(request))
        _write(path, proto.SerializeToString())
    progress("trace", 1, 1)

    return ir.from_proto(proto)  # of what was traced now as well, so that both give the same bytes


def key_of(request: TraceRequest) -> str:
    """A hash of everything that the traced graph depends on."""
    digest = hashlib.sha256()
    r3 = request.r3.values() if request.r3 else ()
    facts = {
        # the head is a placeholder with a name of its own, tied or not
        "config": {**request.config, "tie_word_embeddings": False},
        "dtype": str(request.dtype),
        "opset": request.opset,
        "last_logits": request.last_logits,
        "r3": [(rotation.name, rotation.order, rotation.seed) for rotation in r3],
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for module in _SOURCES:
        assert module.__file__ is not None  # none of them is built in
        digest.update(Path(module.__file__).read_bytes())

    return digest.hexdigest()


def _read(path: Path) -> onnx.ModelProto | None:
    data = read_entry(path, "the cached trace")
    if data is None:
        return None

    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
        ir.from_proto(proto)
    except (DecodeError, *MALFORMED):  # nobody's trace, with a digest that fits
        return None
    return proto


def _write(path: Path, data: bytes) -> None:
    write_entry(path, data, "the trace", kept=_KEPT)
