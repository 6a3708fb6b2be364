"""From statistics to limits: the rules that need no search."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from calib.capture.statistics import ChannelStatistics
from calib.observers.extremes import Extremes, MovingExtremes
from calib.observers.histogram import Histogram
from calib.observers.moments import Moments
from calib.observers.statistics import Limits
from calib.schemes import TensorScheme
from calib.stats.clusters import channel_features, cluster_channels, cluster_limits, expand_clusters


def min_max_limits(extremes: Extremes | MovingExtremes) -> Limits:
    """The extremes as they are."""
    return extremes.low, extremes.high


def clip_limits(extremes: Extremes, bound: float) -> Limits:
    """The extremes, clipped to -bound … bound."""
    return extremes.low.clamp(-bound, bound), extremes.high.clamp(-bound, bound)


def fixed_scale_limits(extremes: Extremes, scale: float, scheme: TensorScheme) -> Limits:
    """The limits from which :func:`calib.arithmetic.grids.grid_of` makes exactly ``scale``, with
    zero point 0.
    """
    fmt = scheme.format
    low, high = (-fmt.maxbound, fmt.maxbound) if scheme.symmetric else (fmt.qmin, fmt.qmax)
    return torch.full_like(extremes.low, scale * low), torch.full_like(extremes.high, scale * high)


def clip_std_limits(moments: Moments, k: float) -> Limits:
    """mean ± k std, as far as values were seen there."""
    low, high = moments.extremes.low, moments.extremes.high
    reach = k * moments.std
    return (moments.mean - reach).clamp(low, high), (moments.mean + reach).clamp(low, high)


def clustered_limits(moments: Moments, clusters: int) -> Limits:
    """The extremes of each channel's cluster ``[channels]``; see :mod:`calib.stats.clusters`."""
    low, high = moments.extremes.low, moments.extremes.high
    channels = ChannelStatistics(moments.count // len(low), moments.mean, moments.std, low, high)
    labels = cluster_channels(channel_features(channels), clusters)
    of_clusters = cluster_limits(low, high, labels, clusters)
    return expand_clusters(of_clusters[0], labels), expand_clusters(of_clusters[1], labels)


def percentile_limits(histogram: Histogram, p: float, scheme: TensorScheme) -> Limits:
    """The least limits that hold p % of the values, up to one bin (2^-10 of the limit) wide of
    that.

        symmetric:   p % of the magnitudes are <= t;                     low = -t, high = t
        asymmetric:  p % of the values are <= high, p % are >= low       (each tail may lose 100 - p
        %)

    Both as far as values were seen there; p = 100 gives the exact extremes.
    """
    rank = math.ceil(Fraction(str(p)) * histogram.count / 100)
    low, high = histogram.extremes.low, histogram.extremes.high
    if scheme.symmetric:
        reached = np.searchsorted(np.cumsum(histogram.counts.sum(0).numpy()), rank)
        return symmetric_limits(histogram, float(histogram.edges()[1][reached]))
    lower, upper, counts = histogram.signed_edges()
    last = np.searchsorted(np.cumsum(counts), rank)
    first = len(counts) - 1 - np.searchsorted(np.cumsum(counts[::-1]), rank)
    return within(float(lower[first]), low, high), within(float(upper[last]), low, high)


def symmetric_limits(histogram: Histogram, threshold: float) -> Limits:
    """-threshold … threshold, as far as values were seen there."""
    low, high = histogram.extremes.low, histogram.extremes.high
    return low.clamp(-threshold, threshold), high.clamp(-threshold, threshold)


def within(value: float, low: Tensor, high: Tensor) -> Tensor:
    """``value`` moved into low … high; float64 ``[]``."""
    return torch.tensor(value, dtype=torch.float64).clamp(low, high)
