"""The float sides of rungs 1 and 3 by walks, for a model that was quantized block by block: neither
the original nor the rotated model is ever whole in memory.

The original's tensors are read by rotq's own names, not by the loader of transformers, which would
hold them all; its blocks are those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from calib.fusing import FusedModel
from calib.layerwise.blocks import Block
from calib.layerwise.logits import walked_logits
from calib.layerwise.prefix import with_prefix_blockwise
from calib.measure.floor import Difference
from calib.measure.perplexity import LogitsFunction
from calib.modules.watch import watching
from calib.rotations.rotation_set import RotationSet
from exporter.parity.ranges import Use, static_ranges
from exporter.parity.subject import Subject

Look = TypeVar("Look")
WALKED = "the original read by blocks, its tensors by rotq's names and not by transformers' loader"
"""What a figure says that depends on it."""


class Mapped(Mapping[str, Tensor]):
    """Tensors, each changed when it is asked for.

    Args:
        tensors: by name.
        made: what becomes of a tensor, by the last part of its name.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], made: Callable[[str, Tensor], Tensor]
    ) -> None:
        self._tensors = tensors
        self._made = made

    def __getitem__(self, key: str) -> Tensor:
        return self._made(key.rpartition(".")[2], self._tensors[key])

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def original_model(subject: Subject) -> FusedModel:
    """The original of ``subject`` in float32, its tensors read on access; nothing is folded."""
    assert subject.source is not None  # by the callers
    return subject.source.fuse(
        RotationSet(), dtype=torch.float32, fold_norms=False, device=subject.device, lazy=True
    )


def original_logits(
    subject: Subject, rows: Sequence[Tensor]
) -> AbstractContextManager[LogitsFunction]:
    """The logits of the original for ``rows``, int64 ``[tokens]``, and their beginnings."""
    return walked_logits(original_model(subject), rows, device=subject.device)


def walked_differences(
    subject: Subject, rounded: Callable[[str, Tensor], Tensor] | None
) -> tuple[Difference, Difference, dict[str, Use]]:
    """Rung 1 by walks over the proof rows, one for each model.

    Args:
        subject: the original, and the rotated model, with tensors computed on access.
        rounded: makes of a tensor of the original what its dtype holds, rounded once more; ``None``
            where that is not asked.

    Returns:
        The logits of the rotated model, and of the original that is rounded, against the
        original's; and what the rotated model makes of the static ranges of its inputs.
    """
    fused, rows, device = subject.fused, subject.proof_rows, subject.device
    assert fused is not None  # by the caller
    original = original_model(subject)
    if fused.prefix is not None:
        # computed anew by the original, so that what was computed in the rotated basis is judged
        original = with_prefix_blockwise(original, fused.prefix.tokens, device=device)
    rotated = replace(fused, state=Mapped(fused.state, lambda _, x: x.float()), dtype=torch.float32)
    ranges = static_ranges(subject, set(subject.quantized.linears))

    def look(block: Block) -> AbstractContextManager[object]:
        inputs, caches = _in_block(block, ranges.inputs), _in_block(block, ranges.caches)
        return watching(block.module, inputs=inputs, caches=caches, optional=True)

    fold, rounding = Difference(), Difference()
    head = ranges.inputs.get(fused.wiring.head.name)
    with walked_logits(original, rows, device=device) as expected:
        with walked_logits(rotated, rows, device=device, look=look, look_at_head=head) as found:
            for row in rows:
                fold.add(found(row.unsqueeze(0)), expected(row.unsqueeze(0)))
        if rounded is not None:
            again = replace(original, state=Mapped(original.state, rounded))
            with walked_logits(again, rows, device=device) as found:
                for row in rows:
                    rounding.add(found(row.unsqueeze(0)), expected(row.unsqueeze(0)))
    return fold, rounding, ranges.uses


def _in_block(block: Block, looks: Mapping[str, Look]) -> dict[str, Look]:
    """Those of ``looks`` whose modules lie in ``block``, by their names in it; experts that are 3-D
    parameters are no modules.
    """
    modules = {f"{block.name}.{name}" for name, _ in block.module.named_modules()}
    return {block.local(name): look for name, look in looks.items() if name in modules}
