"""One fused model, looked at once, quantized by many schemes and algorithms.

What every scheme and every algorithm asks for (limits, second moments, channels of what smoothing
scales) is observed in one pass, and what smoothing changes of it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from calib.artifact import Provenance, QuantizedModel
from calib.data.forward_loop import ForwardLoop
from calib.fusing import FusedModel, materialize
from calib.quantizing.calibrator import Calibrator
from calib.quantizing.observation import Observed, Watchlist, observe
from calib.quantizing.plan import Quantization
from calib.schemes import INT8, PerTensor, TensorScheme
from calib.smoothing.groups import SmoothingGroup, smoothing_groups
from calib.smoothing.methods import smoothing_named
from calib.smoothing.observe import GroupInputs, observe_channels
from calib.smoothing.smooth import smooth

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
