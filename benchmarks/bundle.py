"""How fast bundles are written and how much memory that takes, for every target, in one run.

A random artifact of the shape of a Llama (dimensions of a 1B model, as many layers as asked for) is
saved to disk once for each scheme. Then, in a process of its own for each target, that artifact is
opened by memory map and written as a bundle, and the bundle's files are copied with
``shutil.copyfile``; both are followed by an fsync of every file, and take turns. Reported are
medians:

* megabytes a second of writing, and as a ratio to the plain copy: at least 0.7,
* peak growth of resident anonymous memory (RssAnon) while writing, as a ratio to the largest shard:
  at most 1.5. Pages of the mapped artifact are not counted: the kernel takes them back when it
  needs them.

    python -m benchmarks.bundle                              # about 2.5 GB a bundle, in shards of
    500 MB python -m benchmarks.bundle --layers 4 --targets modelopt --schemes int8-weight-only

Linux only: resident memory is read from /proc.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from backends.asking import expressible
from backends.base import WriteOptions
from backends.safetensors.backend import SafetensorsBackend
from calib.architectures import wiring_for
from calib.arithmetic.grids import quantize, weight_grid
from calib.artifact import Provenance, QuantizedLinear, QuantizedModel, load_artifact, save_artifact
from calib.network.skeleton import build_on_meta, portable_config
from calib.rotations.rotation_set import RotationSet
from calib.schemes import SCHEMES, LinearScheme

SPEED_BOUND, MEMORY_BOUND = 0.7, 1.5
SCHEMES_TRIED = ("int8-weight-only", "int4-weight-only", "float8", "nvfp4")
_MB = 1e6


@dataclass(frozen=True)
class Figure:
    """What one target took."""

    target: str
    scheme: str
    nbytes: int
    shards: int
    largest: int
    write: float
    copy: float
    anonymous: int

    @property
    def row(self) -> str:
        """As a line of the table."""
        speed, memory = self.copy / self.write, self.anonymous / self.largest
        verdict = "" if speed >= SPEED_BOUND and memory <= MEMORY_BOUND else "  MISSED"
        return (
            f"{self.target:<20}{self.scheme:<18}{self.nbytes / _MB:>8.0f}{self.shards:>7}"
            f"{self.largest / _MB:>9.0f}{self.nbytes / _MB / self.write:>9.0f}"
            f"{self.nbytes / _MB / self.copy:>9.0f}{speed:>8.2f}"
            f"{self.anonymous / _MB:>9.0f}{memory:>8.2f}{verdict}"
        )


def main() -> None:
    """Print a row for each target and scheme."""
    arguments = _arguments()
    backend = SafetensorsBackend()
    print(
        f"{'target':<20}{'scheme':<18}{'MB':>8}{'shards':>7}{'largest':>9}{'write':>9}{'copy':>9}"
        f"{'ratio':>8}{'anon MB':>9}{'ratio':>8}\n"
        f"{'':<53}{'MB':>9}{'MB/s':>9}{'MB/s':>9}{'>= 0.7':>8}{'':>9}{'<= 1.5':>8}"
    )
    spawn = multiprocessing.get_context("spawn")
    for scheme in arguments.schemes:
        linear = SCHEMES[scheme].linear
        targets = [
            name
            for name in arguments.targets
            if linear and expressible(backend, name, [linear], None)
        ]
        with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
            artifact = Path(root) / "artifact"
            for step, target in enumerate(targets):
                # A process of its own: what one target leaves in memory must not hide what the next
                # one takes.
                with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                    if step == 0:
                        pool.submit(make_artifact, artifact, scheme, arguments.layers).result()
                with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                    job = pool.submit(
                        measure, artifact, target, arguments.shard_mb * 10**6, arguments.repeats
                    )
                    print(job.result().row, flush=True)


def make_artifact(folder: Path, scheme: str, layers: int) -> None:
    """Save a random quantized Llama of ``layers`` layers."""
    from transformers import LlamaConfig

    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    config = LlamaConfig(
        **sizes, num_hidden_layers=layers, vocab_size=32000, max_position_embeddings=2048
    )
    linear = SCHEMES[scheme].linear
    assert linear is not None  # float is not among the schemes tried
    generator = torch.Generator().manual_seed(0)
    quantized = {spec.name for spec in wiring_for(config).linears} - {"lm_head"}
    linears: dict[str, QuantizedLinear] = {}
    floats: dict[str, Tensor] = {}
    for key, parameter in build_on_meta(config).named_parameters():
        weight = 0.02 * torch.randn(parameter.shape, generator=generator)
        name = key.removesuffix(".weight")
        if name in quantized:
            linears[name] = _quantized(name, weight, linear)
        else:
            floats[key] = weight.bfloat16()
    model = QuantizedModel(
        config=portable_config(config),
        scheme=SCHEMES[scheme],
        dtype=torch.bfloat16,
        linears=linears,
        floats=floats,
        kept={"lm_head": "not quantized"},
        rotations=RotationSet(),
        provenance=Provenance("random", "0" * 64, {}, 0, 0, 0, 0, "0" * 64, {}),
    )
    folder.mkdir()
    save_artifact(model, folder)


def _quantized(name: str, weight: Tensor, scheme: LinearScheme) -> QuantizedLinear:
    grid = weight_grid(weight, scheme.weight, torch.bfloat16)
    dtype = (
        torch.float32
        if scheme.input is not None and scheme.input.scale_format == "e4m3"
        else torch.bfloat16
    )
    return QuantizedLinear(
        name=name,
        weight=quantize(weight, grid, scheme.weight),
        weight_scale=grid.scale,
        weight_scheme=scheme.weight,
        bias=None,
        input_scheme=scheme.input,
        input_scale=None if scheme.input is None else torch.tensor(0.05, dtype=dtype),
        online_rotation=None,
        weight_second_scale=grid.second_level,
    )


def measure(artifact: Path, target: str, shard_bytes: int, repeats: int) -> Figure:
    """Write and copy in turns: one that warms up (page cache, imports), one for memory, and those
    that are timed.
    """
    model = load_artifact(artifact)
    options = WriteOptions(target, max_shard_bytes=shard_bytes)
    writes, copies = [], []
    memory = PeakMemory()
    for turn in range(repeats + 2):
        with tempfile.TemporaryDirectory(dir=artifact.parent) as root:
            bundle, copy = Path(root) / "bundle", Path(root) / "copy"
            bundle.mkdir()
            copy.mkdir()
            with memory if turn == 1 else nullcontext():
                start = time.perf_counter()
                SafetensorsBackend().write(model, bundle, options)
                _sync(bundle)
                writes.append(time.perf_counter() - start)
            start = time.perf_counter()
            for path in bundle.iterdir():
                shutil.copyfile(path, copy / path.name)
            _sync(copy)
            copies.append(time.perf_counter() - start)
            sizes = [path.stat().st_size for path in bundle.glob("model*.safetensors")]
    return Figure(
        target,
        model.scheme.name,
        sum(sizes),
        len(sizes),
        max(sizes),
        median(writes[2:]),
        median(copies[2:]),
        memory.growth,
    )


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


class PeakMemory:
    """Peak growth of RssAnon of this process within the block, sampled every millisecond."""

    def __enter__(self) -> PeakMemory:
        self._start = self._peak = _anonymous()
        self._done = Event()
        self._thread = Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self._peak = max(self._peak, _anonymous())

    @property
    def growth(self) -> int:
        """Bytes above where it began."""
        return self._peak - self._start


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description="Speed and memory of writing bundles.")
    parser.add_argument(
        "--layers", type=int, default=40, help="layers of the model: 44 million weights each"
    )
    parser.add_argument("--shard-mb", type=int, default=500, help="split files beyond this size")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--targets", nargs="+", default=list(SafetensorsBackend.targets))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES_TRIED))
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path.cwd(),
        help="where to write; it needs three bundles' space",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
