"""Rung 1: the original float model against the rotated one, in memory or reloaded from a folder.

This is the one proof that folding is exact, of ``rotq export``, ``verify`` and ``rotate``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from calib.errors import RotationError, RotqError
from calib.files.reading import MALFORMED, reason_of
from calib.fusing import materialize
from calib.measure.floor import Difference
from calib.measure.overflow import first_overflow
from calib.measure.perplexity import model_logits
from calib.network.checkpoint import load_config
from calib.network.original import load_network
from calib.network.prefix import attach_prefix, compute_prefix
from calib.process.memory import freed_memory_kept
from calib.process.progress import Progress, silent, track
from exporter.parity.ranges import Use, range_rows, ranges_watched
from exporter.parity.rows import NO_ORIGINAL, not_run, row, source_notes
from exporter.parity.spreads import evidence_of
from exporter.parity.subject import Subject
from exporter.parity.tables import table_rows
from exporter.parity.walks import WALKED, walked_differences
from exporter.reporting.evidence import Evidence
from exporter.reporting.report import ParityRow
from exporter.source import Source

logger = logging.getLogger(__name__)

FOLD_BOUND = 1e-5
"""Relative L2 of logits in float32: rotating in float64 and rounding once costs a few ulp (6e-8)
per layer, about 3e-7 in all."""
ROUNDING_FACTOR = 2.0
"""Where weights are stored in a shorter dtype: how much farther from the original the rotated model
may be than the original whose weights are rounded once more. Both round as often and as far, each
in another basis; computed in float32, for what rounding of activations costs in that dtype is no
matter of folding: massive ones lose several times as much once they are spread over all channels.
"""
_OTHER_GRID = 2**0.5
"""Weights times this lie between the numbers of the dtype that they were stored in."""

_NAME, _METRIC = "original float vs rotated float", "relative L2"


@dataclass(frozen=True)
class FoldError:
    """How far a rotated model is from the original: relative L2 of logits, computed in float32.

    Attributes:
        rotated: of the rotated model with the weights that are stored.
        rounded: of the original with its weights rounded once more to the dtype of the rotated
            ones; ``None`` where that is float32.
    """

    rotated: float
    rounded: float | None

    @property
    def bound(self) -> float:
        """What :attr:`rotated` is held to."""
        return FOLD_BOUND if self.rounded is None else ROUNDING_FACTOR * self.rounded


@freed_memory_kept()
def fold_error(
    original: nn.Module,
    rotated: nn.Module,
    rows: Sequence[Tensor],
    dtype: torch.dtype,
    progress: Progress = silent,
) -> FoldError:
    """Compare the logits of two models.

    Args:
        original: in float32.
        rotated: its parameters in ``dtype``, on the same device.
        rows: token rows ``[tokens]``.
        dtype: what the rotated model is stored in.
        progress: called after every row.
    """
    expected = model_logits(original)
    fold, rounding = Difference(), Difference()
    short = dtype is not torch.float32

    for tokens in track(rows, "compare", len(rows), progress):
        ids = tokens.unsqueeze(0)
        logits = expected(ids)
        with _parameters(rotated, _in_float32):
            fold.add(model_logits(rotated)(ids), logits)
        if short:
            with _parameters(original, partial(_rounded_once_more, dtype=dtype)):
                rounding.add(expected(ids), logits)
    return FoldError(fold.value, rounding.value if short else None)


def _in_float32(name: str, parameter: Tensor) -> Tensor:
    return parameter.float()


def _rounded_once_more(name: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """What a fold makes anew, matrices and biases, as ``dtype`` would hold them, had they not been
    stored in it before.
    """
    if parameter.dim() < 2 and name != "bias":
        return parameter
    return (parameter * _OTHER_GRID).to(dtype).to(parameter.dtype) / _OTHER_GRID


def _is_finite(model: nn.Module, rows: Sequence[Tensor]) -> bool:
    """Whether ``model``, in its own dtype, computes finite logits."""
    logits = model_logits(model)
    return all(bool(logits(row.unsqueeze(0)).isfinite().all()) for row in rows)


@contextmanager
def _parameters(model: nn.Module, made: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Let every module compute with what ``made`` makes of its own parameters, one module at a
    time, so that there is never a second model in memory.
    """
    stored: dict[nn.Parameter, Tensor] = {}
    depth: Counter[nn.Parameter] = Counter()  # one may be of a module and of another inside it

    def exchange(module: nn.Module, inputs: object) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            depth[parameter] += 1
            if depth[parameter] == 1:
                stored[parameter] = parameter.data
                parameter.data = made(name, parameter.data)

    def restore(module: nn.Module, inputs: object, output: object) -> None:
        for parameter in module.parameters(recurse=False):
            depth[parameter] -= 1
            if not depth[parameter]:
                parameter.data = stored.pop(parameter)

    with ExitStack() as hooks:
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                hooks.callback(module.register_forward_pre_hook(exchange).remove)
                hooks.callback(module.register_forward_hook(restore).remove)
        try:
            yield
        finally:
            for parameter, data in stored.items():  # of a module that did not come to its end
                parameter.data = data


