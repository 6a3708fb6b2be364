"""From rotations to a quantized model: fuse, put the prefix in place, smooth, calibrate; once, or
once for each candidate that the gate compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from calib.architectures.experts import with_parameters
from calib.artifact import Provenance, QuantizedModel
from calib.data.batches import length_batches
from calib.data.forward_loop import ForwardLoop, forward_loop_over
from calib.data.rows import RowSplits
from calib.fusing import FusedModel, materialize, with_prefix
from calib.measure.perplexity import model_logits
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import Quantization
from calib.rotations.rotation_set import RotationSet
from calib.smoothing.groups import groups_of
from calib.smoothing.methods import smoothing_named
from calib.smoothing.observe import observe_channels
from calib.smoothing.smooth import smooth
from calib.stats.massive import PrefixChoice
from exporter.reporting.report import GateRow
from exporter.run.gate import Candidate, Setup, choose
from exporter.run.inputs import Inputs
from exporter.run.stopwatch import Stopwatch


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

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids of the prefix."""
        return () if self.prefix is None else self.prefix.tokens

    def setups(self, rotates: Iterable[str]) -> list[Setup]:
        """What the gate compares, the simplest first.

        A prefix that is only offered (``auto``) is also left out once, without a rotation: to show
        what it is worth, and because it changes the float model.

        Args:
            rotates: sets of rotations, by what the report calls them, the simplest first.
        """
        setups = [Setup(rotate, self.tokens) for rotate in rotates]
        offered = self.inputs.recipe.prefix == "auto" and self.tokens
        return [*([Setup(setups[0].rotate)] if offered else []), *setups]

    def candidate(self, setup: Setup, rotations: RotationSet, clock: Stopwatch) -> Candidate:
        """The model with ``rotations`` folded in, smoothed and quantized.

        Args:
            setup: says whether there is a prefix.
            rotations: all of them; the online ones run while it is calibrated.
            clock: times the stages.
        """
        fused = self._prefixed(self.inputs.fuse(rotations, clock), setup.prefix)
        fused = self._smoothed(fused, clock)
        return Candidate(setup, fused, self.quantized(fused, clock))

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

    def _prefixed(self, fused: FusedModel, tokens: Sequence[int]) -> FusedModel:
        reason = "" if self.prefix is None else self.prefix.reason
        return with_prefix(fused, tokens, reason, self.inputs.device)

    def _smoothed(self, fused: FusedModel, clock: Stopwatch) -> FusedModel:
        method = smoothing_named(self.inputs.recipe.smoothing)
        if method is None:
            return fused

        device = self.inputs.device
        schemes = with_parameters(self.quantization.linears, fused.wiring)
        with clock.stage("smooth"):
            groups = groups_of(fused.wiring, fused.rotations, schemes)
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
        return forward_loop_over(batches, progress=clock.progress)


def best_candidate(
    sets: Mapping[str, RotationSet], calibrating: Calibrating, clock: Stopwatch
) -> tuple[Candidate, list[GateRow]]:
    """The quantized model of the best candidate, and the gate's table where there was a choice.

    Args:
        sets: rotations by what the report calls them, the simplest first.
        calibrating: what is done with each.
        clock: times the stages.
    """
    setups = calibrating.setups(sets)
    if len(setups) == 1:
        (setup,) = setups
        return calibrating.candidate(setup, sets[setup.rotate], clock), []

    # The candidates are compared with weights rounded to nearest; the weight algorithm, which takes
    # longer than everything else, is run for the chosen one alone.
    chosen = calibrating.quantization
    quick = replace(calibrating, quantization=replace(chosen, weights="rtn"))
    original = model_logits(calibrating.inputs.source.original(calibrating.inputs.device))
    candidate, table = choose(
        setups,
        lambda setup: quick.candidate(setup, sets[setup.rotate], clock),
        original,
        calibrating.rows.gate,
        clock.progress,
    )
    if quick.quantization != chosen:
        candidate = replace(candidate, quantized=calibrating.quantized(candidate.fused, clock))
    return candidate, table
