"""The gate: quantize candidates, each compared with the float model, from what costs nothing at run
time to what does, until one is close enough.

Rotating can hurt: R1 and R2 alone may worsen static INT8, and on some models nothing helps. A
prefix makes another float model, which may be worth what it saves and may not. So nothing is
assumed. Every candidate goes through the same calibration, and the mean KL(float ‖ quantized) of
the whole model on held-out tokens, which neither trained a rotation nor set a scale, decides.

The KL of a candidate is what it adds to the logarithm of the perplexity on text that the float
model writes. So one whose KL is half of the logarithm of the bound is taken to hold the bound on
other text: it is *close enough*. Two rules follow, one for what is tried, one for what is taken:

1. With ``KL_c`` of candidate ``c``, its cost ``k_c`` at run time and ``e = MARGIN ln(bound)``,
   ``c`` is tried unless some ``c'`` with ``k_c' < k_c`` has ``KL_c' <= e``. Of what costs least
   everything is tried.
2. Of those tried, let ``b`` have the lowest KL, and ``E`` be all with ``KL_c <= e``, or all of them
   where there is none. Taken is the simplest ``c`` of ``E`` whose KL is within noise of ``KL_b``,
   by the differences row by row (:mod:`calib.arithmetic.noise`). A row with the mean ``KL_cr`` over
   its ``n_r`` tokens adds ``n_r KL_cr / sum_r n_r`` to ``KL_c``, and its size is ``n_r``.

``b`` is always in ``E``, so that something is taken, and nothing that misses ``e`` where something
holds it. What is simple is said by :attr:`Setup.simplicity`. So the noise of a few rows, or of sums
that other threads add in another order, does not choose what costs more; what remains is the
candidate that happens to lie on an edge: of its interval, or of ``e``. One row shows no noise: the
lowest KL is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from calib.arithmetic.noise import Sample, margins, simplest
from calib.artifact import QuantizedModel
from calib.fusing import FusedModel
from calib.measure.perplexity import LogitsFunction, compare_logits, model_logits
from calib.measure.reference import build_reference
from calib.process.progress import track
from calib.rotations.rotate import GateSet
from exporter.reporting.report import GateRow
from exporter.run.stopwatch import Stopwatch

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
    trained: bool = False
    """Whether a rotation is a matrix that was trained."""
    kinds: int = 0
    """How many kinds of rotations it has."""

    @classmethod
    def of(cls, rotations: GateSet, prefix: tuple[int, ...] = ()) -> Setup:
        """That of a set of rotations, behind a prefix."""
        rotate = rotations.rotate
        return cls(
            str(rotations),
            prefix,
            online=rotate.online,
            trained=rotations.trained,
            kinds=len(rotate.certain),
        )

    @property
    def cost(self) -> int:
        """What it costs at run time, for comparison: nothing, an online rotation, and then as much
        more as there are wider inputs."""
        return int(self.online) + (1 + len(self.wider) if self.wider else 0)

    @property
    def simplicity(self) -> tuple[int, ...]:
        """Less is simpler: what is computed and kept at run time counts first, then what has to be
        done to the model.
        """
        return (
            self.cost,
            len(self.prefix),
            self.smoothing != "none",
            self.trained,
            self.kinds,
            self.norms_kept,
        )

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


Measure = Callable[[], GateRow]


def _anew(setup: Setup, measure: Measure) -> GateRow:
    return measure()


@dataclass
class Gate:
    """Candidates on held-out tokens. Only the one that would be taken is kept in memory."""

    make: Callable[[Setup], Candidate]
    """Fuses and quantizes one of them."""
    original: LogitsFunction
    """Logits of the float model."""
    rows: Sequence[Tensor]
    """Held-out token rows."""
    bound: float
    """Of the perplexity ratio: what the exported model is held to."""
    clock: Stopwatch = field(default_factory=Stopwatch)
    """Times the comparison, and is told of each candidate."""
    remember: Callable[[Setup, Measure], GateRow] = _anew
    """Gives the row of a candidate: one that was kept, or what measuring it now gives."""
    _made: Candidate | None = field(default=None, init=False)
    _table: dict[Setup, GateRow] = field(default_factory=dict, init=False)

    @property
    def chosen(self) -> Setup:
        """The simplest one within noise of the best."""
        setup = self.chosen_among({setup.rotate for setup in self._table})
        assert setup is not None  # something was judged
        return setup

    @property
    def enough(self) -> float:
        """The KL at which nothing dearer is tried, in nats per token."""
        return MARGIN * math.log(self.bound)

    @property
    def met(self) -> bool:
        """Whether a candidate is close enough."""
        return self._met_below(math.inf)

    def chosen_among(self, rotates: Collection[str]) -> Setup | None:
        """As :attr:`chosen`, of those alone whose rotations are among ``rotates``; ``None`` where
        none of them was tried.
        """
        tried = {
            setup: row.kl
            for setup, row in self._table.items()
            if setup.rotate in rotates and row.kl is not None
        }
        eligible = [setup for setup, kl in tried.items() if kl <= self.enough] or list(tried)
        ordered = sorted(eligible, key=lambda setup: setup.simplicity)
        if not ordered:
            return None
        return simplest(margins({setup: [_sample(self._table[setup])] for setup in ordered}))

    def candidate(self) -> Candidate:
        """The chosen one, made anew unless it is still in memory."""
        made = self._made
        return made if made is not None and made.setup == self.chosen else self.make(self.chosen)

    def run(self, setups: Sequence[Setup]) -> None:
        """Judge all that cost the same, and go on to what costs more while nothing is close enough.

        Args:
            setups: of equally simple ones the first wins.
        """
        costs = sorted({setup.cost for setup in setups})
        ordered = sorted(setups, key=lambda setup: setup.cost)
        total = len(self._table) + len(setups)
        for setup in track(ordered, "gate", len(setups), self.clock.progress):
            if setup.cost == costs[0] or not self._met_below(setup.cost):
                with self.clock.within(f"gate {len(self._table) + 1}/{total} {setup}"):
                    self._judge(setup)
            else:
                self._table[setup] = setup.row()

    def table(self) -> list[GateRow]:
        """The rows of the report."""
        tried = {s: [_sample(row)] for s, row in self._table.items() if row.kl is not None}
        found, chosen = margins(tried), self.chosen
        return [
            row.model_copy(
                update={
                    "margin": found[setup].value,
                    "margin_low": found[setup].low,
                    "margin_high": found[setup].high,
                    "chosen": setup == chosen,
                }
            )
            if setup in found
            else row
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
        made: list[Candidate] = []

        def measure() -> GateRow:
            made.append(self.make(setup))
            return self._measured(made[0])

        self._table[setup] = self.remember(setup, measure)
        if self._made is None or self._made.setup != self.chosen:
            self._made = next((each for each in made if setup == self.chosen), None)

    def _measured(self, candidate: Candidate) -> GateRow:
        window = max(row.numel() for row in self.rows)
        with self.clock.stage("gate"):
            reference = model_logits(build_reference(candidate.quantized))
            result = compare_logits(
                self.original, reference, self.rows, window=window, stride=window
            )
        perplexity = result.candidate.value
        return candidate.setup.row().model_copy(
            update={
                "kl": result.kl,
                "top1": result.top1,
                "perplexity": perplexity if math.isfinite(perplexity) else None,
                "row_kls": list(result.row_kls),
                "row_tokens": list(result.row_tokens),
            }
        )


def _sample(row: GateRow) -> Sample:
    """What each held-out row adds to the KL of a candidate."""
    tokens = sum(row.row_tokens)
    shares = [kl * own / tokens for kl, own in zip(row.row_kls, row.row_tokens, strict=True)]
    return Sample(shares, row.row_tokens)
