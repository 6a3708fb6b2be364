"""Rung 0, of static scales of inputs and of the cache: what held-out text uses of the range that
was calibrated, and clips.

A scale is right or wrong against inputs alone: no rung that compares two readers of the same scale
sees that it is twice too large. What is looked at is the *use* of a linear's range,

    use = max |x| over held-out inputs / largest magnitude that the range holds,

of the rotated float model, whose inputs calibration saw as well.

Both maxima are of the same text, of ``m`` held-out and ``n`` calibration values. Values whose tail
falls exponentially, slower than a Gaussian's, have ``max ~ log(count)``, so that

    use ~ log m / log n

and lighter tails come closer to one. A scale wrong by two makes half or twice of that. The bounds
lie between: a use below ``log m / log n / 2^0.5`` is too little, one above ``2^0.75`` is clipped
(and the other way round where ``m > n``). A single linear may be
beyond them and right: a massive token may be in one text only. So the share of linears beyond is
judged, and a quarter of them may be. Observers that clip on purpose are held to the lower bound
only, and text of another kind than that of calibration to none.

Two more rules see what a quarter hides. Linears that read one tensor have one scale
(:mod:`exporter.parity.shared_inputs`), without any text. And of a kind, the attention outputs say,
no more than half of the layers may be beyond ``2^0.75``, either way: where one layer's range is
stretched by a token, those of most others are not. Drawn 2000 times from the rows of a text, at 1
to 16 rows against 1 to 8, the middle use of a kind stayed within 0.67 and 1.36. Not so of the input
of down projections, a product of two activations, whose tokens reach all layers: of a 5M Llama its
middle use was 0.34 to 1.96 at 0.1 % each, with nothing wrong. A range of these that is three times
too wide, or of a single layer, cannot be told by its use from one that a text made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from calib.architectures import Space, wiring_of
from calib.modules.watch import watching
from calib.schemes import PerTensor, TensorScheme
from exporter.parity.rows import row
from exporter.parity.subject import Subject
from exporter.reporting.report import ParityRow

MAX_SHARE = 0.25
"""Of the linears that may be beyond the bounds."""
TOO_LITTLE, TOO_MUCH = 2**0.5, 2**0.75
"""Half-way, in the logarithm, to a scale that is twice too large; three quarters of the way to one
that is half of what it should be, for the few tokens of a short calibration are exceeded by more
than they are fallen short of."""
KIND_SHARE = 0.5
"""Of the layers, as above, for one kind of linear."""
KIND_APART = 2**0.75
"""Either way; see above."""
_CALIBRATES_MAX = "min_max"
_GIVEN = "fixed_scale"
"""The observer whose scales somebody has given, whatever inputs are."""
_NAME = "static ranges on held-out inputs"
_CACHE_NAME = "static ranges of the cache on held-out inputs"
_KIND_NAME = "static ranges of one kind on held-out inputs"
_SHARE = "share of ranges that do not fit"


@dataclass
class Use:
    """What held-out values made of one static range."""

    scheme: TensorScheme
    scale: Tensor
    zero_point: Tensor | None
    largest: float = 0.0
    """Largest magnitude of a value, over that of the range."""
    width: int = 0
    """Features of an input."""
    values: int = 0
    clipped: int = 0
    """Of :attr:`values`, those beyond the range by more than half a step."""

    def look(self, x: Tensor) -> None:
        """Take note of values ``[..., width]``."""
        fmt = self.scheme.format
        steps = x.detach().float() / self.scale.float().to(x.device)
        low, high = -fmt.maxbound, fmt.maxbound
        if self.zero_point is not None:
            steps, low, high = steps + self.zero_point.float().to(x.device), fmt.qmin, fmt.qmax
        middle = (low + high) / 2
        used = float((steps - middle).abs().amax()) / (high - middle)
        self.largest = max(self.largest, used)
        self.width = x.shape[-1]
        self.values += steps.numel()
        self.clipped += int(((steps > high + 0.5) | (steps < low - 0.5)).sum())


@dataclass(frozen=True)
class Ranges:
    """What looks at the values that static ranges are for."""

    uses: dict[str, Use]
    """What it has seen, by the name of the linear, or of keys and values."""
    inputs: dict[str, Callable[[Tensor], None]]
    """By the name of the linear."""
    caches: dict[str, Callable[[Tensor, Tensor], None]]
    """By the name of the attention."""


def static_ranges(subject: Subject, modules: Collection[str]) -> Ranges:
    """Those of ``subject``: of linears with one static input scale, and of its cache.

    Args:
        subject: the export.
        modules: names of the modules of its float model. Experts that are none are passed over.
    """
    ranges = Ranges({}, {}, {})
    for name, linear in subject.quantized.linears.items():
        scheme, scale = linear.input_scheme, linear.input_scale
        if name not in modules or scheme is None or scale is None or scheme.dynamic:
            continue
        if isinstance(scheme.granularity, PerTensor):
            ranges.uses[name] = Use(scheme, scale, linear.input_zero_point)
            ranges.inputs[name] = partial(_look, ranges.uses[name])

    cache = subject.quantized.cache
    wiring = wiring_of(subject.quantized.config)
    for layer in () if cache is None else cache.key_scale:
        assert cache is not None
        attention = wiring.attention(layer)
        keys = Use(cache.scheme, cache.key_scale[layer], None)
        values = Use(cache.scheme, cache.value_scale[layer], None)
        ranges.uses[f"keys of {attention}"] = keys
        ranges.uses[f"values of {attention}"] = values
        ranges.caches[attention] = partial(_look_at_cache, keys, values)
    return ranges


@contextmanager
def ranges_watched(subject: Subject, rotated: nn.Module) -> Iterator[dict[str, Use]]:
    """Within the block, whatever runs ``rotated``, the float model, on held-out rows fills the
    :attr:`Ranges.uses`.
    """
    ranges = static_ranges(subject, {name for name, _ in rotated.named_modules()})
    with watching(rotated, inputs=ranges.inputs, caches=ranges.caches, optional=True):
        yield ranges.uses


def _look(use: Use, x: Tensor) -> None:
    use.look(x)


def _look_at_cache(keys: Use, values: Use, key: Tensor, value: Tensor) -> None:
    keys.look(key)
    values.look(value)


def range_rows(subject: Subject, uses: dict[str, Use]) -> list[ParityRow]:
    """The share of ranges that are wrong, and the largest share of values that one clips: of the
    inputs of linears, and of the cache.
    """
    seen = {name: use for name, use in uses.items() if use.values}
    inputs = {name: use for name, use in seen.items() if name in subject.quantized.linears}
    cache = {name: use for name, use in seen.items() if name not in inputs}
    return [
        *_rows(_NAME, subject, inputs),
        *_kind_rows(subject, inputs),
        *_rows(_CACHE_NAME, subject, cache),
    ]


def _rows(what: str, subject: Subject, seen: Mapping[str, Use]) -> list[ParityRow]:
    if not seen:
        return []
    least, most = _right(subject, seen, TOO_LITTLE, TOO_MUCH)
    beyond = [name for name, use in seen.items() if not least <= use.largest <= most]
    # one massive token is forgiven, however few the ranges are
    bound = max(MAX_SHARE, 1 / len(seen)) if _is_judged(subject) else None

    ordered = sorted(seen, key=lambda name: seen[name].largest)
    low, middle, high = (seen[ordered[index]].largest for index in (0, len(ordered) // 2, -1))
    note = (
        f"{len(seen)} ranges; used {low:.2f} to {high:.2f} of them, in the middle {middle:.2f};"
        f" right is {least:.2f} to {most:.2f}"
    )
    worst = max(seen, key=lambda name: seen[name].clipped / seen[name].values)
    share = seen[worst].clipped / seen[worst].values
    return [
        row(0, what, _SHARE, len(beyond) / len(seen), bound, note),
        row(0, what, "share of values clipped", share, None, f"worst: {worst}"),
    ]


def _kind_rows(subject: Subject, seen: Mapping[str, Use]) -> list[ParityRow]:
    """The largest share of layers that are beyond in one kind of linear, of those with more than
    one layer; inputs of down projections are none of them.
    """
    wiring = wiring_of(subject.quantized.config)
    kinds: dict[str, list[Use]] = {}
    for name, use in seen.items():
        spec = wiring.by_name.get(name)
        if spec is not None and spec.layer is not None and spec.reads is not Space.FFN:
            kind = name.removeprefix(f"{wiring.block(spec.layer)}.")
            kinds.setdefault(kind, []).append(use)
    several = {kind: uses for kind, uses in kinds.items() if len(uses) > 1}
    if not several:
        return []

    least, most = _right(subject, seen, KIND_APART, KIND_APART)
    shares = {
        kind: sum(not least <= use.largest <= most for use in uses) / len(uses)
        for kind, uses in several.items()
    }
    worst = max(shares, key=lambda kind: shares[kind])
    note = f"worst: {worst}; right is {least:.2f} to {most:.2f}"
    bound = KIND_SHARE if _is_judged(subject) else None
    return [row(0, _KIND_NAME, _SHARE, shares[worst], bound, note)]


def _observer(subject: Subject) -> str:
    recipe = subject.quantized.provenance.recipe
    return str(recipe.get("activations", {}).get("observer", _CALIBRATES_MAX))


def _is_judged(subject: Subject) -> bool:
    """Not where the scales were given, nor on text of another kind than that of calibration."""
    other_text = subject.quantized.provenance.recipe.get("evaluation", {}).get("dataset")
    return other_text is None and not _observer(subject).startswith(_GIVEN)


def _right(
    subject: Subject, seen: Mapping[str, Use], too_little: float, too_much: float
) -> tuple[float, float]:
    """The least and the greatest use that is right, by how far it may be from what is expected."""
    expected = _expected_use(subject, seen)
    most = max(1.0, expected) * too_much if _observer(subject) == _CALIBRATES_MAX else math.inf
    return min(1.0, expected) / too_little, most


def _expected_use(subject: Subject, seen: Mapping[str, Use]) -> float:
    """``log m / log n``, of the narrowest range."""
    narrowest = min(seen.values(), key=lambda use: use.width)
    calibrated = subject.quantized.provenance.calibration_tokens * narrowest.width
    return math.log(max(2, narrowest.values)) / math.log(max(2, calibrated))
