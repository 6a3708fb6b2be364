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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from calib.architectures import Kind
from calib.artifact import Provenance, QuantizedModel
from calib.data.batches import length_batches
from calib.data.forward_loop import ForwardLoop, forward_loop_over
from calib.data.rows import RowSplits
from calib.errors import QuantizationError
from calib.fusing import FusedModel, materialize
from calib.measure.perplexity import Comparison, LogitsFunction, compare_logits, model_logits
from calib.measure.reference import build_reference
from calib.progress import silent
from calib.quantizing.calibrator import Calibrator
from calib.quantizing.observation import Observed, Watchlist, observe
from calib.quantizing.plan import Quantization
from calib.rotations.rotate import Rotate, union
from calib.rotations.rotation_set import (
    RotationSet,
    hadamard_rotations,
)
from calib.schemes import (
    INT4,
    INT8,
    LINEAR_SCHEMES,
    PerBlock,
    PerTensor,
    Scheme,
    TensorScheme,
    scheme_named,
)
from calib.smoothing.groups import SmoothingGroup, smoothing_groups
from calib.smoothing.methods import smoothing_named
from calib.smoothing.observe import GroupInputs, observe_channels
from calib.smoothing.smooth import smooth
from exporter.recipe import Recipe, load_recipe
from exporter.run.capturing import captured
from exporter.run.destination import Destination
from exporter.run.gate import Candidate, choose
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

PLAIN = "rtn"
KINDS: tuple[Kind, ...] = ("r1", "r2", "r4")
FULL = ",".join(KINDS)
INT4_G128 = "int4-weight-only g128"
SEARCHED = ("int8", "float8", "int4-weight-only")
"""Schemes with a figure to reach by an algorithm that need not be the best of its row: all of them
are evaluated.
"""
PER_TENSOR = TensorScheme(INT8, PerTensor())
"""Its limits, min and max of the whole tensor, are those of every static scheme, whatever the
format.
"""
Seen = tuple[Observed, dict[str, GroupInputs]]
"""Limits and second moments of the inputs of all linears; and, by group, channels of what smoothing
scales.
"""
UNKNOWN = Provenance("", "", {}, 0, 0, 0, 0, "", {})
"""Nothing that is measured here is saved."""


@dataclass(frozen=True)
class Cell:
    """One scheme with one set of rotations and one algorithm."""

    scheme: str
    rotation: str
    """``none``, ``Hadamard`` or ``auto``."""
    rotate: str
    """The set that this was."""
    algorithm: str
    gate: float
    """KL(float || quantized) on the gate rows, in nats per token."""
    result: Comparison | None = None
    """On the evaluation rows, where it was measured there."""

    @property
    def gap(self) -> float:
        """Log-perplexity above float, in nats per token."""
        assert self.result is not None
        return self.result.candidate.nll - self.result.reference.nll

    @property
    def ratio(self) -> float:
        """Perplexity over float."""
        return math.exp(self.gap)

    @property
    def figures(self) -> str:
        """For the table: ratio, gap, and KL on the evaluation rows."""
        assert self.result is not None
        return f"{self.ratio:>8.4f} {self.gap:>8.4f} {self.result.kl:>8.4f}"


@dataclass(frozen=True)
class Fused:
    """A fused model, looked at when that is first needed."""

    model: FusedModel
    loop: ForwardLoop
    known: Seen | None = None

    @cached_property
    def groups(self) -> list[SmoothingGroup]:
        """What smoothing scales."""
        return smoothing_groups(self.model.wiring, self.model.rotations)[0]

    @cached_property
    def seen(self) -> Seen:
        """Everything that any scheme and any algorithm asks for."""
        if self.known is not None:
            return self.known
        names = self.model.wiring.linear_names
        channels: dict[str, GroupInputs] = {}

        def run(module: nn.Module) -> None:
            channels.update(observe_channels(module, self.groups, self.loop))

        network: nn.Module = materialize(self.model)
        watchlist = Watchlist(dict.fromkeys(names, PER_TENSOR), "min_max", moments=names)
        observed = observe(network, watchlist, run)
        moments = {group.name: observed.moments[group.observed_at] for group in self.groups}
        return observed, {
            name: replace(inputs, moment=moments[name]) for name, inputs in channels.items()
        }

    def smooth(self, method: str, quantization: Quantization) -> Fused:
        """Smoothed for a scheme: x <- x / s, so that amax <- max_j amax_j / s_j and H <- H / (s
        s^T).
        """
        found, (inputs, channels) = smoothing_named(method), self.seen
        assert found is not None
        model, _ = smooth(self.model, found, channels, quantization.linears)
        magnitudes, moments = dict(inputs.amax), dict(inputs.moments)
        for group in self.groups:
            s, before = group.expanded(model.smoothing[group.name]), channels[group.name]
            assert before.moment is not None
            amax = (before.amax / s).amax().float()
            magnitudes |= dict.fromkeys(group.reader_names, amax)
            moments |= dict.fromkeys(group.reader_names, before.moment / s / s[:, None])
        return Fused(model, self.loop, (Observed(magnitudes, moments=moments), {}))

    def quantize(self, quantization: Quantization) -> QuantizedModel:
        """What :func:`calib.quantizing.calibrator.quantize_model` makes, of statistics that all
        schemes share.
        """
        calibrator, state = Calibrator(self.model, quantization), self.model.state
        names = list(quantization.linears)
        observed = self.seen[0] if calibrator.watchlist(names) else Observed()
        linears = {name: calibrator.quantized(name, state, observed) for name in names}
        parts = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
        floats = {key: tensor for key, tensor in state.items() if key not in parts}
        return calibrator.model(linears, floats, None, UNKNOWN, {})


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
        sets = {
            str(candidate): rotations
            for candidate, rotations in gate_rotations(
                candidates, inputs, RotationSet(), trained.rotations
            ).items()
        }
        made = {
            name: self.none(inputs) if name == "none" else self.fused(rotations)
            for name, rotations in sets.items()
        }

        def make(rotate: str) -> Candidate:
            return Candidate(rotate, made[rotate].model, made[rotate].quantize(quantization))

        kept, _ = choose(list(sets), make, self.original, rows.gate, silent)
        return kept.rotate, made[kept.rotate]

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


