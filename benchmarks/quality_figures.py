"""The figures of :mod:`benchmarks.quality`: one for each scheme, set of rotations and algorithm, as
a table, and those that the embedded model has to reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from calib.architectures import Kind
from calib.measure.perplexity import Comparison

PLAIN = "rtn"
KINDS: tuple[Kind, ...] = ("r1", "r2", "r4")
FULL = ",".join(KINDS)
INT4_G128 = "int4-weight-only g128"


@dataclass(frozen=True)
class Cell:
    """One scheme with one set of rotations and one algorithm."""

    scheme: str
    rotation: str
    """``none``, ``Hadamard`` or ``auto``."""
    rotate: str
    """The set that this was."""
    algorithm: str
    gate: float
    """KL(float || quantized) on the gate rows, in nats per token."""
    result: Comparison | None = None
    """On the evaluation rows, where it was measured there."""

    @property
    def gap(self) -> float:
        """Log-perplexity above float, in nats per token."""
        assert self.result is not None
        return self.result.candidate.nll - self.result.reference.nll

    @property
    def ratio(self) -> float:
        """Perplexity over float."""
        return math.exp(self.gap)

    @property
    def figures(self) -> str:
        """For the table: ratio, gap, and KL on the evaluation rows."""
        assert self.result is not None
        return f"{self.ratio:>8.4f} {self.gap:>8.4f} {self.result.kl:>8.4f}"


def show(cells: list[Cell], *, every: bool) -> None:
    """Print the rows of one scheme."""
    for rotation in dict.fromkeys(cell.rotation for cell in cells):
        some = [cell for cell in cells if cell.rotation == rotation]
        best = least(some)
        name = f"auto: {best.rotate}" if rotation == "auto" else rotation
        print(
            f"{best.scheme:<22} {name:<16} {some[0].figures}  {best.figures}  {best.algorithm}",
            flush=True,
        )
        for cell in some if every else ():
            print(f"{'':<68}{cell.figures}  {cell.algorithm}, gate KL {cell.gate:.5f}")


def acceptance(cells: list[Cell]) -> list[str]:
    """The four figures that the embedded model has to reach, as far as they were measured."""
    plain = {
        cell.scheme: cell for cell in cells if (cell.rotation, cell.algorithm) == ("none", PLAIN)
    }
    int8 = [
        cell
        for cell in cells
        if cell.scheme == "int8" and ("r4" in cell.rotate or "smooth" in cell.algorithm)
    ]
    float8 = [cell for cell in cells if cell.scheme == "float8"]
    int4 = [cell for cell in cells if (cell.scheme, cell.rotation) == (INT4_G128, "none")]
    searched = [cell for cell in int4 if cell.algorithm.startswith(("gptq", "awq"))]
    rounded = [cell for cell in cells if cell.scheme == "w4a4" and cell.algorithm == PLAIN]
    w4a4 = [cell for cell in rounded if cell.rotate.startswith(FULL)]
    lines = []
    for what, some, bound in (
        ("int8 with R4 or SmoothQuant: perplexity over float", int8, 1.01),
        ("float8: perplexity over float", float8, 1.01),
        (f"{INT4_G128} with GPTQ or AWQ, no rotation: gap over that of RTN", searched, 2 / 3),
        ("w4a4 with R1+R2+R4, RTN: gap over that without rotation", w4a4, 0.12),
    ):
        if some:
            best = least(some)
            value = best.ratio if bound > 1 else best.gap / plain[best.scheme].gap
            met = "pass" if value <= bound else "MISS"
            lines.append(
                f"{met}  {what} {value:.4f}, at most {bound:.4g} ({best.rotation},"
                f" {best.algorithm})"
            )
    return lines


def least(cells: Iterable[Cell]) -> Cell:
    """The cell that the gate prefers."""
    return min(cells, key=lambda cell: cell.gate)
