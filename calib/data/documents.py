"""Reading rows, and documents as plain strings, from local files and from hub data sets.

Local files work with nothing but the standard library, except parquet; hub data sets need the
``datasets`` extra.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from calib.data.sources import (
    STREAMED_DOCUMENTS,
    HubDataset,
    LocalFile,
    missing_file,
    resolve_source,
)
from calib.errors import DataError
from calib.files.reading import parse_json, reason_of

BLOCK_CHARACTERS = 8192
"""Rows of a windows-layout data set are single lines; they are gathered into documents of at least
this many characters (about one window of 2048 tokens), so that a split of documents keeps running
text together."""


CHAT_COLUMN = "messages"
"""The column that is read where no text column was asked for and there is none: conversations."""


@dataclass(frozen=True)
class Row:
    """One value of the column that is read."""

    where: str
    """File and line, or data set, for messages."""
    column: str
    value: object
    """Text, or the messages of a conversation."""


def read_documents(
    source: str,
    *,
    split: str | None = None,
    text_column: str | None = None,
    limit: int | None = None,
) -> list[str]:
    """Read the documents of ``source``, in the order of the source.

    Args:
        source: a local ``.txt`` (one document a line), ``.jsonl`` or ``.parquet`` file, the name of
            a known data set, or a hub data set ``org/name``. See
            :func:`calib.data.sources.resolve_source`.
        split: the split of a hub data set; by default the one in the table, else ``train``.
        text_column: the field (jsonl) or column (parquet, hub) with the text; by default ``text``,
            or the table's.
        limit: read at most this many documents. Reading stops there, so a large file is not read to
            its end. A hub data set that is streamed gives
            :data:`~calib.data.sources.STREAMED_DOCUMENTS` by default.

    Returns:
        Documents with at least one character that is not white space.

    Raises:
        DataError: the source is unknown, missing, unreadable or empty, a line is malformed, or an
            optional library is not installed.
    """
    resolved = resolve_source(source)
    texts: Iterator[str] = map(text_of, rows_of(resolved, text_column, split=split))
    if isinstance(resolved, HubDataset):
        if resolved.layout == "windows":
            texts = _blocks(texts, resolved.joiner)
        if limit is None and resolved.streamed:
            limit = STREAMED_DOCUMENTS
    documents = list(islice((text for text in texts if text.strip()), limit))
    if not documents:
        raise no_text(source)
    return documents


def rows_of(
    source: LocalFile | HubDataset, column: str | None = None, *, split: str | None = None
) -> Iterator[Row]:
    """Read the rows of ``source`` in their order, blank ones as well.

    Args:
        source: of :func:`calib.data.sources.resolve_source`.
        column: as ``text_column`` of :func:`read_documents`; by default also ``messages``, where
            there is that and no text.
        split: as there.

    Raises:
        DataError: while the rows are read, as :func:`read_documents`.
    """
    if isinstance(source, HubDataset):
        yield from _read_hub(replace(source, split=split or source.split), column)
        return
    if not source.path.exists():
        raise missing_file(source.path)
    if not source.path.is_file():
        kind = "a folder" if source.path.is_dir() else "no regular file"
        raise DataError(
            f"the text '{source.path}' is {kind}", hint="Give a file to --calib-dataset."
        )
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    yield from readers[source.path.suffix.lower()](source.path, column)


def check_source(source: str, column: str | None = None) -> None:
    """Refuse a source that cannot be read, as far as its first row tells; nothing is downloaded.

    Args:
        source: as for :func:`read_documents`.
        column: as its ``text_column``.

    Raises:
        DataError: as :func:`read_documents`, of a local file; of a hub data set, that the library
            for it is not installed.
    """
    resolved = resolve_source(source)
    if isinstance(resolved, HubDataset):
        if "datasets" not in sys.modules and importlib.util.find_spec("datasets") is None:
            raise _not_installed("datasets", f"reading the hub data set '{resolved.hub_id}'")
        return
    rows = rows_of(resolved, column)
    first = next((row for row in rows if row.value not in ("", None)), None)
    if first is None:
        raise no_text(source)
    if not isinstance(first.value, list):  # conversations need the tokenizer's template
        text_of(first)
    elif not all(isinstance(message, dict) for message in first.value):
        raise _no_text_in(first)


def text_of(row: Row) -> str:
    """The text of ``row``.

    Raises:
        DataError: it holds something else.
    """
    if not isinstance(row.value, str):
        raise _no_text_in(row)
    return row.value


def no_text(source: str) -> DataError:
    """What is raised of a source that holds none."""
    return DataError(
        f"'{source}' holds no text",
        hint="Give a source with at least one document that is not blank.",
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        # utf-8-sig: editors on Windows start a file with a byte order mark, which is no part of the
        # first document.
        with path.open(encoding="utf-8-sig") as file:
            yield from enumerate(file, start=1)
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not UTF-8 text: {error}", hint="Convert the file to UTF-8."
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot read '{path}': {error.strerror}", hint="Check that the file is readable."
        ) from error


def _read_txt(path: Path, column: str | None) -> Iterator[Row]:
    if column is not None:
        raise DataError(
            f"'{path}' is plain text and has no column '{column}'",
            hint="Leave --calib-column out, or give a .jsonl or .parquet file.",
        )
    for number, line in _lines(path):
        yield Row(f"'{path}' line {number}", "text", line.rstrip("\r\n"))


def _read_jsonl(path: Path, wanted: str | None) -> Iterator[Row]:
    hint = f'Every line must be a JSON object such as {{"{wanted or "text"}": "..."}}.'
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"'{path}' line {number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            reason = getattr(error, "msg", error)
            raise DataError(f"{where} is not JSON: {reason}", hint=hint) from error
        if not isinstance(record, dict):
            raise DataError(f"{where} is not a JSON object", hint=hint)
        column = _column(wanted, "text", record)
        if column not in record:
            fields = ", ".join(map(str, record)) or "none"
            raise DataError(
                f"{where} has no field '{column}' (it has: {fields})",
                hint=f"{hint} --calib-column names another field.",
            )
        yield Row(where, column, record[column])


def _read_parquet(path: Path, wanted: str | None) -> Iterator[Row]:
    parquet = _optional("pyarrow.parquet", f"reading '{path}'")
    try:
        table = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise DataError(
            f"'{path}' is not a readable parquet file: {reason_of(error)}",
            hint="Check the file.",
        ) from error
    names = table.schema_arrow.names
    column = _column(wanted, "text", names)
    if column not in names:
        raise DataError(
            f"'{path}' has no column '{column}' (it has: {', '.join(names)})",
            hint="Name the column that holds the text: --calib-column.",
        )
    try:
        for batch in table.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                yield Row(f"'{path}'", column, value)
    except (OSError, ValueError, TypeError) as error:  # as above, or what it cannot decode
        raise DataError(
            f"column '{column}' of '{path}' cannot be read: {reason_of(error)}",
            hint="Check the file.",
        ) from error


def _read_hub(known: HubDataset, wanted: str | None) -> Iterator[Row]:
    datasets = _optional("datasets", f"reading the hub data set '{known.hub_id}'")
    options: dict[str, Any] = dict(known.load_options)
    if known.config is not None:
        options["name"] = known.config
    if known.files:
        if known.split not in known.files:
            raise DataError(
                f"'{known.hub_id}' has no split '{known.split}' (it has: {', '.join(known.files)})",
                hint="Choose one of these splits.",
            )
        options["data_files"] = {known.split: known.files[known.split]}

    try:
        rows = datasets.load_dataset(
            known.hub_id, split=known.split, streaming=known.streamed, **options
        )
        for row in rows:
            column = _column(wanted, known.text_column, row)
            if column not in row:
                raise DataError(
                    f"'{known.hub_id}' has no column '{column}' (it has: {', '.join(row)})",
                    hint="Name the column that holds the text: --calib-column.",
                )
            yield Row(f"'{known.hub_id}'", column, row[column])
    except DataError:
        raise
    # The library passes on errors of its own, of its file systems and of HTTP clients, which share
    # no base class.
    except Exception as error:
        raise DataError(
            f"cannot load the hub data set '{known.hub_id}' (split '{known.split}'): {error}",
            hint=(
                "Check the name and the network (HF_HUB_OFFLINE, HF_TOKEN), or give a local .txt or"
                " .jsonl file."
            ),
        ) from error


def _column(wanted: str | None, default: str, names: Collection[str]) -> str:
    if wanted is None and default not in names and CHAT_COLUMN in names:
        return CHAT_COLUMN
    return wanted or default


def _blocks(rows: Iterator[str], joiner: str) -> Iterator[str]:
    """Gather consecutive rows; joining the blocks by ``joiner`` again gives exactly the joined
    rows.
    """
    block: list[str] = []
    size = 0
    for row in rows:
        block.append(row)
        size += len(row) + len(joiner)
        if size >= BLOCK_CHARACTERS:
            yield joiner.join(block)
            block, size = [], 0
    if block:
        yield joiner.join(block)


def _optional(module: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _not_installed(module.partition(".")[0], purpose) from error


def _not_installed(package: str, purpose: str) -> DataError:
    return DataError(
        f"{purpose} needs the package '{package}', which is not installed",
        hint="pip install 'rotq[datasets]'",
    )


def _no_text_in(row: Row) -> DataError:
    held = type(row.value).__name__
    tokens = isinstance(row.value, list) and all(isinstance(item, int) for item in row.value)
    return DataError(
        f"{row.where}: '{row.column}' holds {'token ids' if tokens else held}, not text",
        hint="Give the text itself, which the model's own tokenizer reads."
        if tokens
        else "Give a field whose values are strings: --calib-column.",
    )
