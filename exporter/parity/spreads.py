"""What rung 1 shows beside its figure: how the inputs of linears are spread before and after
rotation, and what quantization does to each linear by itself.

Nothing of it is judged. Both float models run a few held-out rows once more; a histogram has a bin
for every half of ``log2 |x|``, so that two bins are a bit of range.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from calib.architectures import Wiring, reading_groups, wiring_of
from calib.artifact import QuantizedLinear
from calib.measure.perplexity import model_logits
from calib.measure.reference import LazyReferenceLinear
from calib.modules.watch import watching
from exporter.parity.subject import Subject
from exporter.reporting.evidence import (
    BINS,
    HIGHEST_LOG2,
    LOWEST_LOG2,
    Evidence,
    InputFigures,
    NoiseFigure,
    Spread,
)

TOKENS = 512
"""Of held-out text that both models run."""
NOISE_TOKENS = 128
"""Of these, on which each linear is quantized."""
CHANNELS = 256
"""Largest magnitudes that are kept of one input; of more channels, those of neighbours together."""


@dataclass
class _Seen:
    """What has passed through one place."""

    square: float = 0.0
    values: int = 0
    histogram: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    channels: Tensor | None = None
    tokens: list[Tensor] = field(default_factory=list)

    def look(self, x: Tensor) -> None:
        """Take note of values ``[..., width]``."""
        flat = x.detach().reshape(-1, x.shape[-1]).float().abs()
        if not flat.numel():
            return
        bits = flat.log2().clamp_(LOWEST_LOG2, HIGHEST_LOG2)
        self.histogram += torch.histc(bits.cpu(), BINS, LOWEST_LOG2, HIGHEST_LOG2).long()
        self.square += float(flat.double().square().sum())
        self.values += flat.numel()
        largest = flat.amax(0)
        self.channels = largest if self.channels is None else self.channels.maximum(largest)
        self.tokens.append(flat.amax(1))

    def spread(self, *, whole: bool) -> Spread:
        """The figures; histogram and channels where they are asked for."""
        assert self.channels is not None
        tokens, channels = torch.cat(self.tokens), self.channels
        return Spread(
            absmax=float(channels.amax()),
            rms=(self.square / self.values) ** 0.5,
            token_ratio=_over_median(tokens),
            channel_ratio=_over_median(channels),
            histogram=self.histogram.tolist() if whole else None,
            channels=_thinned(channels) if whole else [],
        )


def _over_median(magnitudes: Tensor) -> float:
    """The largest over the median; over the smallest normal float where that is zero."""
    least = torch.finfo(torch.float32).tiny
    ratio = float(magnitudes.amax().double() / magnitudes.double().median().clamp(min=least))
    return min(ratio, torch.finfo(torch.float32).max)


def _thinned(channels: Tensor) -> list[float]:
    size = -(-channels.numel() // CHANNELS)
    return [float(f"{float(part.amax()):.4g}") for part in torch.split(channels, size)]


@dataclass
class _Noise:
    """One linear, quantized and not, on the same inputs."""

    reference: LazyReferenceLinear
    error: float = 0.0
    power: float = 0.0
    left: int = NOISE_TOKENS

    def look(self, x: Tensor, output: Tensor) -> None:
        """Take note of an input ``[..., in]``, after any online rotation, and its output."""
        x, output = (each.reshape(-1, each.shape[-1])[: self.left] for each in (x, output))
        self.left -= x.shape[0]
        if not x.numel():
            return
        expected = output.double()
        given = self.reference.matmul(self.reference.quantize(x.float())).double()
        self.error += float((given - expected).square().sum())
        self.power += float(expected.square().sum())


def evidence_of(
    subject: Subject, original: nn.Module, rotated: nn.Module, rows: Sequence[Tensor]
) -> Evidence:
    """What both models show on ``rows``.

    Args:
        subject: the export.
        original: the float model of its source.
        rotated: the same after rotation, its parameters in float32 while it runs.
        rows: token rows ``[tokens]``; of these, the first :data:`TOKENS` tokens.
    """
    wiring = wiring_of(subject.quantized.config)
    linears = subject.quantized.linears
    firsts = dict(_first_readers(wiring, linears))
    before = _spreads(original, firsts, rows, {})
    modules = dict(rotated.named_modules())
    noise = {
        name: _Noise(LazyReferenceLinear(linear, None))
        for name, linear in linears.items()
        # experts in one parameter are no modules with a weight
        if name in wiring.by_name and isinstance(getattr(modules.get(name), "weight", None), Tensor)
    }
    after = _spreads(rotated, firsts, rows, noise)

    kept = _kept(firsts, before, after)
    return Evidence(
        inputs=[
            InputFigures(
                name=name,
                kind=kind,
                layer=layer,
                original=before[name].spread(whole=name in kept) if name in before else None,
                rotated=after[name].spread(whole=name in kept),
            )
            for name, (kind, layer) in firsts.items()
            if name in after
        ],
        noise=[
            NoiseFigure(name=name, kind=kind, layer=layer, noise=(seen.error / seen.power) ** 0.5)
            for name, seen in noise.items()
            if seen.power
            for kind, layer in [_kind(wiring, name)]
        ],
    )


def _first_readers(
    wiring: Wiring, linears: Mapping[str, QuantizedLinear]
) -> Iterator[tuple[str, tuple[str, int]]]:
    """The first quantized linear of each layer's tensors, with its kind and layer."""
    for group in reading_groups(wiring):
        name = next((name for name in group if name in linears), None)
        if name is not None and name in wiring.by_name:
            kind, layer = _kind(wiring, name)
            if layer >= 0:
                yield name, (kind, layer)


def _kind(wiring: Wiring, name: str) -> tuple[str, int]:
    """The name within its layer, and that layer; -1 outside the layers."""
    layer = wiring.by_name[name].layer
    if layer is None:
        return name, -1
    return name.removeprefix(f"{wiring.block(layer)}."), layer


def _spreads(
    model: nn.Module,
    names: Mapping[str, object],
    rows: Sequence[Tensor],
    noise: Mapping[str, _Noise],
) -> dict[str, _Seen]:
    """What passes through the inputs of these linears, as far as ``model`` has such modules."""
    modules = {name for name, _ in model.named_modules()}
    seen = {name: _Seen() for name in names if name in modules}
    logits = model_logits(model)
    left = TOKENS
    with watching(
        model,
        inputs={name: each.look for name, each in seen.items()},
        outputs={name: each.look for name, each in noise.items()},
        optional=True,
    ):
        for ids in rows:
            if left <= 0:
                break
            logits(ids[:left].unsqueeze(0))
            left -= ids.numel()
    return {name: each for name, each in seen.items() if each.values}


def _kept(
    firsts: Mapping[str, tuple[str, int]], before: Mapping[str, _Seen], after: Mapping[str, _Seen]
) -> set[str]:
    """Of each kind, the input that is hardest to quantize: the one whose largest token is farthest
    from the median one, in the original where that has it.
    """
    worst: dict[str, tuple[float, str]] = {}
    for name, (kind, _) in firsts.items():
        seen = before.get(name) or after.get(name)
        if seen is not None and name in after:
            ratio = _over_median(torch.cat(seen.tokens))
            worst[kind] = max(worst.get(kind, (0.0, "")), (ratio, name))
    return {name for _, name in worst.values()}
