"""From rotations to a quantized model: fuse, put the prefix in place, smooth, calibrate; once, or
once for each candidate that the gate compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from calib.architectures.experts import with_parameters
from calib.artifact import Provenance, QuantizedModel
from calib.data.batches import length_batches
from calib.data.forward_loop import ForwardLoop, forward_loop_over
from calib.data.rows import RowSplits, at_most
from calib.data.tokens import token_hash
from calib.files.sealed import seal_of
from calib.fusing import FusedModel, materialize, with_prefix
from calib.measure.perplexity import remembered_logits
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import Quantization
from calib.rotations.rotate import GateSet
from calib.rotations.rotation_set import RotationSet
from calib.smoothing.groups import groups_of
from calib.smoothing.methods import smoothing_named
from calib.smoothing.observe import observe_channels
from calib.smoothing.smooth import smooth
from calib.stats.massive import PrefixChoice
from calib.weights.algorithms import algorithm_named
from exporter.reporting.report import GateRow
from exporter.run.contents import rotations_digest
from exporter.run.destination import Destination
from exporter.run.gate import Candidate, Gate, Setup
from exporter.run.inputs import Inputs
from exporter.run.quantizing import GATE_ROW_TOKENS, GATE_TOKENS, QUICK_TOKENS, folds_norms
from exporter.run.stopwatch import Stopwatch
from exporter.run.widening import fixes_limits, widened, wider_sets
from exporter.run.workdir import GATE, WorkDir

SMOOTHING = "smoothquant:0.5"
"""What the gate tries together with R4: a scale by formula, since a search passes over R4."""


@dataclass(frozen=True)
class Calibrating:
    """How a set of rotations becomes a quantized model; the same for all that are compared."""

    inputs: Inputs
    quantization: Quantization
    rows: RowSplits
    """Calibrates on ``train``; the gate decides on ``gate``."""
    provenance: Provenance
    prefix: PrefixChoice | None = None
    """What stands before every sequence, where something was looked for."""
    destination: Destination | None = None
    """What must be able to express the result, if anything."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids of the prefix."""
        return () if self.prefix is None else self.prefix.tokens

    @property
    def fold_norms(self) -> bool:
        """Whether norms are folded also without R1."""
        return folds_norms(self.inputs.recipe, self.quantization)

    @property
    def may_keep_norms(self) -> bool:
        """Whether the gate may choose not to fold them: gains that are folded smooth activations,
        and give weights another range."""
        return self.fold_norms and self.inputs.recipe.rotation.fold_norms == "auto"

    @property
    def may_smooth(self) -> bool:
        """Whether the gate may smooth: the recipe does not, and some inputs are integers with
        limits fixed beforehand, which R4 alone may leave too wide."""
        return self.inputs.recipe.smoothing == "none" and any(
            scheme.input is not None and scheme.input.static_integer
            for scheme in self.quantization.linears.values()
        )

    @property
    def looks_at_head(self) -> bool:
        """Whether calibration looks at what enters the output head."""
        head = self.quantization.linears.get(self.inputs.source.wiring.head.name)
        needs_moment = algorithm_named(self.quantization.weights).needs_moment
        return head is not None and (head.input is not None or needs_moment)

    def setups(self, sets: Iterable[GateSet]) -> list[Setup]:
        """What the gate compares, the simplest first.

        A prefix that is only offered (``auto``) is also left out once, without a rotation: to show
        what it is worth, and because it changes the float model.

        Args:
            sets: sets of rotations, the simplest first.
        """
        setups = [Setup.of(each, self.tokens) for each in sets]
        offered = self.inputs.recipe.prefix == "auto" and self.tokens
        return [*([replace(setups[0], prefix=())] if offered else []), *setups]

    def gate(self, rotations: Mapping[str, RotationSet], work: WorkDir, clock: Stopwatch) -> Gate:
        """What compares candidates.

        Args:
            rotations: those of every set, by the name of the set.
            work: may hold what was measured of a candidate, and keeps it.
            clock: times the stages.
        """
        rows = at_most([row[:GATE_ROW_TOKENS] for row in self.rows.gate], GATE_TOKENS)
        digests = {name: rotations_digest(each) for name, each in rotations.items()}

        def remember(setup: Setup, measure: Callable[[], GateRow]) -> GateRow:
            made_of = {
                "rotations": digests[setup.rotate],
                "setup": asdict(setup),
                "quantization": seal_of({"": repr(self.widened(setup.wider))}),
                "rows": [token_hash(part) for part in (self.rows.train, rows)],
            }
            row = work.remembered(GATE, made_of, lambda: measure().model_dump(mode="json"))
            return GateRow.model_validate(row)

        return Gate(
            make=lambda setup: self.candidate(setup, rotations[setup.rotate], clock),
            original=remembered_logits(self.inputs.source.original(self.inputs.device)),
            rows=rows,
            bound=self.quantization.scheme.max_perplexity_ratio,
            clock=clock,
            remember=remember,
        )

    def candidate(self, setup: Setup, rotations: RotationSet, clock: Stopwatch) -> Candidate:
        """The model with ``rotations`` folded in, smoothed and quantized.

        Args:
            setup: says whether there is a prefix, and what smooths where the recipe says nothing.
            rotations: all of them; the online ones run while it is calibrated.
            clock: times the stages.
        """
        fused = self._smoothed(
            self._prefixed(self._fused(setup, rotations, clock), setup.prefix), setup, clock
        )
        own = replace(self, quantization=self.widened(setup.wider))
        return Candidate(setup, fused, own.quantized(fused, clock))

    def widened(self, names: Sequence[str]) -> Quantization:
        """The quantization with wider inputs of the linears ``names``."""
        return widened(self.quantization, names, self.destination)

    def wider_setups(self, base: Setup, rotations: RotationSet, clock: Stopwatch) -> list[Setup]:
        """``base`` without a prefix and with ever more inputs in a wider form: those that static
        scales hurt most.

        Args:
            base: what is widened.
            rotations: those of ``base``.
            clock: times the stages.
        """
        fused = self._smoothed(self._fused(base, rotations, clock), base, clock)
        with clock.stage("gate"):
            network = materialize(fused, device=self.inputs.device)
            sets = wider_sets(network, self.quantization, self.rows.train)
        return [replace(base, prefix=(), wider=names) for names in sets]

    def quick(self) -> Calibrating:
        """The same in a hurry, for a comparison: on the first :data:`QUICK_TOKENS` tokens, and with
        weights rounded to nearest; the weight algorithm takes longer than everything else."""
        return replace(
            self,
            quantization=replace(self.quantization, weights="rtn"),
            rows=replace(self.rows, train=at_most(self.rows.train, QUICK_TOKENS)),
        )

    def quantized(self, fused: FusedModel, clock: Stopwatch) -> QuantizedModel:
        """``fused``, calibrated and quantized."""
        with clock.stage("calibrate"):
            return quantize_model(
                fused,
                self.quantization,
                self._forward_loop(clock),
                self.provenance,
                files=self.inputs.source.files,
                device=self.inputs.device,
                progress=clock.progress,
            )

    def _fused(self, setup: Setup, rotations: RotationSet, clock: Stopwatch) -> FusedModel:
        fold = self.fold_norms and not setup.norms_kept
        return self.inputs.fuse(rotations, clock, fold_norms=fold)

    def _prefixed(self, fused: FusedModel, tokens: Sequence[int]) -> FusedModel:
        reason = "" if self.prefix is None else self.prefix.reason
        return with_prefix(fused, tokens, reason, self.inputs.device)

    def _smoothed(self, fused: FusedModel, setup: Setup, clock: Stopwatch) -> FusedModel:
        asked = self.inputs.recipe.smoothing
        method = smoothing_named(setup.smoothing if asked == "none" else asked)
        if method is None:
            return fused

        device = self.inputs.device
        schemes = with_parameters(self.quantization.linears, fused.wiring)
        with clock.stage("smooth"):
            groups = groups_of(fused.wiring, fused.rotations, schemes, search=method.needs_moment)
            statistics = observe_channels(
                materialize(fused, device=device),
                groups,
                self._forward_loop(clock),
                moments=method.needs_moment,
            )
            smoothed, _ = smooth(
                fused, method, statistics, schemes, device=device, progress=clock.progress
            )
        # values may have been scaled
        return self._prefixed(smoothed, () if fused.prefix is None else fused.prefix.tokens)

    def _forward_loop(self, clock: Stopwatch) -> ForwardLoop:
        batches = length_batches(self.rows.train, self.inputs.recipe.calibration.batch_size)
        return forward_loop_over(batches, progress=clock.progress, head=self.looks_at_head)


