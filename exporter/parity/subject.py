"""What a parity check compares, and the sessions that run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from backends.base import Backend, ProbedModel, RuntimeMissing, RuntimeModel
from calib.artifact import QuantizedModel
from calib.fusing import FusedModel
from exporter.source import Source

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Missing:
    """A session that this machine cannot open."""

    reason: str


@dataclass(frozen=True)
class Sessions:
    """The written folder, opened in its runtime at most once in each mode."""

    backend: Backend
    target: str
    folder: Path

    @cached_property
    def exact(self) -> RuntimeModel | Missing:
        """With arithmetic as written."""
        return _opened(lambda: self.backend.load(self.folder, self.target, exact=True))

    @cached_property
    def default(self) -> RuntimeModel | Missing:
        """As a user runs it."""
        return _opened(lambda: self.backend.load(self.folder, self.target, exact=False))

    @cached_property
    def probed(self) -> ProbedModel | Missing:
        """With its linears in the open."""
        return _opened(lambda: self.backend.load_probed(self.folder, self.target))


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
    device: torch.device | str = "cpu"
    last: bool = False
    """Whether the logits of the last token alone were written."""

    @property
    def short(self) -> bool:
        """Whether the target computes in a dtype that rounds where float32 does not."""
        return self.quantized.dtype != torch.float32

    @property
    def dtype_name(self) -> str:
        """What the target computes in, in words."""
        return str(self.quantized.dtype).removeprefix("torch.")


def _opened(load: Callable[[], Loaded]) -> Loaded | Missing:
    try:
        return load()
    except RuntimeMissing as error:
        return Missing(error.message)
