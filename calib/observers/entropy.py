"""TensorRT's calibration by relative entropy (S. Migacz, "8-bit Inference with TensorRT", GTC
2017).

The magnitudes are binned from zero up. For each number of bins i, clipping after bin i gives two
distributions over those bins:

    P  the reference: the counts, with everything beyond bin i added to the last Q  the counts
    merged into as many groups as the format has magnitudes, each group's sum then spread evenly
    over
       those of its bins that are not empty

and the threshold is the upper edge of the bin i for which KL(P ‖ Q) is least; of equal ones, the
largest. Values that are exactly zero are left out: every threshold keeps them, and on sparse
activations their spike would hide the rest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calib.observers.histogram import Histogram
from calib.observers.rules import symmetric_limits
from calib.observers.statistics import Limits
from calib.schemes import NumberFormat


def entropy_limits(histogram: Histogram, fmt: NumberFormat) -> Limits:
    """The symmetric threshold of least relative entropy, as far as values were seen there.

    Args:
        histogram: not empty.
        fmt: an integer format.
    """
    if histogram.amax == 0:
        return symmetric_limits(histogram, 0.0)
    counts, width = histogram.linear()
    groups = 1 << (fmt.bits - 1)
    divergences = relative_entropies(counts, groups)
    bins = len(counts) - int(np.argmin(divergences[::-1]))
    return symmetric_limits(histogram, histogram.amax if bins == len(counts) else bins * width)


def relative_entropies(counts: NDArray[np.int64], groups: int) -> NDArray[np.float64]:
    """KL(P ‖ Q) in nats after clipping to i bins, for every i from ``groups`` to all of them.

    Args:
        counts: magnitudes in bins of equal width, at least ``groups`` of them.
        groups: magnitudes of the format (128 for int8).
    """
    below = np.cumsum(counts)
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    result = np.full(len(counts) - groups + 1, np.inf)
    for i in range(groups, len(counts) + 1):
        outliers = below[-1] - below[i - 1]
        if below[i - 1] == 0 or (outliers and counts[i - 1] == 0):
            continue  # P has mass where Q has none
        starts = -(-np.arange(groups) * i // groups)  # bin b belongs to group floor(b groups / i)
        ends = np.append(starts[1:], i)
        sums = below[ends - 1] - np.where(starts > 0, below[starts - 1], 0)
        spread = sums / np.maximum(filled[ends] - filled[starts], 1)
        q = np.repeat(spread, ends - starts)
        p = counts[:i].astype(np.float64)
        p[-1] += outliers
        present = p > 0
        p, q = p[present] / below[-1], q[present] / below[i - 1]
        result[i - groups] = np.sum(p * np.log(p / q))
    return result