def fold_rows(subject: Subject) -> list[ParityRow]:
    """The figure of rung 1, of an export; what the rotated model shows of the ranges of inputs; and
    what is folded into rows of the embedding that no token of ``subject`` reads.
    """
    if subject.source is None or subject.fused is None:
        return [not_run(1, _NAME, _METRIC, NO_ORIGINAL)]
    compare = _by_walks if subject.quantized.by_blocks else _whole
    error, uses, evidence, notes = compare(subject)
    notes += source_notes(subject.source)
    if error.rounded is not None:
        notes.append(
            f"weights in {subject.dtype_name}; those of the original lose {error.rounded:.3g} if"
            " they are rounded once more"
        )
    figure = row(1, _NAME, _METRIC, error.rotated, error.bound, "; ".join(notes))
    return [
        *range_rows(subject, uses),
        figure.model_copy(update={"evidence": evidence}),
        *table_rows(subject.source, subject.fused),
    ]


_Compared = tuple[FoldError, dict[str, Use], Evidence | None, list[str]]
"""Of two models: how far they are apart, what was seen of ranges and beside, and notes."""


def _whole(subject: Subject) -> _Compared:
    """Both models in memory."""
    assert subject.source is not None  # by the caller, as the next
    assert subject.fused is not None
    original = subject.source.original(subject.device)
    if subject.fused.prefix is not None:
        # computed anew by the original, so that what was computed in the rotated basis is judged
        wiring, tokens = subject.source.wiring, subject.fused.prefix.tokens
        attach_prefix(original, wiring, compute_prefix(original, wiring, tokens))
    rotated = materialize(subject.fused).to(subject.device)
    with ranges_watched(subject, rotated) as uses:
        # where nothing was folded, one row asks whether both are put together alike
        plain = not uses and not subject.fused.rotations and subject.fused.prefix is None
        same = plain and _same_tensors(original, rotated)
        longest = max(subject.proof_rows, key=Tensor.numel)
        rows = [longest] if same else subject.proof_rows
        error = fold_error(original, rotated, rows, subject.quantized.dtype)
    with _parameters(rotated, _in_float32):
        evidence = _seen_beside(subject, original, rotated)
    notes = ["all tensors are the original's; the longest row was run"] if same else []
    return error, uses, evidence, notes


def _seen_beside(subject: Subject, original: nn.Module, rotated: nn.Module) -> Evidence | None:
    """What is only to look at: a model that hooks do not understand is judged all the same."""
    try:
        return evidence_of(subject, original, rotated, subject.proof_rows)
    except (RotqError, *MALFORMED) as error:
        logger.warning("the spread of values could not be looked at: %s", reason_of(error))
        return None


def _by_walks(subject: Subject) -> _Compared:
    """A block of either at a time."""
    dtype = subject.quantized.dtype
    again = partial(_rounded_once_more, dtype=dtype) if subject.short else None
    fold, rounding, uses = walked_differences(subject, again)
    error = FoldError(fold.value, None if again is None else rounding.value)
    return error, uses, None, [WALKED]


def _same_tensors(original: nn.Module, rotated: nn.Module) -> bool:
    """Whether every parameter of ``rotated`` is that of ``original``, number by number: then there
    is nothing in them that another row could show.
    """
    # tied ones are parameters of both modules
    mine, other = (
        dict(model.named_parameters(remove_duplicate=False)) for model in (original, rotated)
    )
    return mine.keys() == other.keys() and all(
        mine[name].shape == tensor.shape and torch.equal(mine[name], tensor.to(mine[name]))
        for name, tensor in other.items()
    )


def check_folder(
    folder: Path,
    source: Source,
    rows: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = silent,
) -> list[ParityRow]:
    """The figures of rung 1, of a rotated folder as any user would load it.

    Args:
        folder: a checkpoint folder.
        source: the original.
        rows: token rows ``[tokens]``.
        dtype: what the folder is stored and run in.
        device: where both run.
        progress: called after every row.

    Raises:
        CheckpointError: the folder lacks or has too many tensors.
        RotationError: a figure misses its bound.
    """
    rotated = load_network(folder, load_config(folder), dtype=dtype, device=device, complete=True)
    original = source.original(device)
    error = fold_error(original, rotated, rows, dtype, progress)

    name = str(dtype).removeprefix("torch.")
    compared = f"rotated folder, its weights in {name}, against the original"
    note = "; ".join(source_notes(source))
    figures = [row(1, compared, _METRIC, error.rotated, error.bound, note)]
    if error.rounded is not None:
        again = f"original, its weights rounded once more to {name}"
        figures.append(row(1, again, _METRIC, error.rounded, None))
    overflows = dtype is torch.float16 and not _is_finite(rotated, rows)
    overflow = first_overflow(original, rows, dtype) if overflows else None
    if overflow is not None:
        raise RotationError(
            f"the rotated folder computes no finite logits in {name}: {overflow}",
            hint="give --dtype bfloat16 or float32",
        )
    if not figures[0].passed:
        raise RotationError(
            "the rotated folder does not compute what the original does: relative L2 of logits "
            f"{error.rotated:.3g}, bound {error.bound:.3g}",
            hint="this should not happen: please report it, with the model and the recipe",
        )
    return figures
