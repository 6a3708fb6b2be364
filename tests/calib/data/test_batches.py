"""Batches of equal length, and what a padded batch gives to the model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.data.batches import Batch, length_batches
from calib.errors import DataError


@settings(deadline=None)  # the machine may be busy; time is not what these test
@given(st.lists(st.integers(2, 9), min_size=1, max_size=40), st.integers(1, 7))
def test_every_row_is_batched_once_with_rows_of_its_length(
    lengths: list[int], batch_size: int
) -> None:
    rows = [torch.arange(length) + 100 * index for index, length in enumerate(lengths)]
    batches = length_batches(rows, batch_size)
    seen = [row_id for batch in batches for row_id in batch.row_ids]
    assert sorted(seen) == list(range(len(rows)))
    for batch in batches:
        assert batch.attention_mask is None
        assert len(batch.row_ids) <= batch_size
        assert batch.tokens == batch.input_ids.numel()
        for ids, row_id in zip(batch.input_ids, batch.row_ids, strict=True):
            assert torch.equal(ids, rows[row_id])
    # no more batches than necessary
    assert len(batches) == sum(-(-lengths.count(length) // batch_size) for length in set(lengths))
    assert [batch.input_ids.shape[1] for batch in batches] == sorted(
        (batch.input_ids.shape[1] for batch in batches), reverse=True
    )


def test_nothing_to_batch_is_an_error() -> None:
    with pytest.raises(DataError, match="no calibration rows"):
        length_batches([], 4)
    with pytest.raises(DataError, match="batch size is 0"):
        length_batches([torch.arange(3)], 0)


def test_left_padding_gets_positions_and_right_padding_needs_none() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    right = Batch(ids, (0, 1), torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert set(right.model_inputs("cpu")) == {"input_ids", "attention_mask"}
    left = Batch(ids.flip(1), (0, 1), torch.tensor([[1, 1, 1], [0, 1, 1]]))
    assert left.model_inputs("cpu")["position_ids"].tolist() == [[0, 1, 2], [0, 0, 1]]
    assert right.tokens == left.tokens == 5
    assert set(Batch(ids, (0, 1)).model_inputs("cpu")) == {"input_ids"}


def test_a_batch_that_does_not_fit_together_is_refused() -> None:
    ids = torch.zeros((2, 3), dtype=torch.int64)
    with pytest.raises(DataError, match="1 row ids"):
        Batch(ids, (0,))
    with pytest.raises(DataError, match="attention mask"):
        Batch(ids, (0, 1), torch.ones(2, 4))
    with pytest.raises(DataError, match="not empty"):
        Batch(ids[0], (0,))
