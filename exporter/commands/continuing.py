"""Continuing token by token, from the cache of what was run before.

Keys and values of the tokens that the cache holds are kept: of the ids of a new text only those are
run that come after the longest beginning that both have in common,

    run = ids[c:],    c = min(|ids| - 1, common length of ids and the tokens in the cache).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exporter.parity.behaviour import Forward, common_length


@dataclass
class Speed:
    """Of one answer."""

    read: int = 0
    """Tokens that were run before the first token came: what the cache did not hold."""
    written: int = 0
    """Tokens of the answer, the last one, which ends it, among them."""
    first: float = 0.0
    """Seconds until the first token."""
    rest: float = 0.0
    """Seconds for the others."""

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first; ``None`` where there is none."""
        return (self.written - 1) / self.rest if self.written > 1 and self.rest > 0 else None


@dataclass
class Continuing:
    """A model and the cache of the tokens that it has seen last. Not for several threads."""

    forward: Forward
    speed: Speed = field(default_factory=Speed, init=False)
    """Of the last continuation."""
    _cached: list[int] = field(default_factory=list, init=False)
    _past: list[Tensor] = field(default_factory=list, init=False)

    def tokens(self, ids: list[int], choose: Callable[[Tensor], int], most: int) -> Iterator[int]:
        """Up to ``most`` ids that follow ``ids``, each as soon as it is known.

        Args:
            ids: all tokens before.
            choose: the next token, from logits ``[vocabulary]``.
            most: how many.
        """
        common = min(len(ids) - 1, common_length(ids, self._cached))
        if not self._past:  # no cache: everything is run again
            common = 0
        past = [tensor[:, :, :common] for tensor in self._past] if common else []
        entering, self.speed = ids[common:], Speed(read=len(ids) - common)
        started = time.perf_counter()
        while True:
            length = common + len(entering)
            logits, past = self.forward(
                torch.tensor([entering]),
                torch.ones(1, length, dtype=torch.long),
                torch.arange(common, length).unsqueeze(0),
                past or None,
            )
            token = choose(logits[0, -1])
            self._past, self._cached = past, [*ids[:length]]
            now = time.perf_counter()
            if self.speed.written == 0:
                self.speed.first, started = now - started, now
            self.speed.written += 1
            self.speed.rest = now - started
            yield token

            if self.speed.written == most:
                return
            ids = [*ids, token]
            common, entering = (length, [token]) if past else (0, ids)
