"""From rotations to a quantized model: fuse, smooth, calibrate; once, or once for each set of
rotations that the gate compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from calib.architectures.experts import with_parameters
from calib.artifact import Provenance, QuantizedModel
from calib.data.batches import length_batches
from calib.data.forward_loop import ForwardLoop, forward_loop_over
from calib.data.rows import RowSplits
from calib.fusing import FusedModel, materialize
from calib.measure.perplexity import model_logits
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import Quantization
from calib.rotations.rotation_set import RotationSet
from calib.smoothing.groups import groups_of
from calib.smoothing.methods import smoothing_named
from calib.smoothing.observe import observe_channels
from calib.smoothing.smooth import smooth
from exporter.reporting.report import GateRow
from exporter.run.gate import Candidate, choose
from exporter.run.inputs import Inputs
from exporter.run.quantizing import folds_norms
from exporter.run.stopwatch import Stopwatch


@dataclass(frozen=True)
class Calibrating:
    """How a set of rotations becomes a quantized model; the same for all that are compared."""

    inputs: Inputs
    quantization: Quantization
    rows: RowSplits
    """Calibrates on ``train``; the gate decides on ``gate``."""
    provenance: Provenance

    @property
    def fold_norms(self) -> bool:
        """Whether norms are folded also without R1."""
        return folds_norms(self.inputs.recipe, self.quantization)

    def candidate(self, name: str, rotations: RotationSet, clock: Stopwatch) -> Candidate:
        """The model with ``rotations`` folded in, smoothed and quantized.

        Args:
            name: what the report calls it.
            rotations: all of them; the online ones run while it is calibrated.
            clock: times the stages.
        """
        fused = self.inputs.fuse(rotations, clock, fold_norms=self.fold_norms)
        fused = self._smoothed(fused, clock)
        return Candidate(name, fused, self.quantized(fused, clock))

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
        return smoothed

    def _forward_loop(self, clock: Stopwatch) -> ForwardLoop:
        batches = length_batches(self.rows.train, self.inputs.recipe.calibration.batch_size)
        return forward_loop_over(batches, progress=clock.progress)


def best_candidate(
    sets: Mapping[str, RotationSet], calibrating: Calibrating, clock: Stopwatch
) -> tuple[Candidate, list[GateRow]]:
    """The quantized model of the best of ``sets``, and the gate's table where there was a choice.

    Args:
        sets: rotations by what the report calls them, the simplest first.
        calibrating: what is done with each.
        clock: times the stages.
    """
    if len(sets) == 1:
        ((name, rotations),) = sets.items()
        return calibrating.candidate(name, rotations, clock), []

    # The sets are compared with weights rounded to nearest; the weight algorithm, which takes
    # longer than everything else, is run for the chosen one alone.
    chosen = calibrating.quantization
    quick = replace(calibrating, quantization=replace(chosen, weights="rtn"))
    original = model_logits(calibrating.inputs.source.original(calibrating.inputs.device))
    candidate, table = choose(
        list(sets),
        lambda name: quick.candidate(name, sets[name], clock),
        original,
        calibrating.rows.gate,
        clock.progress,
    )
    if quick.quantization != chosen:
        candidate = replace(candidate, quantized=calibrating.quantized(candidate.fused, clock))
    return candidate, table
