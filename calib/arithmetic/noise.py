"""Which of several candidates to take, where a figure of each was measured on the same units: the
simplest of those that are within noise of the best. How the figures were measured is of no concern
here.

A unit ``u`` (a row of tokens, a token, a row of a weight) of size ``n_u`` adds a share ``s_cu`` to
the figure of candidate ``c``, which is ``F_c = sum_u s_cu``; less is better. Other units would have
given other figures, so the lowest one alone says little. But what makes a unit hard is hard for all
candidates, and is not in their differences. Against the candidate ``b`` with the lowest figure

    d_u = s_cu - s_bu,    margin D = sum_u d_u = F_c - F_b >= 0.

If the candidates differed by as much everywhere, ``d_u`` would be ``D n_u / N``, with the sum ``N``
of all sizes. What it is beyond that is noise, and of ``m`` independent units ``D`` has the variance
(Cochran, Sampling Techniques, 1977, chapter 6)

    v = m / (m - 1) sum_u e_u^2,    e_u = d_u - D n_u / N.

Its interval is ``D ± t sqrt(v)``, ``t`` being Student's quantile with ``m - 1`` degrees of freedom
for :data:`LEVEL`; with units of equal size that is the paired t test (Student, Biometrika 6, 1908).
Where units come from several independent samples, their variances add, and the degrees of freedom
are ``(sum v)^2 / sum(v^2 / (m - 1))`` (Welch, Biometrika 34, 1947).

``c`` is within noise of ``b`` where the interval reaches zero. Of one unit nothing is known of the
noise: its variance counts as zero, so that the lowest figure is taken, and only of equal ones the
simplest. All sums are rounded once (``math.fsum``), whatever their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

LEVEL = 0.95
"""How often an interval holds what it is about."""

Name = TypeVar("Name")


@dataclass(frozen=True)
class Sample:
    """Units that were drawn independently."""

    shares: Sequence[float]
    """What each adds to a figure."""
    sizes: Sequence[float] | None = None
    """Of each, all together more than zero, the same for all candidates; ``None``: they are
    equal."""


@dataclass(frozen=True)
class Margin:
    """How far a figure is above the lowest one, and the interval of that."""

    value: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """Whether nothing says that the figure is higher."""
        return self.low <= 0


def figure(samples: Sequence[Sample]) -> float:
    """The sum over all units."""
    return math.fsum(share for sample in samples for share in sample.shares)


def margins(measured: Mapping[Name, Sequence[Sample]]) -> dict[Name, Margin]:
    """How far each candidate is above the one with the lowest figure; of equals that is the first.

    Args:
        measured: of each candidate, finite, on the same units in the same order; of each sample
            that units are from.

    Raises:
        ValueError: the samples, or the units, of two candidates are not as many.
    """
    figures = {name: figure(own) for name, own in measured.items()}
    best = min(figures, key=lambda name: figures[name])
    return {name: _margin(own, measured[best]) for name, own in measured.items()}


def simplest(found: Mapping[Name, Margin]) -> Name:
    """The first candidate that is within noise of the best.

    Args:
        found: of :func:`margins`, the simplest candidate first.
    """
    return next(name for name, margin in found.items() if margin.within_noise)


def variance(sample: Sample) -> float:
    """That of the sum of the shares of two units or more: ``v`` above."""
    count = len(sample.shares)
    sizes = sample.sizes or [1.0] * count
    per_size = math.fsum(sample.shares) / math.fsum(sizes)
    errors = [own - per_size * size for own, size in zip(sample.shares, sizes, strict=True)]
    return count * math.fsum(error**2 for error in errors) / (count - 1)


def quantile(freedom: float, level: float) -> float:
    """Of Student's t, for an interval with two ends that holds what it is about with the
    probability ``level``.
    """
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + level) / 2))


def _margin(own: Sequence[Sample], best: Sequence[Sample]) -> Margin:
    differences = [
        Sample([a - b for a, b in zip(mine.shares, other.shares, strict=True)], mine.sizes)
        for mine, other in zip(own, best, strict=True)
    ]
    value = figure(differences)
    variances = [
        (variance(sample), len(sample.shares) - 1)
        for sample in differences
        if len(sample.shares) > 1
    ]
    total = math.fsum(each for each, _ in variances)
    if total == 0:
        return Margin(value, value, value)
    freedom = total**2 / math.fsum(each**2 / less for each, less in variances)
    half = quantile(freedom, LEVEL) * math.sqrt(total)
    return Margin(value, value - half, value + half)
