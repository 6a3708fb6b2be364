"""Calibration text that a caller has in memory, as a file that a recipe can name.

A run is repeated, and its folder verified, from its recipe, which names text and holds none. So
texts that are given as objects are kept in the user's cache, under the SHA-256 of what they hold.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from backends.user_cache import cache_folder
from calib.errors import DataError
from exporter.output import replace_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COLUMNS = ("text", "messages", "input_ids")
"""Of a row that is a mapping, the first of these is taken."""

Dataset = str | os.PathLike[str] | Iterable[object]
"""A name or a file, as ``--calib-dataset`` takes it; or rows: texts, conversations (lists of
messages), token ids, or mappings that have one of these in a column, as ``datasets.Dataset`` gives.
"""


def text_source(dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """What a recipe calls ``dataset``: its own name, or a file in the cache that holds its rows.

    Args:
        dataset: a name, a file, or rows.
        tokenizer: writes out rows of token ids, which need one.

    Raises:
        DataError: there is no row, a row is none of these, or rows are of several kinds.
    """
    if isinstance(dataset, str | os.PathLike):
        return os.fspath(dataset)
    rows = [_row(row, index, tokenizer) for index, row in enumerate(dataset)]
    kinds = {key for row in rows for key in row}
    if len(kinds) != 1:
        raise DataError(
            "the data set has no rows" if not rows else "the data set has texts and conversations",
            hint="give one or the other: texts, or lists of messages",
        )

    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = cache_folder() / "texts" / f"{name}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    return str(path)


def _row(row: object, index: int, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, object]:
    """A row as a line of a file has it."""
    if isinstance(row, Mapping):
        column = next((name for name in _COLUMNS if name in row), None)
        if column is None:
            raise DataError(
                f"row {index} of the data set has none of the columns {', '.join(_COLUMNS)}",
                hint=f"it has: {', '.join(map(str, row))}; rename the one with the text",
            )
        row = row[column]
    if isinstance(row, str):
        return {"text": row}
    values = row.tolist() if hasattr(row, "tolist") else row  # tensors and arrays
    if isinstance(values, Sequence) and values:
        if all(isinstance(each, Mapping) for each in values):
            return {"messages": [dict(each) for each in values]}
        if all(isinstance(each, int) for each in values):
            if tokenizer is None:
                raise DataError(
                    "rows of token ids need the tokenizer that they are of",
                    hint="pass tokenizer=AutoTokenizer..., or give texts",
                )
            return {"text": str(tokenizer.decode(values))}
    raise DataError(
        f"row {index} of the data set is a {type(row).__name__}, and no text",
        hint="give texts, lists of messages, token ids [tokens], or rows with such a column",
    )
