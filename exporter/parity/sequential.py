"""How many rows rung 3 needs: it goes on until its figures are beyond doubt.

The figures are means over the tokens of rows that were drawn at random, one after the other. With
``v_i`` the sum of a figure over the ``n_i`` tokens of row ``i``, of ``m`` rows,

    r = sum v_i / sum n_i,    var r = m / (m - 1) sum (v_i - r n_i)^2 / (sum n_i)^2

(:func:`calib.arithmetic.noise.variance` of ``sum v_i``, over the tokens squared), and with
Student's quantile ``t`` of ``m - 1`` degrees of freedom the interval is ``r ± t sqrt(var r)``. A
figure is settled once that holds none of its bound, on whichever side; where none has a bound, all
rows are scored.

The interval is looked at after every row from :data:`LEAST_ROWS` on, so each look may err seldom:
:data:`LEVEL` leaves one in two thousand for the side of the bound. A wrong verdict before the last
row takes one of the ``m - 8`` looks before it, and has a probability of ``(m - 8) / 2000`` at most
(union bound): 1.2 % for 32 rows, the default, and 10 % for 208. It is an error of a verdict close
to its bound; the figure that is reported is the mean in any case.

What the rows that are left out would have shown is what they alone show, strongly enough to move
the mean over all: tokens or positions that the export gets wrong altogether. That is asked for
elsewhere: every row of an embedding is compared by itself (rungs 0 and 1), and rung 2 runs the rows
that are chosen for their tokens and their length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from calib.arithmetic.noise import Sample, quantile, variance
from calib.errors import DataError
from calib.measure.perplexity import Comparison, LogitsFunction, Perplexity, compare_logits

LEAST_TOKENS, LEAST_ROWS = 2000, 8
"""What is scored whatever the interval says: fewer rows do not show how much rows vary."""
LEVEL = 0.999
"""How often an interval holds what it is about."""


@dataclass(frozen=True)
class Mean:
    """A mean over tokens, and half the width of its interval; infinite for a single row."""

    value: float
    half: float

    def settles(self, bound: float) -> bool:
        """Whether the interval does not hold ``bound``."""
        return abs(self.value - bound) > self.half


@dataclass
class Scores:
    """Rows that were scored so far, each as :func:`~calib.measure.perplexity.compare_logits` of
    itself.
    """

    rows: list[Comparison] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return sum(self._weights())

    @property
    def reference(self) -> Perplexity:
        """Of the original."""
        return Perplexity(self._mean([row.reference.nll for row in self.rows]).value, self.tokens)

    @property
    def candidate(self) -> Perplexity:
        """Of the export."""
        return Perplexity(self._mean([row.candidate.nll for row in self.rows]).value, self.tokens)

    @property
    def log_ratio(self) -> Mean:
        """Logarithm of the ratio of both perplexities."""
        return self._mean([row.candidate.nll - row.reference.nll for row in self.rows])

    @property
    def kl(self) -> Mean:
        """KL(original ‖ export), in nats per token."""
        return self._mean([row.kl for row in self.rows])

    @property
    def top1(self) -> float:
        """The share of tokens for which both predict the same."""
        return self._mean([row.top1 for row in self.rows]).value

    def settled(self, ratio_bound: float, kl_bound: float | None) -> bool:
        """Whether the rows so far decide both figures."""
        if self.tokens < LEAST_TOKENS or len(self.rows) < LEAST_ROWS:
            return False
        of_kl = kl_bound is None or self.kl.settles(kl_bound)
        return of_kl and self.log_ratio.settles(math.log(ratio_bound))

    def _weights(self) -> list[int]:
        return [row.reference.tokens for row in self.rows]

    def _mean(self, means: Sequence[float]) -> Mean:
        """Of figures that are the mean of a row each."""
        weights, count = self._weights(), len(means)
        total = sum(weights)
        value = math.fsum(mean * n for mean, n in zip(means, weights, strict=True)) / total
        if count < 2:
            return Mean(value, math.inf)
        shares = [mean * n for mean, n in zip(means, weights, strict=True)]
        deviation = math.sqrt(variance(Sample(shares, weights))) / total
        return Mean(value, quantile(count - 1, LEVEL) * deviation)


def score_until_settled(
    original: LogitsFunction,
    export: LogitsFunction,
    rows: Iterable[Tensor],
    ratio_bound: float,
    kl_bound: float | None,
) -> Scores:
    """Score ``rows`` in their order until both figures are settled, or to the last one.

    Args:
        original: logits of the float model.
        export: logits of what is judged.
        rows: token rows ``[tokens]``, drawn at random; those of one token are passed over.
        ratio_bound: of the ratio of perplexities.
        kl_bound: of the divergence, if it has one.

    Raises:
        DataError: no row has two tokens.
        QuantizationError: logits hold NaN or Inf.
    """
    scores = Scores()
    for row in rows:
        if row.numel() < 2:
            continue
        window = row.numel()
        scores.rows.append(compare_logits(original, export, [row], window=window, stride=window))
        if scores.settled(ratio_bound, kl_bound):
            break
    if not scores.rows:
        raise DataError(
            "there is no token to score",
            hint="Give evaluation text with two tokens or more in a row.",
        )
    return scores
