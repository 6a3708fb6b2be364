"""Disjoint splits of one corpus: what trains, what decides, and what reports must never be the same
text.

* *train*: calibration and rotation training,
* *gate*: chooses between candidate rotations,
* *evaluation*: the figures that are reported.

A document belongs to a split by its content (white space at both ends aside), so that identical
documents always share one. The unique contents are ordered by a hash keyed with the seed and cut at
the requested fractions.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from calib.data.tokens import row_digest
from calib.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Splits(Generic[T]):
    """Documents or token rows of the three splits, each in the order of the source."""

    train: list[T]
    gate: list[T]
    evaluation: list[T]


def split_documents(
    documents: Iterable[str],
    *,
    seed: int,
    gate: float = 0.15,
    evaluation: float | Sequence[str] = 0.15,
) -> Splits[str]:
    """Split ``documents`` into disjoint train, gate and evaluation sets.

    Args:
        documents: the texts; blank ones are dropped.
        seed: another seed gives another split.
        gate: the fraction of the unique documents that goes to the gate.
        evaluation: the fraction that goes to evaluation, or the evaluation documents themselves,
            from their own source; documents that occur among them are then removed from the other
            two splits.

    Returns:
        Three splits, none empty, with no content in two of them.

    Raises:
        DataError: the fractions are not positive with a sum below 1, or there are too few different
            documents.
    """
    own = evaluation if isinstance(evaluation, (int, float)) else _not_blank(evaluation)
    return _split(
        _not_blank(documents),
        _content,
        gate,
        own,
        seed,
        "documents",
        "Give a source with more documents (one per line in a .txt file), or --calib-layout"
        " windows.",
    )


def split_windows(
    windows: Iterable[Tensor],
    *,
    seed: int,
    gate: float = 0.15,
    evaluation: float | Sequence[Tensor] = 0.15,
) -> Splits[Tensor]:
    """Split token rows [tokens] as :func:`split_documents` does documents.

    Raises:
        DataError: as there.
    """
    own = evaluation if isinstance(evaluation, (int, float)) else list(evaluation)
    return _split(
        list(windows),
        row_digest,
        gate,
        own,
        seed,
        "windows",
        "Give a longer text, or cut it into shorter windows with --seqlen.",
    )


def _split(
    items: list[T],
    content: Callable[[T], bytes],
    gate: float,
    evaluation: float | list[T],
    seed: int,
    what: str,
    hint: str,
) -> Splits[T]:
    own = None if isinstance(evaluation, (int, float)) else evaluation
    fractions = [gate, evaluation] if isinstance(evaluation, (int, float)) else [gate]
    if min(fractions) <= 0 or sum(fractions) >= 1:
        raise DataError(
            f"cannot split {what} by the fractions {fractions}",
            hint=(
                "Every fraction must be positive, and together they must leave something for"
                " training."
            ),
        )

    excluded = set(map(content, own or []))
    unique = sorted({content(item) for item in items} - excluded, key=lambda key: _rank(key, seed))
    ends = list(
        itertools.accumulate(max(1, round(fraction * len(unique))) for fraction in fractions)
    )
    if len(unique) <= ends[-1] or own == []:
        raise DataError(
            f"{len(unique)} different {what} for training and {0 if own is None else len(own)}"
            " of evaluation text are too few for three splits",
            hint=hint,
        )

    def select(contents: list[bytes]) -> list[T]:
        chosen = set(contents)
        return [item for item in items if content(item) in chosen]

    held = select(unique[ends[0] : ends[-1]]) if own is None else own
    return Splits(train=select(unique[ends[-1] :]), gate=select(unique[: ends[0]]), evaluation=held)


def _not_blank(texts: Iterable[str]) -> list[str]:
    return [text for text in texts if text.strip()]


def _content(text: str) -> bytes:
    # surrogatepass: text read from JSON may hold lone surrogates, which plain UTF-8 refuses.
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()


def _rank(content: bytes, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:".encode() + content).digest()