def best_candidate(
    sets: Mapping[GateSet, RotationSet], calibrating: Calibrating, work: WorkDir, clock: Stopwatch
) -> tuple[Candidate, list[GateRow]]:
    """The quantized model of the candidate that the gate takes, and the gate's table where there
    was a choice.

    Args:
        sets: rotations of every set, the simplest first.
        calibrating: what is done with each.
        work: may hold rows of the table, and keeps them.
        clock: times the stages.
    """
    rotations = {str(name): chosen for name, chosen in sets.items()}
    setups = calibrating.setups(sets)
    if len(setups) == 1:
        (setup,) = setups
        return calibrating.candidate(setup, rotations[setup.rotate], clock), []

    quick = calibrating.quick()
    gate = quick.gate(rotations, work, clock)
    gate.run(setups)
    if calibrating.may_keep_norms and "r1" not in rotations[gate.chosen.rotate].kinds():
        gate.run([replace(gate.chosen, norms_kept=True)])
    if calibrating.may_smooth:
        with_r4 = [name for name, each in rotations.items() if "r4" in each.kinds()]
        around_r4 = gate.chosen_among(with_r4)
        # without the prefix first: it is not needed where smoothing is enough
        smoothed = () if around_r4 is None else _smoothed_setups(around_r4)
        for setup in smoothed:
            if not gate.met:
                gate.run([setup])
    widens = calibrating.inputs.recipe.widen == "auto"
    if not gate.met and widens and fixes_limits(calibrating.quantization):
        base = gate.chosen
        gate.run(quick.wider_setups(base, rotations[base.rotate], clock))

    everything = len(quick.rows.train) == len(calibrating.rows.train)
    if everything and quick.quantization == calibrating.quantization:
        return gate.candidate(), gate.table()
    chosen = gate.chosen
    return calibrating.candidate(chosen, rotations[chosen.rotate], clock), gate.table()


def _smoothed_setups(base: Setup) -> list[Setup]:
    """``base`` with its activations smoothed, without its prefix and then with it."""
    prefixes = dict.fromkeys(((), base.prefix))
    return [replace(base, prefix=prefix, smoothing=SMOOTHING) for prefix in prefixes]
