"""Whole jobs, with parity, against what other programs do without any: wall time, time of all
processors and peak anonymous memory of both in one run, and their ratios. Linux only.

    python -m benchmarks.job --text FILE.txt [--model DIR] [--rows 64] [--seqlen 256] [--only gptq]

| job | rotq | against |
|---|---|---|
| gptq | int4-weight-only in blocks of 64, GPTQ, no rotation, for vLLM | llm-compressor |
| int8 | int8 with trained R1 and R2, and R4, for ONNX Runtime | llm-compressor, random R1, R2, R4 |
| auto | the same, the rotations chosen by the gate | the same |
| rtn | int4-weight-only by rounding to nearest, no rotation | the builder of onnxruntime-genai |

Each job is a process of its own, imports and the writing of files included. The others live in an
environment that is made for them once (``--peers``, by default in the user's cache), with the
versions of :data:`PEERS`; what cannot be installed is said to be missing.

Times of a machine that does something else as well say little; ``cpu`` says more than ``wall``
there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.job_peer import BLOCK
from benchmarks.real_model import UnavailableError, real_model
from benchmarks.watched import Taken, watched

PEERS = {
    "llm-compressor": ["llmcompressor==0.14.*", "transformers>=5.15,<5.18"],
    "onnxruntime-genai": ["onnxruntime-genai", "onnx-ir"],
}
"""Requirements of the others, by their names."""
_TORCH = "torch==2.13.0"
"""Installed first: an index that has a CPU build of it gives that."""
RATIO = "perplexity ratio"
"""The metric whose note says how much text was scored."""
_PEER = Path(__file__).with_name("job_peer.py")


@dataclass(frozen=True)
class Job:
    """What is done by both.

    Attributes:
        options: of ``rotq export``.
        peer: who else does it.
        as_peer: what job_peer calls it.
    """

    options: tuple[str, ...]
    peer: str
    as_peer: str


_INT4 = ("--scheme", "int4-weight-only", "--rotate", "none")
_VLLM, _ORT = ("--backend", "safetensors", "--target", "vllm"), ("--backend", "onnx")
_GPTQ = ("--block-size", str(BLOCK), "--weight-algorithm", "gptq")
JOBS = {
    "gptq": Job((*_VLLM, *_INT4, *_GPTQ), "llm-compressor", "gptq"),
    "int8": Job((*_ORT, "--scheme", "int8", "--rotate", "r1,r2,r4"), "llm-compressor", "rotated"),
    "auto": Job((*_ORT, "--scheme", "int8", "--rotate", "auto"), "llm-compressor", "rotated"),
    "rtn": Job((*_ORT, *_INT4), "onnxruntime-genai", "builder"),
}


def main() -> None:
    """Run both sides of every job, and print what they took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--alone", action="store_true", help="run rotq only")
    parser.add_argument(
        "--peers", type=Path, default=_cache() / "peers", help="environment of the others"
    )
    given = parser.parse_args()
    try:
        given.model = given.model or str(real_model())
    except UnavailableError as error:
        sys.exit(f"the real model cannot be had: {error}")

    jobs = {name: JOBS[name] for name in given.only}
    wanted = [] if given.alone else list(dict.fromkeys(job.peer for job in jobs.values()))
    missing = {name: reason for name in wanted if (reason := installed(name, given.peers))}
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")

    # one program may be the peer of several jobs, and runs once
    taken: dict[str, Taken] = {}
    with tempfile.TemporaryDirectory(prefix="rotq-job-") as scratch:
        for name, job in jobs.items():
            print(f"\n{name}: {' '.join(job.options)}", flush=True)
            own = run_rotq(job, given, Path(scratch))
            if job.peer in wanted and job.peer not in missing and job.as_peer not in taken:
                taken[job.as_peer] = run_peer(job, given, Path(scratch))
            show(own, job.peer, taken.get(job.as_peer))
            show_report(Path(scratch))