def show(cells: list[Cell], *, every: bool) -> None:
    """Print the rows of one scheme."""
    for rotation in dict.fromkeys(cell.rotation for cell in cells):
        some = [cell for cell in cells if cell.rotation == rotation]
        best = least(some)
        name = f"auto: {best.rotate}" if rotation == "auto" else rotation
        print(
            f"{best.scheme:<22} {name:<16} {some[0].figures}  {best.figures}  {best.algorithm}",
            flush=True,
        )
        for cell in some if every else ():
            print(f"{'':<68}{cell.figures}  {cell.algorithm}, gate KL {cell.gate:.5f}")


def acceptance(cells: list[Cell]) -> list[str]:
    """The four figures that the embedded model has to reach, as far as they were measured."""
    plain = {
        cell.scheme: cell for cell in cells if (cell.rotation, cell.algorithm) == ("none", PLAIN)
    }
    int8 = [
        cell
        for cell in cells
        if cell.scheme == "int8" and ("r4" in cell.rotate or "smooth" in cell.algorithm)
    ]
    float8 = [cell for cell in cells if cell.scheme == "float8"]
    int4 = [cell for cell in cells if (cell.scheme, cell.rotation) == (INT4_G128, "none")]
    searched = [cell for cell in int4 if cell.algorithm.startswith(("gptq", "awq"))]
    rounded = [cell for cell in cells if cell.scheme == "w4a4" and cell.algorithm == PLAIN]
    w4a4 = [cell for cell in rounded if cell.rotate.startswith(FULL)]
    lines = []
    for what, some, bound in (
        ("int8 with R4 or SmoothQuant: perplexity over float", int8, 1.01),
        ("float8: perplexity over float", float8, 1.01),
        (f"{INT4_G128} with GPTQ or AWQ, no rotation: gap over that of RTN", searched, 2 / 3),
        ("w4a4 with R1+R2+R4, RTN: gap over that without rotation", w4a4, 0.12),
    ):
        if some:
            best = least(some)
            value = best.ratio if bound > 1 else best.gap / plain[best.scheme].gap
            met = "pass" if value <= bound else "MISS"
            lines.append(
                f"{met}  {what} {value:.4f}, at most {bound:.4g} ({best.rotation},"
                f" {best.algorithm})"
            )
    return lines


def least(cells: Iterable[Cell]) -> Cell:
    """The cell that the gate prefers."""
    return min(cells, key=lambda cell: cell.gate)


def algorithms_of(scheme: Scheme, adaround: int) -> list[str]:
    """What is tried for a scheme, ``rtn`` first: weight algorithms, or smoothing and, after a
    ``+``, one of them.
    """
    assert scheme.weight is not None  # 'float' is no choice here
    found = [PLAIN, "mse", "gptq"]
    if scheme.weight.format == INT4 and adaround:
        found.append(f"adaround:iterations={adaround}")
    if scheme.activation is not None and scheme.activation.format.kind == "integer":
        return [*found, "smoothquant:auto", "smoothquant:auto+gptq"]
    return [*found, "awq", "awq+gptq"] if scheme.weight.format.bits < 8 else found


def split(algorithm: str) -> tuple[str, str]:
    """The smoothing method, empty if there is none, and the weight algorithm."""
    first, _, second = algorithm.partition("+")
    return (first, second or PLAIN) if first.startswith(("awq", "smoothquant")) else ("", first)


def blocks(scheme: Scheme) -> int | None:
    """Input features that share a scale of a weight, where their number can be chosen."""
    assert scheme.weight is not None  # 'float' is no choice here
    granularity, chosen = scheme.weight.granularity, scheme.weight.scale_format == "compute"
    return granularity.size if chosen and isinstance(granularity, PerBlock) else None


def label(scheme: Scheme) -> str:
    """The name of a scheme, with the size of the blocks that can be chosen."""
    size = blocks(scheme)
    return scheme.name if size is None else f"{scheme.name} g{size}"


if __name__ == "__main__":
    main()
