"""Splits share no content, whatever is duplicated in the source."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.data.splits import split_documents
from calib.errors import DataError

DOCUMENTS = st.lists(st.integers(0, 30).map(lambda i: f"document {i}"), min_size=1, max_size=60)


def stripped(texts: list[str]) -> set[str]:
    return {text.strip() for text in texts}


@settings(deadline=None)  # the machine may be busy; time is not what these test
@given(DOCUMENTS.filter(lambda texts: len(set(texts)) >= 3), st.integers())
def test_splits_are_disjoint_complete_and_ordered(texts: list[str], seed: int) -> None:
    # duplicates up to white space
    texts = [text + " " * (index % 2) for index, text in enumerate(texts)]
    splits = split_documents([*texts, "  "], seed=seed)
    parts = [splits.train, splits.gate, splits.evaluation]
    assert sorted(text for part in parts for text in part) == sorted(texts)
    assert all(parts)
    contents = [stripped(part) for part in parts]
    assert sum(map(len, contents)) == len(set().union(*contents))
    for part in parts:
        positions = iter(texts)
        assert all(text in positions for text in part)  # a subsequence of the source


def test_sizes_and_seeds() -> None:
    texts = [f"text {i}" for i in range(200)]
    splits = split_documents(texts, seed=0, gate=0.1, evaluation=0.2)
    assert (len(splits.train), len(splits.gate), len(splits.evaluation)) == (140, 20, 40)
    assert split_documents(texts, seed=0, gate=0.1, evaluation=0.2) == splits
    assert split_documents(texts, seed=1, gate=0.1, evaluation=0.2) != splits
    # by content: the order of the source decides nothing
    assert set(split_documents(texts[::-1], seed=0, gate=0.1, evaluation=0.2).gate) == set(
        splits.gate
    )


def test_evaluation_from_its_own_source_is_removed_from_the_others() -> None:
    texts = [f"text {i}" for i in range(20)]
    own = ["text 3 ", "other", "", "text 7"]
    splits = split_documents(texts, seed=0, gate=0.25, evaluation=own)
    assert splits.evaluation == ["text 3 ", "other", "text 7"]
    assert stripped(splits.train + splits.gate) == set(texts) - {"text 3", "text 7"}


def test_too_few_documents_or_impossible_fractions_are_refused() -> None:
    with pytest.raises(DataError, match="too few"):
        split_documents(["a", "b", "a "], seed=0)
    with pytest.raises(DataError, match="too few"):
        split_documents(["a", "b", "c"], seed=0, evaluation=[" "])
    for gate, evaluation in ((0.5, 0.5), (0.0, 0.2), (0.2, 0.0), (0.2, 1)):
        with pytest.raises(DataError, match="fractions"):
            split_documents(["a", "b", "c"], seed=0, gate=gate, evaluation=evaluation)


def test_lone_surrogates_are_content_too() -> None:
    assert split_documents(["\ud800", "b", "c"], seed=0).train
