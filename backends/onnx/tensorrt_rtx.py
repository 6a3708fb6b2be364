"""TensorRT-RTX: parse a written graph and build an engine of it, ahead of time and without a GPU.

That is an acceptance test of what TensorRT takes, and the way to an engine for one of NVIDIA's RTX
GPUs. Nothing runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backends.base import RuntimeMissing
from calib.errors import BackendError

AXES: Mapping[str, tuple[int, int, int]] = {
    "batch": (1, 1, 8),
    "sequence": (1, 16, 512),
    "past": (0, 16, 1024),
    "total": (1, 32, 1536),
}
"""Least, usual and greatest size of each dynamic axis of a graph that :mod:`backends.onnx.trace`
made.
"""
CAPABILITIES = ("8.6", "8.9", "12.0")
"""Compute capabilities of RTX GPUs: Ampere, Ada (from here on float8), Blackwell (float4)."""


def is_installed() -> bool:
    """Whether TensorRT-RTX can be imported here."""
    return find_spec("tensorrt_rtx") is not None


def build(path: Path, capability: str, axes: Mapping[str, tuple[int, int, int]] = AXES) -> bytes:
    """An engine of the graph at ``path`` for GPUs of a compute capability.

    Args:
        path: the ``.onnx`` file, its data beside it.
        capability: such as ``8.9``.
        axes: least, usual and greatest size of each dynamic axis, by name.

    Raises:
        RuntimeMissing: TensorRT-RTX is not installed.
        BackendError: it does not parse the graph, or builds nothing of it for these GPUs.
    """
    if not is_installed():
        raise RuntimeMissing("TensorRT-RTX is not installed", hint="pip install tensorrt-rtx")
    import tensorrt_rtx as trt

    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise BackendError(f"TensorRT-RTX cannot parse '{path}': {reasons}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(
        getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), 0
    )
    config.add_optimization_profile(_profile(builder, network, path, axes))
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BackendError(
            f"TensorRT-RTX cannot build '{path}' for compute capability {capability}: {log.last}",
            hint="float8 needs 8.9 and newer, float4 12.0",
        )
    return bytes(engine)


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the base comes from an optional package
        """Keeps the last error, and says nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.last = "no reason given"

        def log(self, severity: int, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last = message

    return Logger()


def _profile(
    builder: Any, network: Any, path: Path, axes: Mapping[str, tuple[int, int, int]]
) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        entry = network.get_input(index)
        sizes = []
        for axis, size in enumerate(entry.shape):
            name = entry.get_dimension_name(axis)
            if size < 0 and name not in axes:
                raise BackendError(
                    f"axis '{name}' of input '{entry.name}' of '{path}' has no range of sizes"
                )
            sizes.append((size,) * 3 if size >= 0 else axes[name])
        profile.set_shape(entry.name, *([size[step] for size in sizes] for step in range(3)))

    return profile
