"""Token rows of the three splits: exact windows, disjoint, each begun as a text begins."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.data.corpus import Corpus
from calib.data.rows import RowCounts, RowCutter, RowSplits, calibration_rows
from calib.data.tokens import Tokenizer, cut_windows
from calib.errors import DataError
from tests.calib.data.test_tokens import BOS, characters

MANY = RowCounts(10_000, 10_000, 10_000)


def plain(text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
    """A tokenizer of characters that puts nothing before a text."""
    return {"input_ids": [2 + ord(character) for character in text]}


def with_both(text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
    """One that puts a token before a text and the same one after it."""
    ids = [2 + ord(character) for character in text]
    return {"input_ids": [BOS, *ids, BOS] if add_special_tokens else ids}


def running(words: int, start: int = 0) -> Corpus:
    """Lines of numbers, none of which occurs twice."""
    return Corpus([f"{start + i:06d}" for i in range(words)], None, "\n")


def text_of(row: Tensor) -> str:
    return "".join(chr(token - 2) for token in row.tolist())


def every(splits: RowSplits) -> list[Tensor]:
    return [*splits.train, *splits.gate, *splits.evaluation]


@settings(deadline=None, max_examples=40)  # the machine may be busy; time is not what these test
@given(st.integers(60, 270), st.integers(16, 60), st.integers())
def test_windows_of_the_splits_are_the_text_cut_once(words: int, seqlen: int, seed: int) -> None:
    corpus = running(words)
    whole = "\n".join(corpus.texts)
    splits = RowCutter(plain, seqlen, "windows", seed).split(corpus, None, MANY)
    expected = [whole[i : i + seqlen] for i in range(0, len(whole) - seqlen + 1, seqlen)]
    assert sorted(map(text_of, every(splits))) == sorted(expected)
    assert splits.layout == "windows"
    assert all((splits.train, splits.gate, splits.evaluation))


def test_the_same_seed_gives_the_same_rows_and_counts_bound_them() -> None:
    counts = RowCounts(20, 5, 4)

    def cut(seed: int) -> list[list[int]]:
        splits = RowCutter(plain, 32, "auto", seed).split(running(2000), None, counts)
        assert [len(p) for p in (splits.train, splits.gate, splits.evaluation)] == [20, 5, 4]
        return [row.tolist() for row in every(splits)]

    assert cut(1) == cut(1) != cut(2)


@pytest.mark.parametrize("tokenizer", [characters, with_both])
def test_every_window_begins_as_a_text_does(tokenizer: Tokenizer) -> None:
    windows = cut_windows("abcdefg", tokenizer, 4)
    expected = [[BOS, *(2 + ord(c) for c in part)] for part in ("abc", "def")]
    assert [window.tolist() for window in windows] == expected
    once = cut_windows("abcdefg", tokenizer, 4, bos=False)
    assert [int(window[0]) == BOS for window in once] == [True, False]


def test_a_template_has_written_the_special_tokens_out() -> None:
    corpus = Corpus(["abcd", "efgh", "ijkl", "mnop"], "documents", "", templated=True)
    splits = RowCutter(with_both, 8, "auto", 0).split(corpus, None, MANY)
    assert sorted(map(text_of, every(splits))) == corpus.texts


def test_an_evaluation_text_of_its_own_is_cut_the_same_way_and_left_out() -> None:
    """The first half of the text is the evaluation's. Short lines that occur in both stay."""
    lines = [f"{i:064d}" for i in range(200)]
    held = Corpus(["title", *lines[:100]], None, "\n")
    corpus = Corpus(["title", *lines], None, "\n")
    splits = RowCutter(plain, 512, "auto", 0).split(corpus, held, MANY)
    assert {row.numel() for row in every(splits)} == {512}
    seen = "\n".join(map(text_of, [*splits.train, *splits.gate]))
    assert not any(line in seen for line in lines[:100])
    assert "title" in seen
    assert sum(line in seen for line in lines[100:]) > 60


def test_the_same_file_for_both_leaves_nothing_to_calibrate_on() -> None:
    lines = Corpus([f"{i:064d}" for i in range(200)], None, "\n")
    with pytest.raises(DataError, match="too short: 0 tokens, where 2 windows of 512"):
        RowCutter(plain, 512, "auto", 0).split(lines, lines, MANY)


def test_text_shorter_than_its_windows_says_what_would_fit() -> None:
    corpus = running(30)  # 209 characters
    with pytest.raises(DataError, match="209 tokens, where 3 windows of 100") as caught:
        RowCutter(plain, 100, "auto", 0).split(corpus, None, MANY)
    hint = str(caught.value.hint)
    fits = int(hint.rpartition("--seqlen ")[2].rstrip("."))
    assert RowCutter(plain, fits, "windows", 0).split(corpus, None, MANY).train
    with pytest.raises(DataError, match="needed to evaluate on"):
        RowCutter(plain, 300, "auto", 0).rows(corpus, 1)


def test_of_a_long_text_no_more_is_tokenized_than_it_takes() -> None:
    seen = 0

    def counting(text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        nonlocal seen
        seen += len(text)
        return plain(text, add_special_tokens=add_special_tokens, verbose=verbose)

    corpus = running(200_000)
    splits = RowCutter(counting, 32, "windows", 0).split(corpus, None, RowCounts(40, 6, 6))
    assert [len(p) for p in (splits.train, splits.gate, splits.evaluation)] == [40, 6, 6]
    assert seen < 40_000
    whole = "\n".join(corpus.texts)
    assert all(text_of(row) in whole for row in every(splits))


def test_documents_stay_documents(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n".join("x" * length for length in range(40, 80)))
    rows = calibration_rows(str(file), characters, seqlen=100, nsamples=99, seed=0)
    assert sorted(row.numel() for row in rows) == list(range(41, 81))
    windows = calibration_rows(
        str(file), characters, seqlen=100, nsamples=99, seed=0, layout="windows"
    )
    assert {row.numel() for row in windows} == {100}
    assert all(int(window[0]) == BOS for window in windows)
