"""A streaming histogram of bounded size whose merging is exact.

**Bins.** A float64 number is sign, exponent and mantissa; the exponent and the first 10 bits of the
mantissa, read as one integer, are its *code*. Codes are ordered like the magnitudes, and one code
is one bin: each octave [2^e, 2^(e+1)) has 1024 bins of equal width, so a bin is at most 2^-10 of
its values wide, however heavy the tail. Kept are the bins of the 16 octaves up to that of the
largest magnitude, for both signs; what is smaller shares bin 0.

**Merging.** When a larger octave comes, every bin moves down by 1024 places per octave, and what
falls below becomes part of bin 0:

    bin(x) = max(0, code(x) - base + 1),   max(0, max(0, c - b) - s) = max(0, c - b - s)   for s >=
    0

so the counts are those of a histogram that had known the largest octave from the start. Counts are
integers: any order of batches, and any split over processes, gives the same histogram bit for bit.

**Size.** 2 × 16385 counts, 262 kB.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.observers.extremes import Extremes
from calib.observers.statistics import take, widened

MANTISSA = 10
OCTAVES = 16
PER_OCTAVE = 1 << MANTISSA
BINS = 1 + OCTAVES * PER_OCTAVE
"""Bins of one sign; bin 0 holds what lies below the octaves."""
_SHIFT = 52 - MANTISSA
"""Mantissa bits of a float64 that a code leaves out."""
_CHUNK = 1 << 22
"""Values that are binned at once; each takes about 40 bytes on the way."""


class Histogram:
    """Counts of values by sign and magnitude.

    Attributes:
        extremes: the exact least and greatest value.
        zeros: how many values were exactly zero; they are counted in bin 0 as well.
        counts: int64 [2, BINS]: negative values by magnitude, and the others.
    """

    def __init__(self) -> None:
        self.extremes = Extremes()
        self.zeros = 0
        self.counts = torch.zeros((2, BINS), dtype=torch.int64)
        # the exponent field of the highest octave; that of no less than 2^-1007
        self._top = OCTAVES

    @property
    def count(self) -> int:
        """Values added so far."""
        return self.extremes.count

    @property
    def amax(self) -> float:
        """The largest magnitude, exact."""
        return float(torch.maximum(-self.extremes.low, self.extremes.high))

    def add(self, x: Tensor) -> None:
        """Count the values of ``x``."""
        self.extremes.add(x)
        self._raise_to(int(_codes(torch.tensor(self.amax, dtype=torch.float64))) >> MANTISSA)
        for part in torch.split(x.flatten(), _CHUNK):
            chunk = widened(part)
            bins = (_codes(chunk) - (self._base - 1)).clamp_(min=0).add_((chunk >= 0).long() * BINS)
            self.counts += torch.bincount(bins, minlength=2 * BINS).cpu().view(2, BINS)
            self.zeros += int((chunk == 0).sum())

    def merge(self, other: Histogram) -> None:
        """Add the counts of ``other``."""
        self._raise_to(other._top)
        self.counts += _lowered(other.counts, self._top - other._top)
        self.zeros += other.zeros
        self.extremes.merge(other.extremes)

    def state(self) -> dict[str, Tensor]:
        """``counts``, ``top``, ``zeros`` and the state of the extremes."""
        more = {"top": torch.tensor(self._top), "zeros": torch.tensor(self.zeros)}
        return {"counts": self.counts, **more, **self.extremes.state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved :meth:`state`."""
        self.counts, top, zeros, *extremes = take(
            state, "counts", "top", "zeros", "low", "high", "count"
        )
        self.extremes.load_state(dict(zip(("low", "high", "count"), extremes, strict=True)))
        self._top, self.zeros = int(top), int(zeros)

    def edges(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper edge of every bin of magnitudes, [BINS] each; a bin holds its lower
        edge.
        """
        codes = self._base + np.arange(-1, BINS, dtype=np.int64)
        edges = (codes << _SHIFT).view(np.float64)
        edges[0] = 0
        return edges[:-1], edges[1:]

    def signed_edges(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Lower edge, upper edge and count of every bin from the most negative up, [2 BINS]
        each.
        """
        lower, upper = self.edges()
        negative, positive = self.counts.numpy()
        counts = np.concatenate([negative[::-1], positive])
        return np.concatenate([-upper[::-1], lower]), np.concatenate([-lower[::-1], upper]), counts

    def points(self) -> tuple[Tensor, Tensor]:
        """One value, float64 ascending, for each bin that is not empty, and its count.

        The value is the middle of the bin as far as it lies within the extremes, so a single value
        stands for itself; in bin 0, where nearly everything is zero as a rule, it is zero.
        """
        lower, upper, counts = self.signed_edges()
        middle = (lower + upper) / 2
        middle[BINS - 1 : BINS + 1] = 0
        values = torch.from_numpy(middle[counts > 0]).clamp(self.extremes.low, self.extremes.high)
        return values, torch.from_numpy(counts[counts > 0])

    def linear(self) -> tuple[NDArray[np.int64], float]:
        """Magnitudes other than zero in bins of equal width from zero up to the largest, and that
        width.

        The width is that of the bins of the highest octave, which those below refine: between 1024
        and 2048 bins.
        """
        lower, upper = self.edges()
        width = float(upper[-1]) / (2 * PER_OCTAVE)
        counts = self.counts.sum(0).numpy()
        counts[0] -= self.zeros
        result = np.zeros(2 * PER_OCTAVE, dtype=np.int64)
        np.add.at(result, (lower / width).astype(np.int64), counts)
        return result[: int(self.amax / width) + 1], width

    @property
    def _base(self) -> int:
        """The code of bin 1."""
        return (self._top - OCTAVES + 1) << MANTISSA

    def _raise_to(self, top: int) -> None:
        if top > self._top:
            self.counts = _lowered(self.counts, top - self._top)
            self._top = top


def _codes(x: Tensor) -> Tensor:
    """Exponent and leading mantissa bits of each magnitude; float64 to int64."""
    return x.abs().view(torch.int64) >> _SHIFT


def _lowered(counts: Tensor, octaves: int) -> Tensor:
    """``counts`` with every bin moved down by ``octaves``."""
    places = min(octaves * PER_OCTAVE, BINS - 1)
    if places == 0:
        return counts
    result = torch.zeros_like(counts)
    result[:, : BINS - places] = counts[:, places:]
    result[:, 0] += counts[:, :places].sum(dim=1)
    return result
