"""Reading documents, as plain strings, from local files and from hub data sets.

Local files work with nothing but the standard library, except parquet; hub data sets need the
``datasets`` extra.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from calib.data.sources import STREAMED_DOCUMENTS, HubDataset, LocalFile, resolve_source
from calib.errors import DataError

BLOCK_CHARACTERS = 8192
"""Rows of a windows-layout data set are single lines; they are gathered into documents of at least
this many characters (about one window of 2048 tokens), so that a split of documents keeps running
text together."""


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
    if isinstance(resolved, LocalFile):
        rows = _read_file(resolved.path, text_column or "text")
    else:
        known = replace(
            resolved, split=split or resolved.split, text_column=text_column or resolved.text_column
        )
        rows = _read_hub(known)
        if known.layout == "windows":
            rows = _blocks(rows, known.joiner)
        if limit is None and known.streamed:
            limit = STREAMED_DOCUMENTS
    documents = list(islice((row for row in rows if row.strip()), limit))
    if not documents:
        raise DataError(
            f"'{source}' holds no text",
            hint="Give a source with at least one document that is not blank.",
        )
    return documents


def _read_file(path: Path, column: str) -> Iterator[str]:
    if not path.is_file():
        raise DataError(
            f"calibration file '{path}' does not exist",
            hint="Check the path given as --calib-dataset.",
        )
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    return readers[path.suffix.lower()](path, column)


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


def _read_txt(path: Path, column: str) -> Iterator[str]:
    del column  # a line of text has no columns
    for _, line in _lines(path):
        yield line.rstrip("\r\n")


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    hint = f'Every line must be a JSON object such as {{"{column}": "..."}}.'
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"'{path}' line {number} is not JSON: {error.msg}", hint=hint
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"'{path}' line {number} is not a JSON object", hint=hint)
        if column not in record:
            fields = ", ".join(map(str, record)) or "none"
            raise DataError(
                f"'{path}' line {number} has no field '{column}' (it has: {fields})", hint=hint
            )
        yield _text(record[column], f"'{path}' line {number}", column)


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    parquet = _optional("pyarrow.parquet", f"reading '{path}'")
    try:
        table = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise DataError(
            f"'{path}' is not a readable parquet file: {error}", hint="Check the file."
        ) from error
    if column not in table.schema_arrow.names:
        raise DataError(
            f"'{path}' has no column '{column}' (it has: {', '.join(table.schema_arrow.names)})",
            hint="Rename the column, or name the one that holds the text.",
        )
    for batch in table.iter_batches(columns=[column]):
        for value in batch.column(0).to_pylist():
            yield _text(value, f"'{path}'", column)


def _read_hub(known: HubDataset) -> Iterator[str]:
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
            if known.text_column not in row:
                raise DataError(
                    f"'{known.hub_id}' has no column '{known.text_column}' (it has:"
                    f" {', '.join(row)})",
                    hint="Name the column that holds the text.",
                )
            yield _text(row[known.text_column], f"'{known.hub_id}'", known.text_column)
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


def _text(value: object, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where}: '{column}' holds {type(value).__name__}, not text",
            hint="Give a field whose values are strings.",
        )
    return value


def _optional(module: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise DataError(
            f"{purpose} needs the package '{package}', which is not installed",
            hint="pip install 'rotq[datasets]'",
        ) from error
