"""Does the export still compute the same? Three rungs, each with its own figure and bound.

1. The original float model against the rotated one: relative L2 of logits, at most 1e-5 in float32. The fold is exact.
2. The torch fake-quant reference, computed from the artifact alone, against the export *run in its runtime*.
   Each linear on identical inputs: at most 1e-5. End to end, where activations are quantized, rounding flips amplify,
   so the bound is twice the floor (:mod:`calib.floor`) of the same run; weight-only it is 1e-5.
3. The original float model against the export: KL divergence, top-1 agreement, perplexity. This is quality; the scheme
   says how much it may cost.

Relative L2 is ‖a − b‖ / ‖b‖ over all logits of all rows together. Never cosine: a scale wrong by two leaves it at 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backends.base import Backend, RuntimeModel
from calib.artifact import QuantizedModel
from calib.floor import Difference, one_flip_floor, split_sum_floor
from calib.fusing import FusedModel, materialize
from calib.perplexity import compare_logits, model_logits
from calib.progress import Progress
from calib.reference import ReferenceLinear, build_reference
from exporter.report import ParityRow
from exporter.source import Source

FOLD_BOUND = 1e-5
"""Rung 1 in float32: rotating in float64 and rounding once costs a few ulp (6e-8) per layer."""
LINEAR_BOUND = 1e-5
"""Rung 2, one linear: only the order of a float sum differs; 2e-7 is usual, 1e-5 leaves room for wide layers."""
FLOOR_FACTOR = 2.0
"""Rung 2, end to end: two right orders of summation are one floor apart; a runtime differs in every operator."""
WEIGHT_ONLY_BOUND = 1e-5
"""Rung 2, end to end, float activations: nothing is rounded on the way, so nothing amplifies."""

_PROBE_ROWS, _PROBE_TOKENS = 3, 64
_DECODE_ROWS, _DECODE_PREFIX, _DECODE_STEPS = 4, 16, 64
_PADDED_ROWS = 3


@dataclass(frozen=True)
class Subject:
    """What is compared."""

    quantized: QuantizedModel
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


def check_parity(subject: Subject, progress: Progress) -> list[ParityRow]:
    """Run all three rungs and judge them.

    Returns:
        One row for each figure, in the order of the rungs. Rungs that cannot be run are there with the reason.
    """
    rows: list[ParityRow] = []
    progress("parity", 0, 3)
    if subject.source is None or subject.fused is None:
        rows.append(_not_run(1, "original float vs rotated float", "relative L2"))
    else:
        rows.append(_rung1(subject, subject.source, subject.fused))
    progress("parity", 1, 3)
    rows += _rung2(subject)
    progress("parity", 2, 3)
    if subject.source is None:
        rows.append(_not_run(3, "original float vs exported", "perplexity ratio"))
    else:
        rows += _rung3(subject, subject.source)
    progress("parity", 3, 3)
    return rows


def _rung1(subject: Subject, source: Source, fused: FusedModel) -> ParityRow:
    original, rotated = source.original(subject.device), materialize(fused, device=subject.device).float()
    difference = Difference()
    for row in subject.rows:
        difference.add(_logits(rotated, row), _logits(original, row))
    exact = subject.quantized.dtype == torch.float32
    return _row(
        1,
        "original float vs rotated float",
        "relative L2",
        difference.value,
        FOLD_BOUND if exact else None,
        "" if exact else f"folded weights are rounded to {subject.quantized.dtype}: reported, not judged",
    )


def _rung2(subject: Subject) -> list[ParityRow]:
    reference = build_reference(subject.quantized)
    rows = [_linears_row(subject, reference)]
    floor, floor_rows = _end_to_end_bound(subject, reference)
    rows += floor_rows
    exact, default = (subject.backend.load(subject.folder, subject.target, exact=flag) for flag in (True, False))
    # One override may leave the input of a linear in float, whatever the scheme says of the others.
    weight_only = any(linear.input_scheme is None for linear in subject.quantized.linears.values())
    rows.append(_end_to_end("prefill, exact session", _prefill(exact, reference, subject.rows), floor))
    note = "the runtime quantizes activations to int8 of its own accord" if weight_only else ""
    measured = _prefill(default, reference, subject.rows)
    rows.append(_end_to_end("prefill, default session", measured, None if weight_only else floor, note))
    rows.append(_end_to_end("decode with cache, step by step", _decode(exact, reference, subject.rows), floor))
    rows.append(_end_to_end("batch of 3, left-padded", _padded(exact, reference, subject.rows), floor))
    fusion = subject.backend.fusion(subject.folder, subject.target)
    left = f"not fused: {', '.join(fusion.unfused[:3])}" if fusion.unfused else f"{fusion.quantized} linears fused"
    rows.append(_row(2, "linears left to dequantize at run time", "unfused", float(len(fusion.unfused)), 0.0, left))
    return rows


def _linears_row(subject: Subject, reference: nn.Module) -> ParityRow:
    """The worst linear of the runtime against torch, both fed what entered that linear in the runtime."""
    probed = subject.backend.load_probed(subject.folder, subject.target)
    differences = {name: Difference() for name in subject.quantized.linears}
    for row in subject.rows[:_PROBE_ROWS]:
        found = probed.probe(row[:_PROBE_TOKENS].unsqueeze(0), list(differences))
        for name, (entering, leaving) in found.items():
            linear = reference.get_submodule(name)
            assert isinstance(linear, ReferenceLinear)  # build_reference put it there
            differences[name].add(leaving, linear.matmul(linear.quantize(entering)))
    worst = max(differences, key=lambda name: differences[name].value)
    return _row(
        2, "each linear on identical inputs", "relative L2", differences[worst].value, LINEAR_BOUND, f"worst: {worst}"
    )


def _end_to_end_bound(subject: Subject, reference: nn.Module) -> tuple[float, list[ParityRow]]:
    """The bound of the end-to-end rows, and the rows that say where it comes from."""
    if all(linear.input_scheme is None for linear in subject.quantized.linears.values()):
        return WEIGHT_ONLY_BOUND, []
    split = split_sum_floor(subject.quantized, reference, subject.rows)
    note = f"torch against itself, sums in another order; flips in {split.flipped:.0%} of the rows"
    rows = [_row(2, "split-sum floor", "relative L2", split.value, None, note)]
    if split.representative:
        return FLOOR_FACTOR * split.value, rows
    flip = one_flip_floor(reference, subject.rows)
    rows.append(
        _row(2, "one-flip floor", "relative L2", flip, None, "flips are rare here: one value a row rounded over")
    )
    return FLOOR_FACTOR * max(split.value, flip), rows


def _prefill(runtime: RuntimeModel, reference: nn.Module, rows: Sequence[Tensor]) -> float:
    difference = Difference()
    for row in rows:
        ids = row.unsqueeze(0)
        logits, _ = runtime.forward(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None])
        difference.add(logits, _logits(reference, row))
    return difference.value


def _decode(runtime: RuntimeModel, reference: nn.Module, rows: Sequence[Tensor]) -> float:
    """A short prefill, then one token at a time from the cache, against the reference on the whole rows."""
    length = min(_DECODE_PREFIX + _DECODE_STEPS, max(row.numel() for row in rows))
    ids = torch.stack([row[:length] for row in rows if row.numel() >= length][:_DECODE_ROWS])
    prefix = min(_DECODE_PREFIX, length - 1)
    mask, positions = torch.ones_like(ids), torch.arange(length).expand_as(ids)
    logits, past = runtime.forward(ids[:, :prefix], mask[:, :prefix], positions[:, :prefix])
    steps = [logits]
    for step in range(prefix, length):
        here = slice(step, step + 1)
        logits, past = runtime.forward(ids[:, here], mask[:, : step + 1], positions[:, here], past)
        steps.append(logits)
    difference = Difference()
    for index, row in enumerate(torch.cat(steps, dim=1)):
        difference.add(row.unsqueeze(0), _logits(reference, ids[index]))
    return difference.value


def _padded(runtime: RuntimeModel, reference: nn.Module, rows: Sequence[Tensor]) -> float:
    """Rows of different lengths in one left-padded batch, against the reference on each row alone."""
    cut = [row[: max(2, row.numel() * (index + 1) // _PADDED_ROWS)] for index, row in enumerate(rows[:_PADDED_ROWS])]
    longest = max(row.numel() for row in cut)
    ids = torch.stack([nn.functional.pad(row, (longest - row.numel(), 0)) for row in cut])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (longest - row.numel(), 0)) for row in cut])
    logits, _ = runtime.forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
    difference = Difference()
    for row, found in zip(cut, logits, strict=True):
        difference.add(found[longest - row.numel() :].unsqueeze(0), _logits(reference, row))
    return difference.value


def _rung3(subject: Subject, source: Source) -> list[ParityRow]:
    window = max(row.numel() for row in subject.rows)
    runtime = runtime_logits(subject.backend.load(subject.folder, subject.target, exact=False))
    found = compare_logits(
        model_logits(source.original(subject.device)), runtime, subject.rows, window=window, stride=window
    )
    ratio = found.candidate.value / found.reference.value
    name, bound = "original float vs exported", subject.quantized.scheme.max_perplexity_ratio
    note = f"{found.reference.value:.4f} -> {found.candidate.value:.4f} on {found.reference.tokens} tokens"
    return [
        _row(3, name, "KL", found.kl, None),
        _row(3, name, "top-1 agreement", found.top1, None),
        _row(3, name, "perplexity ratio", ratio, bound, note),
    ]


def runtime_logits(runtime: RuntimeModel) -> Callable[[Tensor], Tensor]:
    """An exported model as a function from token ids ``[1, T]`` to logits ``[1, T, V]``."""

    def run(ids: Tensor) -> Tensor:
        return runtime.forward(ids, torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids))[0]

    return run


def _logits(model: Any, row: Tensor) -> Tensor:
    return model_logits(model)(row.unsqueeze(0))


def _end_to_end(name: str, measured: float, bound: float | None, note: str = "") -> ParityRow:
    return _row(2, f"end to end: {name}", "relative L2", measured, bound, note)


def _row(rung: Any, name: str, metric: str, measured: float, bound: float | None, note: str = "") -> ParityRow:
    finite = measured == measured and abs(measured) != float("inf")
    passed = None if bound is None else finite and measured <= bound
    return ParityRow(
        rung=rung,
        name=name,
        metric=metric,
        measured=measured if finite else None,
        bound=bound,
        passed=passed,
        note=note if finite else "not finite",
    )


def _not_run(rung: Any, name: str, metric: str) -> ParityRow:
    note = "not run: the original checkpoint is not at hand (-m/--model names it)"
    return ParityRow(rung=rung, name=name, metric=metric, measured=None, bound=None, passed=None, note=note)
