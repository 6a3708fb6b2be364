"""Peak memory, time and bytes of layer-wise quantization to int4-weight-only, on random weights.

Makes a checkpoint of a Llama shape (by default that of Llama-2-7B, 13 GB) in bfloat16 shards,
unless WORK holds it already, folds R1 and R2 into it lazily and quantizes it block by block into a
saved model, by the function that ``rotq calibrate --layerwise`` calls. The peak is that of
anonymous memory (RssAnon), as the pages of a memory-mapped checkpoint can be dropped at any time.
Linux only.

The default weight algorithm looks at the second moments of inputs, so that the tokens are run;
``rtn`` needs none.

    python -m benchmarks.layerwise --work DIR [--layers N] [--tokens 2048] [--weights gptq] [--asym]
    [--keep]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from calib.architectures import wiring_for
from calib.artifact import Provenance
from calib.data.batches import Batch, length_batches
from calib.fusing import fuse
from calib.layerwise.calibrator import WalkSettings, quantize_blockwise
from calib.network.checkpoint import load_config, open_checkpoint
from calib.network.skeleton import expected_tensors
from calib.process.progress import Progress
from calib.quantizing.plan import resolve
from calib.rotations.rotation_set import hadamard_rotations
from calib.schemes import scheme_named
from calib.weights.algorithms import algorithm_named

GIB = 1 << 30
PROVENANCE = Provenance(
    source="random weights",
    fingerprint="",
    recipe={},
    parameters=0,
    nbytes=0,
    calibration_rows=0,
    calibration_tokens=0,
    calibration_sha256="",
    versions={},
)
INTERVAL = 0.02
"""Seconds between two looks at the memory."""


def main() -> None:
    """Print the figures as one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the checkpoint and the walk"
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument(
        "--tokens", type=int, default=2048, help="calibration tokens; 0 runs nothing"
    )
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument(
        "--max-memory", type=int, default=2 * GIB, help="bytes of hidden states held in memory"
    )
    parser.add_argument("--rotate", nargs="*", default=["r1", "r2"])
    parser.add_argument("--weights", default="mse:weighted=true", help="weight algorithm")
    parser.add_argument(
        "--asym", action="store_true", help="feed each linear the outputs of the quantized ones"
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the checkpoint in the work folder"
    )
    arguments = parser.parse_args()
    checkpoint = (
        arguments.work / f"checkpoint-{arguments.layers}-{arguments.hidden}-{arguments.ffn}"
    )
    if not (checkpoint / "config.json").is_file():
        make_checkpoint(arguments, checkpoint)
    drop_from_cache(checkpoint)
    print(json.dumps(measure(arguments, checkpoint), indent=2))
    shutil.rmtree(arguments.work / "walk")
    if not arguments.keep:
        shutil.rmtree(checkpoint)


def make_checkpoint(arguments: argparse.Namespace, folder: Path) -> None:
    """Random bfloat16 weights, a shard for every decoder layer and one for the rest; config.json
    comes last.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.ffn,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, shape in expected_tensors(config).items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = shape
    weight_map: dict[str, str] = {}
    for seed, (file, shapes) in enumerate(shards.items()):
        generator = torch.Generator().manual_seed(seed)
        save_file(
            {name: random_tensor(shape, generator) for name, shape in shapes.items()}, folder / file
        )
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    config.save_pretrained(folder)


def random_tensor(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Gains around one, weights of the size that transformers starts with."""
    values = torch.randn(shape, generator=generator, dtype=torch.bfloat16).mul_(0.02)
    return values.add_(1) if len(shape) == 1 else values


def drop_from_cache(folder: Path) -> None:
    """Let the walk read from the disk what it reads, as with a checkpoint larger than memory."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Walk the checkpoint in ``folder``."""
    expected_tensors(load_config(folder))  # loads transformers, whose memory is no part of the walk
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        arguments.vocabulary,
        (arguments.tokens // arguments.seqlen, arguments.seqlen),
        generator=generator,
    )
    run = arguments.asym or algorithm_named(arguments.weights).needs_moment
    batches: Sequence[Batch] = length_batches(list(ids), 1) if run and len(ids) else []
    folder_out = arguments.work / "walk" / "artifact"
    before = io_counters()
    started = time.perf_counter()
    with peak_of_anonymous_memory() as memory:
        config = load_config(folder)
        wiring = wiring_for(config)
        rotations = hadamard_rotations(wiring, arguments.rotate)
        fused = fuse(open_checkpoint(folder), wiring, rotations, dtype=torch.float32, lazy=True)
        quantization = resolve(scheme_named("int4-weight-only"), wiring, weights=arguments.weights)
        folder_out.mkdir(parents=True)
        quantize_blockwise(
            fused,
            quantization,
            batches,
            PROVENANCE,
            arguments.work / "walk",
            folder_out,
            walk=WalkSettings(asym=arguments.asym, max_memory=arguments.max_memory),
            progress=memory.progress,
        )
    seconds = time.perf_counter() - started
    moved = {name: value - before[name] for name, value in io_counters().items()}
    return {
        "layers": arguments.layers,
        "tokens_run": sum(batch.tokens for batch in batches),
        "checkpoint_gib": gib(sum(path.stat().st_size for path in folder.glob("*.safetensors"))),
        "weights": arguments.weights,
        "artifact_gib": gib(sum(path.stat().st_size for path in folder_out.glob("*.safetensors"))),
        "anonymous_before_gib": gib(memory.before),
        "peak_anonymous_gib": gib(memory.peak),
        "anonymous_after_each_block_gib": [gib(value) for value in memory.after_blocks],
        "seconds": round(seconds, 1),
        "read_from_disk_gib": gib(moved["read_bytes"]),
        "written_gib": gib(moved["wchar"]),
    }


def gib(size: int) -> float:
    """Bytes in GiB, to three digits."""
    return round(size / GIB, 3)


@dataclass
class Memory:
    """Anonymous memory over a stretch of time, in bytes."""

    before: int
    peak: int
    after_blocks: list[int]

    def look(self) -> None:
        """Take the present value into account."""
        self.peak = max(self.peak, anonymous_memory())

    @property
    def progress(self) -> Progress:
        """Notes what is left after each block."""

        def note(stage: str, done: int, total: int | None) -> None:
            if stage == "calibrate":
                self.after_blocks.append(anonymous_memory())

        return note


@contextmanager
def peak_of_anonymous_memory() -> Iterator[Memory]:
    """Watch this process from another thread."""
    memory = Memory(anonymous_memory(), 0, [])
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(INTERVAL):
            memory.look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield memory
    finally:
        finished.set()
        watcher.join()


def anonymous_memory() -> int:
    """Bytes of memory of this process that no file backs (``RssAnon``, proc(5))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def io_counters() -> dict[str, int]:
    """``read_bytes`` (from the disk, memory maps included) and ``wchar`` (given to write calls),
    proc(5).
    """
    pairs = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {name: int(value) for name, value in pairs}


if __name__ == "__main__":
    main()
