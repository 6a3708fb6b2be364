"""Memory and time of making an ONNX graph: tracing a large model, and writing one from a
memory-mapped artifact.

* Tracing sees no weights: a graph of the shape of Llama-2-7B, peak resident memory (ru_maxrss)
  below 4 GB.
* Writing streams: peak growth of anonymous memory (RssAnon) while two artifacts are written that
  differ in nothing but their size, at most 2 GB and the same for both. They are random Llamas of
  the dimensions of a 1B model, traced before.

Each figure is taken in a process of its own. Linux only.

    python -m benchmarks.tracing [--layers 32] [--write-layers 8 32] [--folder DIR]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from backends.base import WriteOptions
from backends.onnx.backend import OnnxBackend
from benchmarks.bundle import PeakMemory
from calib.artifact import cast_model, load_artifact, save_artifact
from calib.network.skeleton import portable_config

TRACE_BOUND, WRITE_BOUND = 4.0, 2.0
_GB = 1e9
_Result = TypeVar("_Result")


def main() -> None:
    """Print a line for each figure."""
    arguments = _arguments()
    seconds, peak = _apart(trace, arguments.layers)
    print(
        f"trace, 7B shape, {arguments.layers} layers: {seconds:.0f} s, peak {peak:.2f} GB resident"
        f" (< {TRACE_BOUND})"
    )
    for layers in arguments.write_layers:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
            artifact = Path(root) / "artifact"
            _apart(save_artifact, artifact, "int8-weight-only", layers)
            seconds, size, growth = _apart(write, artifact, Path(root))
        print(
            f"write, {layers} layers: {size:.2f} GB in {seconds:.1f} s, anonymous memory grows by"
            f" {growth:.2f} GB (<= {WRITE_BOUND})"
        )


def trace(layers: int) -> tuple[float, float]:
    """Seconds, and the peak resident memory of this process in GB."""
    from transformers import LlamaConfig

    from backends.onnx import trace as tracing

    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=4096, intermediate_size=11008, vocab_size=32000
    )
    start = time.perf_counter()
    tracing.trace(tracing.TraceRequest(portable_config(config), torch.float32, 21))
    return (
        time.perf_counter() - start,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GB,
    )


def write(artifact: Path, folder: Path) -> tuple[float, float, float]:
    """Seconds, bytes and growth of anonymous memory in GB, of a second write: the first one leaves
    the trace behind.
    """
    os.environ["ROTQ_CACHE"] = str(folder / "traces")
    model = cast_model(load_artifact(artifact), torch.float32)
    memory = PeakMemory()
    for name in ("first", "second"):
        output = folder / name
        output.mkdir()
        with memory:
            start = time.perf_counter()
            OnnxBackend().write(model, output, WriteOptions("ort"))
            seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in output.iterdir())
    return seconds, size / _GB, memory.growth / _GB


def _apart(function: Callable[..., _Result], *arguments: object) -> _Result:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Memory and time of tracing and writing ONNX graphs."
    )
    parser.add_argument("--layers", type=int, default=32, help="of the traced model")
    parser.add_argument(
        "--write-layers", type=int, nargs="+", default=[8, 32], help="44 million weights each"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path.cwd(),
        help="where to write; it needs five times a graph",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
