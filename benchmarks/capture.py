"""What capture keeps and costs at the shape of Llama-2-7B, without its weights, for several amounts
of data in one run.

The real collector and writer are fed *synthetic* activations (Gaussian, with four massive channels
and a massive token a row). They are made in place in buffers that exist before the measurement
starts: in a real run they are the model's. Each amount of data is measured in a process of its own,
under the default settings of the allocator:

* bytes of each kind of state, and of the folder written: they must not depend on the number of
  rows,
* peak growth of resident anonymous memory (RssAnon) over a warmed-up process, from the first token
  until the folder is written: state and working memory,
* tokens a second through all sites, and from that the time for the 128 rows of 2048 tokens that the
  reference uses,
* the reference's bytes: DartQuant stores every token of every site.

    python -m benchmarks.capture                            # 1 and 2 rows of 2048 tokens, bfloat16
    python -m benchmarks.capture --rows 128                 # in full: 6e14 operations python -m
    benchmarks.capture --dtype float32            # as for a target that computes in float32

Linux only: resident memory is read from /proc.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

import torch
from torch import Tensor

from calib.capture.collector import Collector
from calib.capture.sites import CaptureConfig, CaptureSite
from calib.capture.statistics import ChannelStatistics
from calib.capture.storage import Capture
from calib.data.batches import Batch

REFERENCE_ROWS, REFERENCE_SEQLEN, REFERENCE_BYTES = 128, 2048, 2
"""What DartQuant captures, in half precision."""
MEMORY_BOUND, DISK_BOUND = 1.0, 4.0
"""GB."""


@dataclass(frozen=True)
class Shape:
    """A model, as far as capture sees it; Llama-2-7B by default."""

    layers: int = 32
    hidden: int = 4096
    kv_heads: int = 32
    head_dim: int = 128
    dtype: str = "bfloat16"

    @property
    def attention(self) -> int:
        """Width of o_proj's input; each query head has its own key/value head."""
        return self.kv_heads * self.head_dim

    def sites(self) -> list[CaptureSite]:
        """Inputs of q_proj and up_proj (R1) and of o_proj (R2), in the order in which a model
        reaches them.
        """
        modules = (("self_attn.q_proj", "r1"), ("self_attn.o_proj", "r2"), ("mlp.up_proj", "r1"))
        return [
            CaptureSite(f"model.layers.{layer}.{module}", layer, "r1" if rotation == "r1" else "r2")
            for layer in range(self.layers)
            for module, rotation in modules
        ]

    def reference_bytes(self) -> int:
        """Every token of every site on disk."""
        return (
            REFERENCE_ROWS
            * REFERENCE_SEQLEN
            * REFERENCE_BYTES
            * self.layers
            * (2 * self.hidden + self.attention)
        )


@dataclass(frozen=True)
class Measured:
    """One amount of data.

    Attributes:
        state: bytes of each kind of state.
        disk: bytes of the folder.
        memory: peak growth of RssAnon in bytes.
        seconds: inside the collector, without making the activations.
        writing: seconds for finishing and writing.
    """

    rows: int
    state: dict[str, int]
    disk: int
    memory: int
    seconds: float
    writing: float


class PeakMemory:
    """Largest RssAnon while the block runs, as growth over its start; sampled every millisecond by
    a thread.
    """

    def __init__(self) -> None:
        self.growth = 0
        self._done = Event()
        self._thread = Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        """Start sampling."""
        gc.collect()
        self._start = resident()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Stop sampling."""
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self.growth = max(self.growth, resident() - self._start)


def resident() -> int:
    """RssAnon of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux")


class Activations:
    """Synthetic activations ``[1, tokens, width]``, one at a time, always in the same memory."""

    def __init__(self, shape: Shape, tokens: int, seed: int) -> None:
        self._wide = torch.zeros(tokens * max(shape.hidden, shape.attention))
        self._buffer = torch.zeros_like(self._wide, dtype=getattr(torch, shape.dtype))
        self._tokens = tokens
        self._generator = torch.Generator().manual_seed(seed)

    def next(self, width: int) -> Tensor:
        """Four channels of 20 times the spread, and a first token of 50 times the size."""
        wide, x = (
            part[: self._tokens * width].view(1, self._tokens, width)
            for part in (self._wide, self._buffer)
        )
        wide.normal_(generator=self._generator)
        wide[..., :4] *= 20.0
        wide[:, 0] *= 50.0
        return x.copy_(wide)


def feed(
    shape: Shape, config: CaptureConfig, rows: int, seqlen: int, activations: Activations
) -> tuple[Collector, float]:
    """A collector that has seen ``rows`` rows, one a batch, and the seconds spent in it."""
    sites = shape.sites()
    collector = Collector(config, sites, shape.kv_heads, shape.head_dim)
    generator = torch.Generator().manual_seed(config.seed)
    seconds = 0.0
    for row in range(rows):
        collector.begin(Batch(torch.randint(0, 32000, (1, seqlen), generator=generator), (row,)))
        for site in sites:
            width = shape.hidden if site.rotation == "r1" else shape.attention
            x = activations.next(width)
            began = time.perf_counter()
            collector.observe(site, x)
            seconds += time.perf_counter() - began
    return collector, seconds