def installed(name: str, folder: Path) -> str:
    """Install a peer, unless it is there already; why it cannot be, or nothing."""
    python, done = folder / "bin" / "python", folder / f".{name}"
    if done.exists():
        return ""
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        if reason := _pip(python, [_TORCH]):
            return reason
    if reason := _pip(python, [_TORCH, *PEERS[name]]):
        return reason
    done.touch()
    return ""


def run_rotq(job: Job, given: argparse.Namespace, scratch: Path) -> Taken:
    """rotq's side; what it wrote is left in ``scratch``."""
    output = scratch / "rotq"
    shutil.rmtree(output, ignore_errors=True)
    counts = str(scratch / "counts.json")
    command = [sys.executable, "-m", "benchmarks.counted", counts, "export", "-q"]
    command += ["-m", given.model]
    command += ["--calib-dataset", str(given.text), "--calib-layout", "windows"]
    command += ["--nsamples", str(given.rows), "--seqlen", str(given.seqlen)]
    return watched([*command, *job.options, "-o", str(output)], scratch / "rotq.log", {})


def run_peer(job: Job, given: argparse.Namespace, scratch: Path) -> Taken:
    """The other's side."""
    command = [str(given.peers / "bin" / "python"), str(_PEER), job.as_peer]
    command += ["--model", given.model, "--text", str(given.text)]
    command += ["--rows", str(given.rows), "--seqlen", str(given.seqlen)]
    output = scratch / "peer"
    offline = {"HF_HUB_OFFLINE": "1"}
    taken = watched([*command, "-o", str(output)], scratch / "peer.log", offline)
    shutil.rmtree(output, ignore_errors=True)
    return taken


def show(own: Taken, peer: str, other: Taken | None) -> None:
    """A line for each side, and one for the ratios of those that came to their end."""
    print(f"{'':18}{'wall':>8}{'cpu':>8}{'system':>8}{'anonymous':>11}{'faults':>9}")
    for name, taken in (("rotq", own), (peer, other)):
        if taken is None:
            continue
        print(
            f"{name:18}{taken.wall:7.1f}s{taken.cpu:7.1f}s{taken.system:7.1f}s"
            f"{taken.anonymous / 1e9:9.2f}GB{taken.faults / 1e6:8.2f}M"
        )
        if taken.code not in (0, 3):  # 3: exported, and parity failed
            print(f"  ended with {taken.code}: {taken.said}")
    if other is not None and other.code == 0:
        print(
            f"{'ratio':18}{own.wall / other.wall:8.2f}{own.cpu / other.cpu:8.2f}{'':8}"
            f"{own.anonymous / other.anonymous:11.2f}",
            flush=True,
        )


def show_report(scratch: Path) -> None:
    """rotq's stages, and how often parity went over its evaluation rows: tokens that any model was
    run on, those of prompts, of single steps and of probes included, over tokens of all rows.
    """
    path = scratch / "rotq" / "report.json"
    if not path.is_file():
        return
    report = json.loads(path.read_text(encoding="utf-8"))
    for stage, seconds in report["seconds"].items():
        cpu, peak = report["cpu_seconds"].get(stage), report["peak_bytes"].get(stage)
        words = [
            "" if cpu is None else f"{cpu:.1f}s",
            "" if peak is None else f"{peak / 1e9:.2f}GB resident",
        ]
        print(f"  {stage:16}{seconds:7.1f}s{words[0]:>8}{words[1]:>19}")
    counts = json.loads((scratch / "counts.json").read_text(encoding="utf-8"))
    passes = sum(counts["tokens"].values()) / counts["evaluation"]
    scored = next((row["note"] for row in report["parity"] if row["metric"] == RATIO), "")
    print(f"  parity: {passes:.1f} float passes; {report['status']}; {scored}", flush=True)


def _pip(python: Path, requirements: Sequence[str]) -> str:
    """Install them; pip's reason why it does not."""
    command = [str(python), "-m", "pip", "install", "--quiet", *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (lines or [done.stderr.strip()[-200:] or "pip failed"])[-1]


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rotq"


if __name__ == "__main__":
    main()
