"""What a parity check compares, and the sessions that run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from backends.base import Backend, LoadsUnrounded, ProbedModel, RuntimeMissing, RuntimeModel
from calib.artifact import QuantizedModel
from calib.fusing import FusedModel
from exporter.reporting.report import PROOF_ROWS, PROOF_TOKENS
from exporter.source import Source

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Missing:
    """A session that this machine cannot open."""

    reason: str


@dataclass(frozen=True)
class Sessions:
    """The written folder, opened in its runtime, in each mode when that is first asked for."""

    backend: Backend
    target: str
    folder: Path

    @cached_property
    def exact(self) -> RuntimeModel | Missing:
        """With arithmetic as written; see :meth:`forget_exact`."""
        return _opened(lambda: self.backend.load(self.folder, self.target, exact=True))

    @cached_property
    def default(self) -> RuntimeModel | Missing:
        """As a user runs it."""
        return _opened(lambda: self.backend.load(self.folder, self.target, exact=False))

    def unrounded(self) -> RuntimeModel | Missing | None:
        """Without the rounding of activations, opened anew and not kept; ``None`` where the backend
        has no such session.
        """
        backend = self.backend
        if not isinstance(backend, LoadsUnrounded):
            return None
        return _opened(lambda: backend.load_unrounded(self.folder, self.target))

    def probed(self) -> ProbedModel | Missing:
        """With its linears in the open; opened anew and not kept."""
        return _opened(lambda: self.backend.load_probed(self.folder, self.target))

    def forget_exact(self) -> None:
        """Give the memory of :attr:`exact` back: rung 3 has no use for it."""
        vars(self).pop("exact", None)


@dataclass(frozen=True)
class Subject:
    """What is compared."""

    quantized: QuantizedModel
    """In the dtype that the target computes in."""
    backend: Backend
    target: str
    folder: Path
    rows: Sequence[Tensor]
    """Held-out token rows, int64 ``[tokens]``."""
    source: Source | None
    """The original; ``None`` where it is not at hand: rungs 1 and 3 cannot be run then."""
    fused: FusedModel | None
    """The rotated float model; ``None`` with ``source``."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of what ``folder`` should hold:
    :func:`exporter.parity.stored.kept_digests`; empty: unknown."""
    device: torch.device | str = "cpu"
    last: bool = False
    """Whether the logits of the last token alone were written."""

    @cached_property
    def proof_rows(self) -> list[Tensor]:
        """Of :attr:`rows`, those that rungs 1 and 2 run: see :func:`chosen_rows`."""
        return chosen_rows(self.rows)

    @cached_property
    def nbytes(self) -> int:
        """Of the model in float32, as each that is compared holds it."""
        weights = [linear.weight for linear in self.quantized.linears.values()]
        numbers = sum(tensor.numel() for tensor in (*weights, *self.quantized.floats.values()))
        return numbers * torch.float32.itemsize

    @property
    def short(self) -> bool:
        """Whether the target computes in a dtype that rounds where float32 does not."""
        return self.quantized.dtype != torch.float32

    @property
    def dtype_name(self) -> str:
        """What the target computes in, in words."""
        return str(self.quantized.dtype).removeprefix("torch.")


def chosen_rows(
    rows: Sequence[Tensor], tokens: int = PROOF_TOKENS, least: int = PROOF_ROWS
) -> list[Tensor]:
    """A few of ``rows``, in their order, that ask of a model what all of them ask.

    Whether two programs compute the same is a matter of positions and of tokens. So the longest row
    is taken, and then always the one with the most tokens that are in none of those taken.

    Args:
        rows: token rows ``[tokens]``.
        tokens: how many are wanted at least.
        least: the fewest rows.
    """
    left = dict(enumerate(rows))
    seen: set[int] = set()
    taken: list[int] = []
    while left and (len(taken) < least or sum(rows[index].numel() for index in taken) < tokens):
        news = {index: len(set(row.tolist()) - seen) for index, row in left.items()}
        if taken:
            best = max(left, key=lambda index: news[index])
        else:
            best = max(left, key=lambda index: (rows[index].numel(), news[index]))
        seen |= set(left.pop(best).tolist())
        taken.append(best)
    return [rows[index] for index in sorted(taken)]


def _opened(load: Callable[[], Loaded]) -> Loaded | Missing:
    try:
        return load()
    except RuntimeMissing as error:
        return Missing(error.message)
