"""The token rows of the three splits, cut from one corpus or two."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from calib.data.corpus import Corpus, choose_layout, read_corpus, without
from calib.data.sources import EVALUATION, GATE, Layout
from calib.data.splits import split_documents, split_windows
from calib.data.tokens import Tokenizer, cut_windows, encode, tokenize
from calib.errors import DataError

PIECE_WINDOWS = 16
"""Text far longer than what is asked for is cut in pieces of about so many windows, and only as
many pieces, chosen at random, are tokenized as it takes. The rest at the end of a piece is lost:
half a window of 16."""

PIECE_CHARACTERS_PER_TOKEN = 8
"""More than any tokenizer takes of running text."""

REPEATED_CHARACTERS = 64
"""A shorter line (a heading, a name, a blank) occurs in two texts by chance; a longer one says that
they are the same text."""


@dataclass(frozen=True)
class RowCounts:
    """How many rows of each split are wanted; there may be fewer."""

    train: int
    gate: int
    evaluation: int


@dataclass(frozen=True)
class RowSplits:
    """Disjoint token rows [tokens], int64, and the layout that they were cut in."""

    train: list[Tensor]
    gate: list[Tensor]
    evaluation: list[Tensor]
    layout: Layout


@dataclass(frozen=True)
class RowCutter:
    """Cuts corpora into token rows.

    Attributes:
        tokenizer: the model's.
        seqlen: the most tokens in a row, and the exact number in a window.
        layout: ``documents``, ``windows``, or ``auto``: see
            :func:`~calib.data.corpus.choose_layout`.
        seed: chooses splits and rows.
    """

    tokenizer: Tokenizer
    seqlen: int
    layout: Layout | Literal["auto"]
    seed: int

    def layout_of(self, corpus: Corpus) -> Layout:
        """The layout in which ``corpus`` is cut."""
        return choose_layout(corpus, self.tokenizer, seqlen=self.seqlen, wanted=self.layout)

    def split(self, corpus: Corpus, held: Corpus | None, counts: RowCounts) -> RowSplits:
        """Cut ``corpus`` into the rows of three disjoint splits.

        Args:
            corpus: the text to calibrate on and to choose by, and to evaluate on where there is no
                ``held``.
            held: a text of its own to evaluate on; what it has in common with ``corpus`` is left
                out there.
            counts: the most rows of each split.

        Raises:
            DataError: a text is too short for its splits.
        """
        if self.layout_of(corpus) == "documents":
            return self._split_documents(corpus, held, counts)
        return self._split_windows(corpus, held, counts)

    def rows(self, corpus: Corpus, nsamples: int) -> list[Tensor]:
        """Cut ``corpus`` into at most ``nsamples`` rows, chosen at random.

        Raises:
            DataError: it is shorter than one window, or no document has two tokens.
        """
        if self.layout_of(corpus) == "documents":
            return self._documents(corpus, corpus.texts, nsamples)
        return self._sample(self._windows(corpus, nsamples, needed=1), nsamples)

    def _split_documents(self, corpus: Corpus, held: Corpus | None, counts: RowCounts) -> RowSplits:
        evaluation = EVALUATION if held is None else held.texts
        parts = split_documents(corpus.texts, seed=self.seed, gate=GATE, evaluation=evaluation)
        return RowSplits(
            train=self._documents(corpus, parts.train, counts.train),
            gate=self._documents(corpus, parts.gate, counts.gate),
            evaluation=self._documents(corpus, parts.evaluation, counts.evaluation)
            if held is None
            else self.rows(held, counts.evaluation),
            layout="documents",
        )

    def _split_windows(self, corpus: Corpus, held: Corpus | None, counts: RowCounts) -> RowSplits:
        wanted = max(counts.train / (1 - GATE - EVALUATION), counts.gate / GATE)
        if held is None:
            wanted = max(wanted, counts.evaluation / EVALUATION)
            windows = self._windows(corpus, math.ceil(wanted), needed=3)
            parts = split_windows(windows, seed=self.seed, gate=GATE, evaluation=EVALUATION)
        else:
            evaluation = self.rows(held, counts.evaluation)
            texts = without(corpus.texts, held.texts, least=REPEATED_CHARACTERS)
            rest = Corpus(texts, corpus.layout, corpus.joiner, corpus.templated)
            windows = self._windows(rest, math.ceil(wanted), needed=2)
            parts = split_windows(windows, seed=self.seed, gate=GATE, evaluation=evaluation)
        return RowSplits(
            train=self._sample(parts.train, counts.train),
            gate=self._sample(parts.gate, counts.gate),
            evaluation=self._sample(parts.evaluation, counts.evaluation),
            layout="windows",
        )

    def _documents(self, corpus: Corpus, texts: list[str], nsamples: int) -> list[Tensor]:
        return tokenize(
            texts,
            self.tokenizer,
            seqlen=self.seqlen,
            nsamples=nsamples,
            seed=self.seed,
            templated=corpus.templated,
        )

    def _windows(self, corpus: Corpus, wanted: int, *, needed: int) -> list[Tensor]:
        """All windows of ``corpus``, or about ``wanted`` of them where it is far longer."""
        pieces = list(_pieces(corpus, self.seqlen))
        random.Random(self.seed).shuffle(pieces)
        windows: list[Tensor] = []
        for piece in pieces:
            windows += cut_windows(piece, self.tokenizer, self.seqlen, templated=corpus.templated)
            if len(windows) >= wanted:
                break
        if len(windows) < needed:
            raise self._too_short(corpus, needed)
        return windows

    def _sample(self, rows: list[Tensor], nsamples: int) -> list[Tensor]:
        return random.Random(self.seed).sample(rows, min(nsamples, len(rows)))

    def _too_short(self, corpus: Corpus, needed: int) -> DataError:
        text = corpus.joiner.join(corpus.texts)
        found = encode(text, self.tokenizer, special=not corpus.templated).numel()
        uses = {1: "to evaluate on", 2: "to calibrate and to choose on"}
        fits = found // (needed + 1)
        return DataError(
            f"the text is too short: {found} tokens, where {needed} windows of {self.seqlen} are"
            f" needed {uses.get(needed, 'to calibrate, to choose and to evaluate on')}",
            hint=f"Give a longer text, or shorter windows: --seqlen {fits}."
            if fits > 1
            else "Give a longer text.",
        )


def calibration_rows(
    source: str,
    tokenizer: Tokenizer,
    *,
    seqlen: int,
    nsamples: int,
    seed: int,
    layout: Layout | Literal["auto"] = "auto",
) -> list[Tensor]:
    """Read ``source`` and cut all of it into rows, held-out splits aside.

    Raises:
        DataError: as :func:`~calib.data.corpus.read_corpus` and :meth:`RowCutter.rows`.
    """
    cutter = RowCutter(tokenizer, seqlen, layout, seed)
    return cutter.rows(read_corpus(source, tokenizer), nsamples)


def at_most(rows: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The first of ``rows`` [tokens] that together have ``tokens``, the last of them whole."""
    chosen: list[Tensor] = []
    for row in rows:
        if tokens <= 0:
            break
        chosen.append(row)
        tokens -= row.numel()
    return chosen


def _pieces(corpus: Corpus, seqlen: int) -> Iterator[str]:
    """The joined text in pieces that begin where a row does."""
    least = PIECE_WINDOWS * seqlen * PIECE_CHARACTERS_PER_TOKEN
    piece: list[str] = []
    size = 0
    for text in corpus.texts:
        piece.append(text)
        size += len(text) + len(corpus.joiner)
        if size >= least:
            yield corpus.joiner.join(piece)
            piece, size = [], 0
    if piece:
        yield corpus.joiner.join(piece)
