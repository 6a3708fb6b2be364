"""Perplexity by scheme, rotations and weight algorithm, in one table for each model, over that of
the float model.

Rotations: ``none``; ``Hadamard``, random R1 and R2 and the online R4; ``auto``, what ``rotq export
--rotate auto`` trains for the scheme and keeps, by KL(float || quantized) of the whole model on
gate rows.

Algorithms: rounding to nearest (``rtn``), weights with searched limits (``mse``), GPTQ, AdaRound of
few iterations for int4, and smoothing, alone and before GPTQ: SmoothQuant for integer activations,
else AWQ for weights of four bits. The best one of a row is chosen by the same KL on the gate rows,
so the evaluation rows choose nothing.

Figures, of the torch model that an exported artifact reproduces: perplexity over float; the gap,
how far its logarithm is above float's, in nats per token; and that KL on the evaluation rows, which
varies far less. Calibration, gate and evaluation share no document: the text is split, unless
``--calib-text`` names another to calibrate and gate with. What the embedded model has to reach is
checked below its table, as far as it was measured.

    python -m benchmarks.quality [--model embedded --model DIR ...] [--text FILE.txt] [--calib-text
        FILE.txt] [--schemes int8 w4a4 ...] [--block-size 32] [--rows 32] [--all]
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from benchmarks.quality_algorithms import algorithms_of, blocks, label, split
from benchmarks.quality_figures import KINDS, PLAIN, Cell, acceptance, least, show
from benchmarks.shared_statistics import Fused
from calib.artifact import QuantizedModel
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.data.rows import RowSplits
from calib.errors import QuantizationError
from calib.measure.perplexity import Comparison, LogitsFunction, compare_logits, model_logits
from calib.measure.reference import build_reference
from calib.quantizing.calibrator import Calibrator
from calib.rotations.rotate import Rotate, union
from calib.rotations.rotation_set import (
    RotationSet,
    hadamard_rotations,
)
from calib.schemes import (
    LINEAR_SCHEMES,
    scheme_named,
)
from exporter.recipe import Recipe, load_recipe
from exporter.run.capturing import captured
from exporter.run.destination import Destination
from exporter.run.gate import Candidate, Gate, Setup
from exporter.run.inputs import Inputs, open_inputs
from exporter.run.options import RunOptions
from exporter.run.quantizing import customised_scheme, folds_norms
from exporter.run.rotations import (
    candidate_sets,
    gate_rotations,
    trained_rotations,
)
from exporter.run.stopwatch import Stopwatch
from exporter.run.workdir import WorkDir

SEARCHED = ("int8", "float8", "int4-weight-only")
"""Schemes with a figure to reach by an algorithm that need not be the best of its row: all of them
are evaluated.
"""


@dataclass(frozen=True)
class Bench:
    """One model, with all that its schemes share."""

    arguments: argparse.Namespace
    model: str
    capture: Path
    """Folder of the captured statistics."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.started

    def inputs(self, scheme: str) -> Inputs:
        """What a scheme starts from, with the shared model."""
        recipe = self._recipe(scheme)
        return replace(self.first, recipe=recipe, scheme=customised_scheme(recipe))

    @cached_property
    def first(self) -> Inputs:
        """The shared model."""
        recipe = self._recipe("int8")
        return open_inputs(recipe, Destination.of(recipe))

    @cached_property
    def rows(self) -> RowSplits:
        """The shared text; with it goes what is captured of the model."""
        rows, options = self.first.rows(Stopwatch()), RunOptions(Path())
        work = WorkDir.of(options, self.first)
        captured(self.first, rows.train, options, work, Stopwatch()).write(self.capture)
        return rows

    def _recipe(self, scheme: str) -> Recipe:
        arguments = self.arguments
        return load_recipe(
            None,
            {
                "model": self.model,
                "scheme": scheme,
                "dtype": "float32",
                "seed": arguments.seed,
                "calibration.dataset": arguments.calib_text or arguments.text,
                "calibration.nsamples": arguments.calib_rows,
                "gate.nsamples": arguments.gate_rows,
                "evaluation.dataset": arguments.text if arguments.calib_text else None,
                "evaluation.nsamples": arguments.rows,
                "weights.block_size": (
                    arguments.block_size if blocks(scheme_named(scheme)) else None
                ),
            },
        )

    @cached_property
    def original(self) -> LogitsFunction:
        """Logits of the float model, computed once for every row."""
        logits, known = (
            model_logits(self.first.source.original("cpu")),
            dict[tuple[int, ...], Tensor](),
        )

        def remembered(ids: Tensor) -> Tensor:
            key = tuple(ids.flatten().tolist())
            if key not in known:
                known[key] = logits(ids)
            return known[key]

        return remembered

    def compare(self, quantized: QuantizedModel, rows: Sequence[Tensor]) -> Comparison:
        """The float model and a quantized one on whole rows."""
        window = max(row.numel() for row in rows)
        candidate = model_logits(build_reference(quantized))
        return compare_logits(self.original, candidate, rows, window=window, stride=window)

    def fused(self, rotations: RotationSet, *, fold_norms: bool = True) -> Fused:
        """The model with these rotations folded in."""
        batches = length_batches(self.rows.train, self.first.recipe.calibration.batch_size)
        model = self.first.fuse(rotations, Stopwatch(), fold_norms=fold_norms)
        return Fused(model, forward_loop_over(batches))

    def none(self, inputs: Inputs) -> Fused:
        """Without rotations, its norms folded or kept as the pipeline does for the scheme."""
        folded = folds_norms(inputs.recipe, inputs.quantization())
        if folded not in self._plain:
            self._plain[folded] = self.fused(RotationSet(), fold_norms=folded)
        return self._plain[folded]

    @cached_property
    def _plain(self) -> dict[bool, Fused]:
        """:meth:`none` with norms folded or not, as far as a scheme has asked."""
        return {}

    @cached_property
    def hadamard(self) -> tuple[str, Fused]:
        """Random R1 and R2, and R4, as far as the architecture has them; and which these are."""
        source = self.first.source
        kinds = [kind for kind in KINDS if source.wiring.refusal(kind) is None]
        made = hadamard_rotations(source.wiring, kinds, seed=self.arguments.seed)
        return str(Rotate.of(kinds)), self.fused(made)

    def auto(self, inputs: Inputs) -> tuple[str, Fused]:
        """What the pipeline trains for a scheme and its gate keeps, rounding weights to nearest."""
        rows, quantization = self.rows, inputs.quantization()
        options = RunOptions(Path(), from_capture=self.capture)
        work = WorkDir.of(options, inputs)
        candidates = candidate_sets(inputs, RotationSet())
        trained = trained_rotations(
            union(candidates), inputs, RotationSet(), rows.train, options, work, Stopwatch()
        )
        sets = gate_rotations(candidates, inputs, RotationSet(), trained.rotations)
        setups = [Setup.of(name) for name in sets]
        made = {
            str(name): self.none(inputs) if not rotations else self.fused(rotations)
            for name, rotations in sets.items()
        }

        def make(setup: Setup) -> Candidate:
            fused = made[setup.rotate]
            return Candidate(setup, fused.model, fused.quantize(quantization))

        gate = Gate(make, self.original, rows.gate, inputs.scheme.max_perplexity_ratio)
        gate.run(setups)
        kept = gate.chosen.rotate
        return kept, made[kept]

    def measure(self, inputs: Inputs) -> list[Cell]:
        """All cells of one scheme."""
        plain, hadamard = (
            self._cells(inputs, "none", "none", self.none(inputs)),
            self._cells(inputs, "Hadamard", *self.hadamard),
        )
        rotate, fused = self.auto(inputs)
        same = [replace(cell, rotation="auto") for cell in plain]
        return [
            *plain,
            *hadamard,
            *(same if rotate == "none" else self._cells(inputs, "auto", rotate, fused)),
        ]

    def _cells(self, inputs: Inputs, rotation: str, rotate: str, fused: Fused) -> list[Cell]:
        """Every algorithm on the gate rows; on the evaluation rows those that the table or a figure
        needs.
        """
        name, smoothed, made = label(inputs.scheme), {"": fused}, dict[Cell, QuantizedModel]()
        chosen = inputs.quantization()
        for algorithm in algorithms_of(inputs.scheme, self.arguments.adaround):
            smoothing, weights = split(algorithm)
            quantization = replace(chosen, weights=weights)
            if smoothing not in smoothed:
                smoothed[smoothing] = fused.smooth(smoothing, quantization)
            quantized = smoothed[smoothing].quantize(quantization)
            cell = Cell(
                name, rotation, rotate, algorithm, self.compare(quantized, self.rows.gate).kl
            )
            made[cell] = quantized
            what = f"{name}, {rotation} ({rotate}), {algorithm}: KL {cell.gate:.5f}"
            print(f"{self.seconds:6.0f} s  {what}", file=sys.stderr)
        every = self.arguments.all or inputs.scheme.name in SEARCHED
        wanted = [cell for cell in made if every or cell.algorithm == PLAIN or cell is least(made)]
        return [
            (
                replace(cell, result=self.compare(quantized, self.rows.evaluation))
                if cell in wanted
                else cell
            )
            for cell, quantized in made.items()
        ]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", action="append", help="checkpoint folder (default: the embedded model)"
    )
    parser.add_argument(
        "--text", default="embedded", help="text to evaluate on (default: the embedded one)"
    )
    parser.add_argument(
        "--calib-text", help="text to calibrate and gate with (default: other documents of --text)"
    )
    parser.add_argument(
        "--schemes", nargs="+", choices=list(LINEAR_SCHEMES), default=list(LINEAR_SCHEMES)
    )
    parser.add_argument(
        "--block-size", type=int, help="input features that share a scale of int4 weights (128)"
    )
    parser.add_argument("--rows", type=int, default=32, help="evaluation rows")
    parser.add_argument("--gate-rows", type=int, default=16)
    parser.add_argument("--calib-rows", type=int, default=64)
    parser.add_argument(
        "--adaround", type=int, default=20, help="iterations of AdaRound; 0: without it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="evaluate and print every algorithm")
    arguments = parser.parse_args()
    for model in arguments.model or ["embedded"]:
        with tempfile.TemporaryDirectory() as folder:
            cells = measure(Bench(arguments, model, Path(folder)))
        for line in acceptance(cells) if model == "embedded" else ():
            print(line)


def measure(bench: Bench) -> list[Cell]:
    """The table of one model, printed scheme by scheme."""
    rows, cells = bench.rows, list[Cell]()
    sizes = [
        f"{name} {len(some)} rows of {sum(row.numel() for row in some)} tokens"
        for name, some in (
            ("evaluation", rows.evaluation),
            ("gate", rows.gate),
            ("calibration", rows.train),
        )
    ]
    print(f"\n{bench.model}: {', '.join(sizes)}")
    columns = f"{'gap':>8} {'KL':>8}"
    print(
        f"{'scheme':<22} {'rotations':<16} {'RTN':>8} {columns}  {'best':>8} {columns}  algorithm"
    )
    for scheme in bench.arguments.schemes:
        inputs = bench.inputs(scheme)
        try:
            Calibrator(bench.none(inputs).model, inputs.quantization()).check_blocks()
        except QuantizationError:
            print(f"{label(inputs.scheme):<22} not divisible")
            continue
        with contextlib.redirect_stdout(sys.stderr):  # ModelOpt prints
            found = bench.measure(inputs)
        show(found, every=bench.arguments.all)
        cells += found
    plain = next((cell.result.reference.value for cell in cells if cell.result), math.nan)
    print(f"float perplexity {plain:.3f}; {bench.seconds:.0f} s", flush=True)
    return cells


if __name__ == "__main__":
    main()
