"""Logits of a lazily fused model over rows that are known beforehand: one walk for all of them, and
the output head a row at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from calib.data.batches import Batch
from calib.errors import DataError
from calib.fusing import FusedModel
from calib.layerwise.blocks import Block
from calib.layerwise.flow import Flow
from calib.measure.perplexity import LogitsFunction

Look = Callable[[Block], AbstractContextManager[object]]
"""Gets a block in memory; inside what it gives, the rows pass through."""


@contextmanager
def walked_logits(
    fused: FusedModel,
    rows: Sequence[Tensor],
    *,
    device: torch.device | str = "cpu",
    look: Look | None = None,
    look_at_head: Callable[[Tensor], object] | None = None,
) -> Iterator[LogitsFunction]:
    """The logits of ``fused`` for ``rows`` and their beginnings.

    What is held is the head, and what enters it: ``[tokens, hidden]``.

    Args:
        fused: the model, its tensors computed on access.
        rows: token rows, int64 ``[tokens]``; what the result is called with begins one of them.
        device: where blocks run.
        look: looks at every block while the rows pass.
        look_at_head: gets what enters the head, ``[1, tokens, hidden]`` of each row.

    Raises:
        DataError: by the result, for tokens that begin no row.
    """
    batches = [Batch(row.unsqueeze(0), (index,)) for index, row in enumerate(rows)]
    with tempfile.TemporaryDirectory(prefix="rotq-") as folder:
        flow = Flow(fused, batches, Path(folder), device=device, to_the_end=True)
        flow.enter()
        for passage in flow.blocks():
            with nullcontext() if look is None else look(passage.block):
                passage()
        finals = list(flow.final())
        flow.delete()
    for final in finals if look_at_head is not None else ():
        assert look_at_head is not None
        look_at_head(final)

    def final_of(ids: Tensor) -> Tensor:
        for row, final in zip(rows, finals, strict=True):
            if torch.equal(row[: len(ids)], ids):
                return final[0, : len(ids)]
        raise DataError(f"{len(ids)} tokens begin no row that was walked")

    with flow.head() as head:
        yield lambda input_ids: head(final_of(input_ids[0].cpu())).unsqueeze(0)