def state_bytes(capture: Capture) -> dict[str, int]:
    """Bytes of each kind of state."""

    def vectors(channels: ChannelStatistics) -> int:
        return sum(
            part.nbytes
            for part in (channels.mean, channels.std, channels.minimum, channels.maximum)
        )

    r2 = capture.r2.values()
    return {
        "R1 covariance": capture.r1.covariance.nbytes,
        "R2 covariances": sum(layer.covariance.nbytes for layer in r2),
        "channel statistics": sum(
            vectors(channels)
            for channels in (
                capture.r1.channels,
                *capture.sites.values(),
                *(layer.channels for layer in r2),
            )
        ),
        "R1 samples": capture.r1.samples.values.nbytes,
        "R2 samples": capture.r2_samples().nbytes,
        "weights of samples": (
            capture.r1.samples.weights.nbytes + capture.stacked_r2().weights.nbytes
        ),
    }


def measure(shape: Shape, config: CaptureConfig, rows: int, seqlen: int, threads: int) -> Measured:
    """One amount of data; in a fresh process, since a heap remembers."""
    torch.set_num_threads(threads)
    warm = Shape(layers=1, hidden=512, kv_heads=4, head_dim=shape.head_dim, dtype=shape.dtype)
    with tempfile.TemporaryDirectory() as folder:
        # loads libraries, starts their threads
        feed(warm, config, 1, 256, Activations(warm, 256, 0))[0].finish("synthetic").write(
            Path(folder)
        )
    activations = Activations(shape, seqlen, config.seed)
    with tempfile.TemporaryDirectory() as folder, PeakMemory() as peak:
        collector, seconds = feed(shape, config, rows, seqlen, activations)
        began = time.perf_counter()
        capture = collector.finish("synthetic")
        capture.write(Path(folder))
        writing = time.perf_counter() - began
        disk = sum(file.stat().st_size for file in Path(folder).iterdir())
    return Measured(rows, state_bytes(capture), disk, peak.growth, seconds, writing)


def report(shape: Shape, config: CaptureConfig, seqlen: int, found: list[Measured]) -> None:
    """Print the tables."""
    print(
        f"\n{'rows':>6} {'state MB':>9} {'disk MB':>9} {'peak RssAnon MB':>16} {'tokens/s':>9}"
        f" {'128 x 2048, h':>14}"
    )
    for one in found:
        rate = one.rows * seqlen / one.seconds
        hours = REFERENCE_ROWS * REFERENCE_SEQLEN / rate / 3600
        state = sum(one.state.values()) / 1e6
        print(
            f"{one.rows:>6} {state:>9.1f} {one.disk / 1e6:>9.1f} {one.memory / 1e6:>16.1f}"
            f" {rate:>9.0f} {hours:>14.2f}"
        )
    print()
    for kind, size in found[-1].state.items():
        print(f"{kind:<20} {size / 1e6:>9.2f} MB")
    print(f"{'finish and write':<20} {found[-1].writing:>9.2f} s")
    disk, memory = max(one.disk for one in found) / 1e9, max(one.memory for one in found) / 1e9
    reference = shape.reference_bytes() / 1e9
    same = "the same" if len({tuple(one.state.items()) for one in found}) == 1 else "NOT the same"
    print(
        f"\nstate is {same} for {', '.join(str(one.rows) for one in found)} rows of {seqlen} tokens"
    )
    print(f"disk   {disk:.3f} GB  {'<=' if disk <= DISK_BOUND else '>'} {DISK_BOUND:.0f} GB")
    print(
        f"memory {memory:.3f} GB  {'<=' if memory <= MEMORY_BOUND else '>'} {MEMORY_BOUND:.0f} GB"
    )
    tokens = f"{REFERENCE_ROWS} x {REFERENCE_SEQLEN}"
    print(
        f"the reference keeps every token of {tokens}: {reference:.1f} GB, {reference / disk:.0f}"
        " times the disk"
    )


def main() -> None:
    """Parse the arguments, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 2], help="amounts of data, each measured anew"
    )
    parser.add_argument("--seqlen", type=int, default=REFERENCE_SEQLEN, help="tokens a row")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    for name, default in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = parser.parse_args()
    shape = Shape(**{name: getattr(arguments, name) for name in asdict(Shape())})
    config = CaptureConfig()
    print(
        f"synthetic activations, {shape.layers} layers, hidden {shape.hidden}, {shape.kv_heads} kv"
        f" heads of {shape.head_dim}, {shape.dtype}; {config}; {arguments.threads} threads"
    )
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        found = [
            pool.submit(measure, shape, config, rows, arguments.seqlen, arguments.threads).result()
            for rows in arguments.rows
        ]
    report(shape, config, arguments.seqlen, found)


if __name__ == "__main__":
    main()
