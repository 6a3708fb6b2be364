"""How far a calibrated model depends on the number of threads: floats are summed in another order,
and are rounded otherwise.

    python -m benchmarks.threads [--threads 1 2] [--nsamples 16] [--rotate r1,r2,r4] [-m MODEL]
    python -m benchmarks.threads --rotate auto --threads 1 2 4 -m embedded -m MODEL -m MODEL

Calibrates the same model with the same seed for each number of threads, in a process of its own.
Prints what the gates took for each, with the KL and its margin; and the largest differences between
the first result and each of the others that took the same. The first number is run twice: what that
shows is no matter of threads. The exit code is 1 where another number of threads takes something
else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from backends.cpu import cpu_words
from calib.artifact import QuantizedModel, load_artifact
from exporter.reporting.report import GateRow


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--gate-rows", type=int, default=32)
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--rotate", default="r1,r2,r4")
    parser.add_argument("--text", help="calibration text (default: the embedded one)")
    parser.add_argument("-m", "--model", action="append", help="default: the embedded one")
    given = parser.parse_args()

    print(f"torch {torch.__version__}, {cpu_words()}")
    same = [compared(model, given) for model in given.model or ["embedded"]]
    sys.exit(0 if all(same) else 1)


def compared(model: str, given: argparse.Namespace) -> bool:
    """Print the results of one model; whether all of them took the same."""
    print(f"\n{model}, {given.scheme}, rotate {given.rotate}")
    alike, first = True, None
    with tempfile.TemporaryDirectory() as name:
        for index, threads in enumerate([given.threads[0], *given.threads]):
            own = calibrated(Path(name) / str(index), model, threads, given)
            had = own.provenance.threads  # no more than there are cores for
            print(f"  {threads} threads ({had}) took {'; '.join(choices(own))}", flush=True)
            for line in gate(own):
                print(f"    {line}", flush=True)
            if first is None:
                first = own
            elif choices(own) != choices(first):
                alike = False
            else:
                print(f"  {given.threads[0]} against {threads} threads:")
                for line in differences(first, own):
                    print(f"    {line}", flush=True)
    return alike


def calibrated(folder: Path, model: str, threads: int, given: argparse.Namespace) -> QuantizedModel:
    """The artifact of a run with so many threads."""
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(f"gate: {{nsamples: {given.gate_rows}}}\n", encoding="utf-8")
    command = [sys.executable, "-m", "exporter.cli", "calibrate", "-q", "-o", str(folder)]
    command += ["--recipe", str(recipe), "-m", model, "--rotate", given.rotate]
    command += ["--nsamples", str(given.nsamples), "--seqlen", str(given.seqlen)]
    command += ["--scheme", given.scheme, "--threads", str(threads)]
    command += [] if given.text is None else ["--calib-dataset", given.text]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return load_artifact(folder)


def choices(model: QuantizedModel) -> list[str]:
    """What each gate took, in words."""
    whole = [GateRow.model_validate(row).name for row in model.provenance.gate if row["chosen"]]
    each = [
        f"{row['rotation']} {row['candidate']}"
        for row in model.provenance.rotation_gate
        if row["chosen"]
    ]
    return [*whole, *each]


def gate(model: QuantizedModel) -> Iterator[str]:
    """The candidates, how far above the best each is, and the interval of that."""
    for row in map(GateRow.model_validate, model.provenance.gate):
        if row.kl is None or row.margin is None:
            yield f"{row.name}: not tried"
        else:
            ends = f"{row.margin_low:.3g} to {row.margin_high:.3g}"
            yield f"{row.name}: KL {row.kl:.5g}, above the lowest {row.margin:.3g} ({ends})"


def differences(one: QuantizedModel, other: QuantizedModel) -> list[str]:
    """What differs between two artifacts of the same settings, in words."""
    weights = [(one.linears[name].weight, part.weight) for name, part in other.linears.items()]
    steps = [(a.int() - b.int()).abs() for a, b in weights]
    changed, count = sum(int((own > 0).sum()) for own in steps), sum(own.numel() for own in steps)
    scales = [
        (one.linears[name].weight_scale, part.weight_scale) for name, part in other.linears.items()
    ]
    inputs = [
        (mine, part.input_scale)
        for name, part in other.linears.items()
        if (mine := one.linears[name].input_scale) is not None and part.input_scale is not None
    ]
    floats = [(one.floats[key], tensor) for key, tensor in other.floats.items()]
    rotations = [
        (one.rotations[name].dense(), rotation.dense())
        for name, rotation in other.rotations.items()
        if rotation.matrix is not None
    ]
    return [
        f"{changed:,} of {count:,} integer weights, by {max(int(s.max()) for s in steps)} at most",
        f"weight scales: {_largest(scales):.2e} relative",
        f"input scales: {_largest(inputs):.2e} relative",
        f"float tensors: {_largest(floats):.2e} of their largest magnitude",
        f"rotations: {_largest(rotations):.2e} of their largest magnitude",
    ]


def _largest(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The largest difference over the largest magnitude of its tensor."""
    return max(
        (
            float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-30))
            for a, b in pairs
        ),
        default=0.0,
    )


if __name__ == "__main__":
    main()
