"""Ways to run an export: prefill, and decode with the cache and a padded batch against the
reference on the rows alone.

A folder with the logits of the last token only is compared on those: each found ``[B, n, V]`` is
held against the last ``n`` positions of what is expected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from backends.base import RuntimeModel
from calib.measure.floor import Difference
from calib.measure.perplexity import LogitsFunction

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DECODE_STEPS = 64
_DECODE_ROWS, _DECODE_PREFIX = 4, 16
PADDED_ROWS = 3

Pass = Callable[[RuntimeModel, LogitsFunction, Sequence[Tensor]], float]
"""Relative L2 of a runtime's logits against the reference's over token rows."""


def steady_length(found: PretrainedConfig) -> int | None:
    """Up to how many tokens a model rotates queries and keys by the same frequencies; ``None``:
    always.

    Beyond that (longrope, dynamic NTK) a text in a longer batch, and one that grew from its cache,
    are not the same text alone: transformers does not make them so either.
    """
    parameters = getattr(found, "rope_parameters", None) or {}
    by_layer_type = [each for each in parameters.values() if isinstance(each, dict)]
    limits = {
        "longrope": lambda rope: rope["original_max_position_embeddings"],
        "dynamic": lambda rope: found.max_position_embeddings,
    }
    steady = [
        int(limits[rope["rope_type"]](rope))
        for rope in by_layer_type or [parameters]
        if rope.get("rope_type") in limits
    ]
    return min(steady, default=None)


def prefill_logits(runtime: RuntimeModel) -> LogitsFunction:
    """A whole row at once: from token ids ``[1, T]`` to logits ``[1, T, V]``, or those of the last
    tokens.
    """
    return lambda ids: _run(runtime, ids)[0]


def decode(runtime: RuntimeModel, reference: LogitsFunction, rows: Sequence[Tensor]) -> float:
    """A short prefill, then one token at a time from the cache."""
    length = min(_DECODE_PREFIX + DECODE_STEPS, max(row.numel() for row in rows))
    ids = torch.stack([row[:length] for row in rows if row.numel() >= length][:_DECODE_ROWS])
    stepped = _stepped(runtime, ids, min(_DECODE_PREFIX, length - 1))
    difference = Difference()
    for row, logits in zip(ids, stepped, strict=True):
        difference.add(logits, reference(row.unsqueeze(0))[0, -logits.shape[0] :])
    return difference.value


def padded(runtime: RuntimeModel, reference: LogitsFunction, rows: Sequence[Tensor]) -> float:
    """Rows of different lengths in one left-padded batch, against the reference on each row
    alone.
    """
    cut = [
        row[: max(2, row.numel() * (index + 1) // PADDED_ROWS)]
        for index, row in enumerate(rows[:PADDED_ROWS])
    ]

    longest = max(row.numel() for row in cut)
    ids = torch.stack([nn.functional.pad(row, (longest - row.numel(), 0)) for row in cut])
    mask = torch.stack(
        [nn.functional.pad(torch.ones_like(row), (longest - row.numel(), 0)) for row in cut]
    )

    logits, _ = runtime.forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
    difference = Difference()
    for row, computed in zip(cut, logits, strict=True):
        real = min(row.numel(), computed.shape[0])
        difference.add(computed[-real:], reference(row.unsqueeze(0))[0, -real:])
    return difference.value


def runtime_logits(runtime: RuntimeModel) -> LogitsFunction:
    """An exported model as a function from token ids ``[1, T]`` to logits ``[1, T, V]``.

    One that gives the logits of the last token only is run token by token from its cache.
    """

    def run(ids: Tensor) -> Tensor:
        logits, _ = _run(runtime, ids)
        return logits if logits.shape[1] == ids.shape[1] else _stepped(runtime, ids, 1)

    return run


def _run(runtime: RuntimeModel, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    return runtime.forward(ids, torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids))


def _stepped(runtime: RuntimeModel, ids: Tensor, prefix: int) -> Tensor:
    """Logits of ``prefix`` tokens of ``ids`` ``[B, T]`` at once (or of the last of them), then of
    each further one.
    """
    mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids)
    logits, past = _run(runtime, ids[:, :prefix])
    steps = [logits]
    for step in range(prefix, ids.shape[1]):
        here = slice(step, step + 1)
        logits, past = runtime.forward(ids[:, here], mask[:, : step + 1], positions[:, here], past)
        steps.append(logits)
    return torch.cat(steps, dim=1)
