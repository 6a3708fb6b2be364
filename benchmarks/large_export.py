"""Peak memory and time of the whole ``rotq export --layerwise``, in a fresh process, on random
weights.

Makes a checkpoint of a Llama shape in bfloat16 shards, unless WORK holds it already, with the
tokenizer of the embedded model, and exports it: capture, training of R1 and R2, calibration, ONNX,
parity in ONNX Runtime. Weights are random, so that figures of quality say nothing and rung 3 may
fail; what is measured is what the job takes. The peak is that of anonymous memory (RssAnon), as the
pages of memory-mapped files can be dropped at any time. Linux only.

    python -m benchmarks.large_export --work DIR [--hidden 2048 --ffn 5632 --layers 4] [--whole]
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.layerwise import INTERVAL, drop_from_cache, gib, make_checkpoint
from exporter.source import embedded_folder


def main() -> None:
    """Print the figures as one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for everything")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rows", type=int, default=4, help="of calibration, and of evaluation")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--rotate", default="r1,r2")
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--epochs", type=int, default=5, help="of R1 and of R2")
    parser.add_argument("--whole", action="store_true", help="without --layerwise")
    arguments = parser.parse_args()
    checkpoint = arguments.work / f"model-{arguments.layers}-{arguments.hidden}-{arguments.ffn}"
    if not (checkpoint / "config.json").is_file():
        make_checkpoint(arguments, checkpoint)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(embedded_folder() / name, checkpoint / name)
    drop_from_cache(checkpoint)
    print(json.dumps(measure(arguments, checkpoint), indent=2))


def measure(arguments: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """Export ``checkpoint`` in a process of its own, and watch it."""
    output = arguments.work / ("whole" if arguments.whole else "layerwise")
    shutil.rmtree(output, ignore_errors=True)
    recipe = arguments.work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings(arguments, checkpoint)), encoding="utf-8")
    command = [sys.executable, "-m", "exporter.cli", "export", "--recipe", str(recipe)]
    started, peak = time.perf_counter(), 0
    with (arguments.work / f"{output.name}.log").open("w") as log:
        process = subprocess.Popen([*command, "-o", str(output)], stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, anonymous_memory_of(process.pid))
            time.sleep(INTERVAL)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads((output / "report.json").read_text())
    shards = checkpoint.glob("*.safetensors")
    return {
        "checkpoint_gib": gib(sum(shard.stat().st_size for shard in shards)),
        "calibration_tokens": arguments.rows * arguments.seqlen,
        "peak_anonymous_gib": gib(peak),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "cpu_seconds_of_stages": report["cpu_seconds"],
        "rungs_0_to_2_passed": all(
            row["passed"] is not False for row in report["parity"] if row["rung"] < 3
        ),
    }


def settings(arguments: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """The recipe."""
    return {
        "model": str(checkpoint),
        "scheme": arguments.scheme,
        "rotate": arguments.rotate,
        "prefix": "none",
        "calibration": {
            "dataset": str(embedded_folder() / "calibration.txt"),
            "nsamples": arguments.rows,
            "seqlen": arguments.seqlen,
            "layout": "windows",
            "batch_size": 1,
        },
        "evaluation": {"nsamples": arguments.rows},
        "rotation": {
            **{kind: {"epochs": arguments.epochs} for kind in ("r1", "r2")},
            "r1_tokens": 4096,
            "r2_tokens": 512,
        },
        "layerwise": {"enabled": not arguments.whole},
    }


def anonymous_memory_of(pid: int) -> int:
    """Bytes of memory of a process that no file backs (``RssAnon``, proc(5)); 0 of one that has
    ended.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    found = (int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
    return next(found, 0)


if __name__ == "__main__":
    main()
