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

from calib.data.documents import read_documents
from calib.data.sources import Layout, resolve_source
from calib.errors import DataError

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
) -> list[Tensor]:
    """Cut ``documents`` into at most ``nsamples`` token rows, chosen at random by ``seed``.

    Layout ``"documents"`` gives one row per document, cut off after ``seqlen`` tokens, each with
    the tokenizer's own special tokens: what the model sees when it is used. Layout ``"windows"``
    joins all documents with ``joiner``, tokenizes once and cuts the result into consecutive windows
    of exactly ``seqlen`` tokens; this is what GPTQ and most published perplexities do. A text
    shorter than one window gives a single shorter row.

    Args:
        documents: the texts.
        tokenizer: a Hugging Face tokenizer.
        seqlen: the most tokens in a row; see :func:`clamp_seqlen`.
        nsamples: the most rows. Fewer are returned where the text has fewer.
        seed: chooses the rows; the same seed gives the same rows in the same order.
        layout: see above.
        joiner: what stands between documents in layout ``"windows"``.

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
        return _windows(_encode(joiner.join(texts), tokenizer), seqlen, nsamples, generator)
    generator.shuffle(texts)
    rows: list[Tensor] = []
    found = 0
    for text in texts:
        row = _encode(text, tokenizer)[:seqlen]
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


def calibration_rows(
    source: str,
    tokenizer: Tokenizer,
    *,
    seqlen: int,
    nsamples: int,
    seed: int,
    layout: Layout | None = None,
) -> list[Tensor]:
    """Read ``source`` and :func:`tokenize` it, in the layout that the source has by default unless
    one is given.

    Raises:
        DataError: as :func:`~calib.data.documents.read_documents` and :func:`tokenize`.
    """
    resolved = resolve_source(source)
    return tokenize(
        read_documents(source),
        tokenizer,
        seqlen=seqlen,
        nsamples=nsamples,
        seed=seed,
        layout=layout or resolved.layout,
        joiner=resolved.joiner,
    )


def clamp_seqlen(seqlen: int, config: object) -> int:
    """Return ``seqlen``, or the number of positions that the model with ``config`` has, where that
    is smaller.

    ``config`` is a Hugging Face configuration; a model without ``max_position_embeddings`` (ALiBi,
    for one) has no such limit.
    """
    positions = getattr(config, "max_position_embeddings", None)
    return min(seqlen, positions) if isinstance(positions, int) and positions > 0 else seqlen


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


def _encode(text: str, tokenizer: Tokenizer) -> Tensor:
    # verbose=False: a joined corpus is longer than the model's positions on purpose, and is cut
    # into windows next.
    return torch.tensor(
        tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"], dtype=torch.int64
    )


def _windows(tokens: Tensor, seqlen: int, nsamples: int, generator: random.Random) -> list[Tensor]:
    if tokens.numel() < MINIMUM_TOKENS:
        raise _too_short(tokens.numel(), "in the whole text")
    count = tokens.numel() // seqlen
    if count == 0:
        return [tokens]
    chosen = generator.sample(range(count), min(nsamples, count))
    return [tokens[index * seqlen : (index + 1) * seqlen].clone() for index in chosen]


def _too_short(found: int, where: str) -> DataError:
    return DataError(
        f"the calibration text is too short: {found} tokens {where}",
        hint=(
            f"Give a longer text with --calib-dataset; a row needs at least {MINIMUM_TOKENS}"
            " tokens."
        ),
    )
