"""Batches without padding.

Pad positions must never enter a statistic: one pad token's activation can set a channel's maximum,
and with it the scale of the whole tensor. rotq's own statistics could skip them by the attention
mask, but the calibrators of ModelOpt (max, histogram, SmoothQuant, AWQ) sit inside the quantizers
and see every position of a tensor, with no mask to go by. So rows of different lengths are never
put into one batch: rows of *equal* length are batched together, up to the batch size. A text whose
rows all differ in length is then run one row at a time, which costs speed and no accuracy.

Where a caller brings batches that are padded already, :class:`Batch` carries the mask and capture
honours it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.errors import DataError


@dataclass(frozen=True)
class Batch:
    """Token rows that a model runs at once.

    Attributes:
        input_ids: [rows, length] int64.
        row_ids: the index of each row in the calibration set. Sampling decisions depend on it
            rather than on the order of arrival, so that they do not depend on the batch size.
        attention_mask: [rows, length], 1 where there is a token and 0 where there is padding; None
            without padding.
    """

    input_ids: Tensor
    row_ids: tuple[int, ...]
    attention_mask: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the shapes: a mask of another shape would mask other tokens in silence.

        Raises:
            DataError: the batch is not two-dimensional or empty, or the ids or mask do not fit it.
        """
        if self.input_ids.dim() != 2 or self.input_ids.numel() == 0:
            raise DataError(
                "a batch must be [rows, length] and not empty, this one is"
                f" {list(self.input_ids.shape)}"
            )
        if len(self.row_ids) != self.input_ids.shape[0]:
            raise DataError(
                f"a batch of {self.input_ids.shape[0]} rows has {len(self.row_ids)} row ids"
            )
        if self.attention_mask is not None and self.attention_mask.shape != self.input_ids.shape:
            raise DataError(
                f"the attention mask is {list(self.attention_mask.shape)}, the batch"
                f" {list(self.input_ids.shape)}"
            )

    @property
    def keep(self) -> Tensor:
        """[rows, length] bool: where there is a token."""
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        return self.attention_mask.bool()

    @property
    def tokens(self) -> int:
        """The number of tokens, without padding."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.keep.sum())

    def model_inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        """Return the keyword arguments for a Hugging Face causal LM, on ``device``.

        Left padding also needs ``position_ids``, or a model with learned positions would see its
        text shifted.
        """
        inputs = {"input_ids": self.input_ids.to(device)}
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask.to(device)
            if not bool(self.keep[:, 0].all()):
                inputs["position_ids"] = (self.keep.cumsum(1) - 1).clamp(min=0).to(device)
        return inputs


def length_batches(rows: Sequence[Tensor], batch_size: int) -> list[Batch]:
    """Batch rows of equal length together.

    Args:
        rows: token rows [tokens], int64.
        batch_size: the most rows in a batch.

    Returns:
        Batches without padding, the longest rows first (what does not fit in memory fails at once),
        and in the order of ``rows`` within a length. ``row_ids`` are the positions in ``rows``.

    Raises:
        DataError: there are no rows, or ``batch_size`` is below 1.
    """
    if not rows:
        raise DataError(
            "there are no calibration rows to batch",
            hint="Give a longer text with --calib-dataset.",
        )
    if batch_size < 1:
        raise DataError(f"the batch size is {batch_size}", hint="--batch-size must be at least 1.")
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(row.numel(), []).append(index)
    batches: list[Batch] = []
    for length in sorted(by_length, reverse=True):
        indices = by_length[length]
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            batches.append(Batch(torch.stack([rows[index] for index in chosen]), tuple(chosen)))
    return batches
