"""The parts of a capture: the statistics and the sampled tokens that R1 and R2 are computed
from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calib.capture.sites import CaptureConfig
from calib.capture.statistics import ChannelStatistics
from calib.errors import DataError


@dataclass(frozen=True)
class Samples:
    """Sampled tokens with weights that make weighted sums unbiased; see
    :mod:`calib.capture.reservoir`.

    Attributes:
        values: [..., S, n] in the dtype of the activations; massive tokens first, otherwise in
            random order.
        weights: [..., S] float32. Their sum over S is the number of tokens (times ``group``) that
            were seen.
        massive: how many of the S entries, the first ones, belong to massive tokens.
        group: how many consecutive entries come from one token: the query heads that share a
            key/value head.
    """

    values: Tensor
    weights: Tensor
    massive: int
    group: int = 1

    def layer(self, index: int) -> Samples:
        """The samples of one layer of stacked ones: entry ``index`` of the first dimension."""
        return Samples(self.values[index], self.weights[index], self.massive, self.group)

    def split(self, fraction: float) -> tuple[Samples, Samples]:
        """Split into a part to train on and a held-out part of about ``fraction`` of the tokens.

        Massive and other tokens are split alike, each at least by one token, and the entries of one
        token stay together. The weights of each part are scaled so that its weighted sums stand for
        all tokens, too.

        Raises:
            DataError: ``fraction`` is not inside (0, 1), or too few tokens were kept.
        """
        entries = self.values.shape[-2]
        strata = [(0, self.massive), (self.massive, entries)]
        cuts = [start + self._held_entries(stop - start, fraction) for start, stop in strata]
        if not 0 < fraction < 1 or cuts == [0, self.massive]:
            raise DataError(
                f"cannot hold out {fraction} of {entries // self.group} sampled tokens",
                hint=(
                    "The fraction must lie between 0 and 1; capture more tokens with --nsamples or"
                    " --seqlen."
                ),
            )
        held = [(start, cut) for (start, _), cut in zip(strata, cuts, strict=True)]
        train = [(cut, stop) for (_, stop), cut in zip(strata, cuts, strict=True)]
        return self._take(train, strata), self._take(held, strata)

    def _held_entries(self, entries: int, fraction: float) -> int:
        tokens = entries // self.group
        return min(max(1, round(fraction * tokens)), tokens - 1) * self.group if tokens > 1 else 0

    def _take(self, parts: list[tuple[int, int]], strata: list[tuple[int, int]]) -> Samples:
        values, weights = [], []
        for (start, stop), (first, last) in zip(parts, strata, strict=True):
            values.append(self.values[..., start:stop, :])
            weights.append(self.weights[..., start:stop] * ((last - first) / max(1, stop - start)))
        return Samples(
            torch.cat(values, -2), torch.cat(weights, -1), parts[0][1] - parts[0][0], self.group
        )


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics and samples of one space: the residual (R1), or one layer's values (R2).

    For R1 there are no leading dimensions and n is the hidden size; all sites are pooled. For R2
    the leading dimension is the key/value head, n is ``head_dim``, and the query heads of a group
    are pooled.

    Attributes:
        channels: counts and vectors [..., n].
        covariance: [..., n, n] float64, of the population, about the mean.
        samples: values [..., S, n] and weights [S].
    """

    channels: ChannelStatistics
    covariance: Tensor
    samples: Samples

    @property
    def second_moment(self) -> Tensor:
        """[..., n, n] float64: the mean of x xᵀ, about zero. A rotation does not centre, so this is
        what it sees.
        """
        mean = self.channels.mean
        return self.covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2)


@dataclass(frozen=True)
class Provenance:
    """Where a capture comes from, so that it is never used for something else.

    Attributes:
        model: :func:`calib.capture.fingerprint.model_fingerprint` of the model.
        data_sha256: :func:`calib.data.tokens.token_hash` of the rows.
        rows: rows of calibration data.
        tokens: tokens in them.
        config: the settings.
        prefix: ids of the tokens that stood before every row.
    """

    model: str
    data_sha256: str
    rows: int
    tokens: int
    config: CaptureConfig
    prefix: tuple[int, ...] = ()
