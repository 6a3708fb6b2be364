"""A corpus: the rows of a source as texts, with what is needed to cut them into token rows.

Conversations become texts here, through the model's own chat template.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from calib.data.chat import has_chat_template, templated
from calib.data.documents import CHAT_COLUMN, Row, no_text, rows_of, text_of
from calib.data.sources import STREAMED_DOCUMENTS, HubDataset, Layout, resolve_source
from calib.data.tokens import Tokenizer, encode
from calib.errors import DataError

SAMPLED = 256
"""Rows whose length is looked at to decide a layout."""

SHARE_OF_SEQLEN = 4
SHARE_OF_ROWS = 4
"""Rows are documents where at least ``1 - 1 / SHARE_OF_ROWS`` of them have at least ``seqlen /
SHARE_OF_SEQLEN`` tokens."""


@dataclass(frozen=True)
class Corpus:
    """Texts of one source, in its order.

    Attributes:
        texts: one for each row, blank ones as well: they belong to running text.
        layout: what the source asks for; None where the lengths of its rows decide.
        joiner: what stands between rows where they are joined.
        templated: whether the texts are conversations that the model's chat template has written
            out, special tokens included.
    """

    texts: list[str]
    layout: Layout | None
    joiner: str
    templated: bool = False

    def fingerprint(self) -> str:
        """SHA-256, as hex, of the texts in their order."""
        digest = hashlib.sha256()
        for text in self.texts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(f"{len(data)} ".encode())
            digest.update(data)
        return digest.hexdigest()


def read_corpus(source: str, tokenizer: object, *, column: str | None = None) -> Corpus:
    """Read ``source``.

    Args:
        source: see :func:`calib.data.sources.resolve_source`.
        tokenizer: the model's, whose chat template writes conversations out.
        column: the field or column to read; by default ``text`` (the table's, of a known data set),
            or ``messages`` where there is that and no text.

    Raises:
        DataError: as :func:`~calib.data.documents.read_documents`; or the source holds
            conversations and the tokenizer has no chat template, or one that refuses them.
    """
    resolved = resolve_source(source)
    limited = isinstance(resolved, HubDataset) and resolved.streamed
    rows = list(islice(rows_of(resolved, column), STREAMED_DOCUMENTS if limited else None))
    templated = bool(rows) and isinstance(rows[0].value, list)
    if templated:
        texts = [_conversation(row, tokenizer) for row in rows]
        corpus = Corpus(texts, "documents", "", templated=True)
    else:
        corpus = Corpus([text_of(row) for row in rows], resolved.layout, resolved.joiner)
    if not any(text.strip() for text in corpus.texts):
        raise no_text(source)
    return corpus


def choose_layout(
    corpus: Corpus, tokenizer: Tokenizer, *, seqlen: int, wanted: Layout | Literal["auto"] = "auto"
) -> Layout:
    """The layout in which ``corpus`` is cut.

    With ``"auto"`` it is the one that the source asks for; else rows are documents where three in
    four of them have at least a quarter of ``seqlen`` tokens. A line of running text, or a heading,
    is no document: such rows are joined and cut into windows.

    Args:
        corpus: the rows; at most :data:`SAMPLED` of them, evenly spaced, are looked at.
        tokenizer: the model's.
        seqlen: the most tokens in a token row.
        wanted: what was asked for.
    """
    if wanted != "auto":
        return wanted
    if corpus.layout is not None:
        return corpus.layout
    texts = [text for text in corpus.texts if text.strip()]
    step = max(1, len(texts) // SAMPLED)
    # as many characters as a long row may have at the very most; what comes after changes nothing
    heads = (text[: 64 * seqlen] for text in texts[::step])
    lengths = sorted(encode(head, tokenizer).numel() for head in heads)
    short = lengths[len(lengths) // SHARE_OF_ROWS]
    return "documents" if short * SHARE_OF_SEQLEN >= seqlen else "windows"


def without(texts: Iterable[str], known: Iterable[str], *, least: int) -> list[str]:
    """``texts`` but for those of at least ``least`` characters that are among ``known``, white
    space at both ends aside.
    """
    contents = {text.strip() for text in known}
    return [text for text in texts if len(text.strip()) < least or text.strip() not in contents]


def _conversation(row: Row, tokenizer: object) -> str:
    messages = row.value
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(message, dict) and "role" in message for message in messages)
    ):
        raise DataError(
            f"{row.where}: '{row.column}' holds no conversation",
            hint=f'Give "{CHAT_COLUMN}": [{{"role": "user", "content": "..."}}, ...] in every row.',
        )
    if not has_chat_template(tokenizer):
        raise DataError(
            f"{row.where} is a conversation, and the model's tokenizer has no chat template",
            hint="Give plain text, or name its column with --calib-column.",
        )
    return str(templated(tokenizer, messages, where=str(row.where), tokenize=False))
