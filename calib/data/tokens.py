"""From documents to token rows, the only form of text that the rest of rotq sees.

A *row* is a 1-D int64 tensor of at least two token ids, on the CPU. Rows never hold padding.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from calib.data.sources import Layout
from calib.errors import DataError
from calib.files.reading import is_failure, reason_of

MINIMUM_TOKENS = 2
"""A row of one token predicts nothing, and its only position is the attention sink."""


class Tokenizer(Protocol):
    """The one call of a Hugging Face tokenizer that rotq makes."""

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Any]:
        """Return a mapping whose ``input_ids`` is a list of token ids."""


def tokenize(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    seqlen: int,
    nsamples: int,
    seed: int,
    layout: Layout = "documents",
    joiner: str = "\n\n",
    templated: bool = False,
    bos: bool = True,
) -> list[Tensor]:
    """Cut ``documents`` into at most ``nsamples`` token rows, chosen at random by ``seed``.

    Layout ``"documents"`` gives one row per document, cut off after ``seqlen`` tokens, each with
    the tokenizer's own special tokens: what the model sees when it is used. Layout ``"windows"``
    joins all documents with ``joiner`` and cuts the tokens into consecutive windows of exactly
    ``seqlen``, each begun by the token that the tokenizer puts before a text, where it puts one. A
    text shorter than one window gives a single shorter row.

    Args:
        documents: the texts.
        tokenizer: a Hugging Face tokenizer.
        seqlen: the most tokens in a row; see :func:`clamp_seqlen`.
        nsamples: the most rows. Fewer are returned where the text has fewer.
        seed: chooses the rows; the same seed gives the same rows in the same order.
        layout: see above.
        joiner: what stands between documents in layout ``"windows"``.
        templated: the texts hold their special tokens already, written out by a chat template.
        bos: whether every window begins as a text does. False: only the first, as GPTQ and most
            published perplexities cut.

    Returns:
        Rows of shape [tokens], int64, 2 ≤ tokens ≤ ``seqlen``.

    Raises:
        DataError: ``seqlen`` is below 2, ``nsamples`` below 1, or no row has two tokens.
    """
    if seqlen < MINIMUM_TOKENS or nsamples < 1:
        raise DataError(
            f"cannot sample {nsamples} rows of {seqlen} tokens",
            hint=f"--nsamples must be at least 1 and --seqlen at least {MINIMUM_TOKENS}.",
        )
    generator = random.Random(seed)
    texts = list(documents)
    if layout == "windows":
        text = joiner.join(texts)
        windows = cut_windows(text, tokenizer, seqlen, templated=templated, bos=bos)
        if not windows:
            tokens = encode(text, tokenizer, special=not templated)
            if tokens.numel() < MINIMUM_TOKENS:
                raise _too_short(tokens.numel(), "in the whole text")
            return [tokens]
        return generator.sample(windows, min(nsamples, len(windows)))
    generator.shuffle(texts)
    rows: list[Tensor] = []
    found = 0
    for text in texts:
        row = encode(text, tokenizer, special=not templated)[:seqlen]
        found += row.numel()
        if row.numel() >= MINIMUM_TOKENS:
            rows.append(row)
        if len(rows) == nsamples:
            break
    if not rows:
        raise _too_short(
            found, f"in {len(texts)} documents, none with {MINIMUM_TOKENS} tokens or more"
        )

    return rows


def encode(text: str, tokenizer: Tokenizer, *, special: bool = True) -> Tensor:
    """The token ids [tokens] of ``text``, int64; with the tokenizer's ``special`` tokens around
    it.

    Raises:
        DataError: the tokenizer fails on it.
    """
    # verbose=False: a joined corpus is longer than the model's positions on purpose, and is cut
    # into windows next.
    try:
        found = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return torch.tensor(found, dtype=torch.int64)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise DataError(
            f"the model's tokenizer fails on the text {text[:40]!r}: {reason_of(error)}",
            hint="Check the tokenizer's files and the text.",
        ) from error


def cut_windows(
    text: str, tokenizer: Tokenizer, seqlen: int, *, templated: bool = False, bos: bool = True
) -> list[Tensor]:
    """Cut ``text`` into consecutive windows of exactly ``seqlen`` tokens; the rest at its end is
    left out. Arguments as of :func:`tokenize`.
    """
    tokens = encode(text, tokenizer, special=not templated)
    first = _before_a_text(tokens, tokenizer) if bos and not templated else tokens[:0]
    content = tokens[first.numel() :]
    size = seqlen - first.numel()
    count = content.numel() // size if size > 0 else 0
    return [
        torch.cat([first, content[index * size : (index + 1) * size]]) for index in range(count)
    ]


def _before_a_text(tokens: Tensor, tokenizer: Tokenizer) -> Tensor:
    """What ``tokens`` of a text begin with because every text does: they share it with those of no
    text.
    """
    empty = encode("", tokenizer)[: tokens.numel()]
    differ = (empty != tokens[: empty.numel()]).nonzero()
    return empty[: int(differ[0])] if differ.numel() else empty


def clamp_seqlen(seqlen: int, config: object, taken: int = 0) -> int:
    """Return ``seqlen``, or the number of positions that the model with ``config`` has, less those
    that are ``taken`` (by a prefix), where that is smaller.

    ``config`` is a Hugging Face configuration; a model without ``max_position_embeddings`` (ALiBi,
    for one) has no such limit.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return seqlen
    return min(seqlen, positions - taken)


def row_digest(row: Tensor) -> bytes:
    """The sha256 of one row of token ids [tokens]: the same on every machine and for every integer
    dtype.
    """
    # '<i8' fixes the byte order, so that a hash names the same tokens on every machine.
    return hashlib.sha256(
        row.detach().cpu().to(torch.int64).numpy().astype("<i8").tobytes()
    ).digest()


def token_hash(rows: Sequence[Tensor]) -> str:
    """The sha256, as hex, of token rows in their order: the provenance of everything calibrated on
    them.
    """
    return combine_digests(map(row_digest, rows))


def combine_digests(digests: Iterable[bytes]) -> str:
    """The :func:`token_hash` of rows whose :func:`row_digest` values, in row order, are
    ``digests``.
    """
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _too_short(found: int, where: str) -> DataError:
    return DataError(
        f"the calibration text is too short: {found} tokens {where}",
        hint=(
            f"Give a longer text with --calib-dataset; a row needs at least {MINIMUM_TOKENS}"
            " tokens."
        ),
    )
