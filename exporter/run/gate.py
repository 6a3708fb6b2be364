"""The gate: quantize candidates, each compared with the float model, from what costs nothing at run
time to what does, until one is close enough.

Rotating can hurt: R1 and R2 alone may worsen static INT8, and on some models nothing helps. A
prefix makes another float model, which may be worth what it saves and may not. So nothing is
assumed. Every candidate goes through the same calibration, and the mean KL(float ‖ quantized) of
the whole model on held-out tokens, which neither trained a rotation nor set a scale, decides.

The KL of a candidate is what it adds to the logarithm of the perplexity on text that the float
model writes. So one whose KL is half of the logarithm of the bound is taken to hold the bound on
other text, and nothing that costs more at run time is tried. Of all that were tried the lowest KL
wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from calib.artifact import QuantizedModel
from calib.fusing import FusedModel
from calib.measure.perplexity import LogitsFunction, compare_logits, model_logits
from calib.measure.reference import build_reference
from calib.progress import Progress, track
from exporter.reporting.report import GateRow

MARGIN = 0.5
"""Share of the logarithm of the bound on perplexity that a candidate may use up."""


@dataclass(frozen=True)
class Setup:
    """What a candidate is made of; ``str()`` is what the report calls it."""

    rotate: str
    """Its rotations, as the report calls them."""
    prefix: tuple[int, ...] = ()
    """Ids of the tokens before every sequence."""
    wider: tuple[str, ...] = ()
    """Linears whose input gets a wider form than the scheme's."""
    norms_kept: bool = False
    """Whether norms keep their gains although the scheme would have them folded."""
    smoothing: str = "none"
    """What smooths although the recipe asks for nothing."""
    online: bool = False
    """Whether a rotation is computed at run time."""

    @property
    def cost(self) -> int:
        """What it costs at run time, for comparison: nothing, an online rotation, and then as much
        more as there are wider inputs."""
        return int(self.online) + (1 + len(self.wider) if self.wider else 0)

    def __str__(self) -> str:
        return self.row().name

    def row(self) -> GateRow:
        """Its row in the report while it is not tried."""
        return GateRow(
            rotate=self.rotate,
            norms_kept=self.norms_kept,
            smoothing=self.smoothing,
            prefix=len(self.prefix),
            wider=len(self.wider),
        )


@dataclass(frozen=True)
class Candidate:
    """A setup, fused and quantized."""

    setup: Setup
    fused: FusedModel
    quantized: QuantizedModel


@dataclass
class Gate:
    """Candidates on held-out tokens. Only the best so far is kept in memory."""

    make: Callable[[Setup], Candidate]
    """Fuses and quantizes one of them."""
    original: LogitsFunction
    """Logits of the float model."""
    rows: Sequence[Tensor]
    """Held-out token rows."""
    bound: float
    """Of the perplexity ratio: what the exported model is held to."""
    _best: Candidate | None = field(default=None, init=False)
    _table: dict[Setup, GateRow] = field(default_factory=dict, init=False)

    @property
    def best(self) -> Candidate:
        """The one with the lowest KL."""
        assert self._best is not None  # something was judged
        return self._best

    @property
    def enough(self) -> float:
        """The KL at which nothing dearer is tried, in nats per token."""
        return MARGIN * math.log(self.bound)

    @property
    def met(self) -> bool:
        """Whether a candidate is close enough."""
        return self._met_below(math.inf)

    def lowest(self, rotates: Collection[str]) -> Setup | None:
        """Of those tried whose rotations are among ``rotates`` the one with the lowest KL."""
        tried = {
            setup: row.kl
            for setup, row in self._table.items()
            if setup.rotate in rotates and row.kl is not None
        }
        return min(tried, key=lambda setup: tried[setup], default=None)

    def run(self, setups: Sequence[Setup], progress: Progress) -> None:
        """Judge all that cost the same, and go on to what costs more while nothing is close enough.

        Args:
            setups: of equals the first wins, so begin with the simplest.
            progress: called after every candidate.
        """
        costs = sorted({setup.cost for setup in setups})
        for setup in track(
            sorted(setups, key=lambda setup: setup.cost), "gate", len(setups), progress
        ):
            if setup.cost == costs[0] or not self._met_below(setup.cost):
                self._judge(setup)
            else:
                self._table[setup] = setup.row()

    def table(self) -> list[GateRow]:
        """The rows of the report."""
        return [
            row.model_copy(update={"chosen": setup == self.best.setup})
            for setup, row in self._table.items()
        ]

    def _met_below(self, cost: float) -> bool:
        """Whether a candidate that costs less than ``cost`` is close enough."""
        return any(
            row.kl is not None and row.kl <= self.enough
            for setup, row in self._table.items()
            if setup.cost < cost
        )

    def _judge(self, setup: Setup) -> None:
        candidate = self.make(setup)
        window = max(row.numel() for row in self.rows)
        reference = model_logits(build_reference(candidate.quantized))
        result = compare_logits(self.original, reference, self.rows, window=window, stride=window)
        kls = [
            row.kl for row in self._table.values() if row.kl is not None and math.isfinite(row.kl)
        ]
        if all(result.kl < kl for kl in kls):
            self._best = candidate
        figures = {"kl": result.kl, "top1": result.top1, "perplexity": result.candidate.value}
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        self._table[setup] = setup.row().model_copy(update=finite)
