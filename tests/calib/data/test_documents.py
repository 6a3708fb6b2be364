"""Reading documents: local files, hub data sets through a stand-in for the optional library, and
every refusal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from calib.data.documents import BLOCK_CHARACTERS, read_documents
from calib.data.sources import (
    KNOWN_SOURCES,
    STREAMED_DOCUMENTS,
    HubDataset,
    LocalFile,
    resolve_source,
)
from calib.errors import DataError


def test_txt_is_one_document_a_line_without_blank_ones(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes("\ufefffirst line\r\n\n  \nzweite Zeile ü\nthird".encode())
    assert read_documents(str(file)) == ["first line", "zweite Zeile ü", "third"]
    assert read_documents(str(file), limit=2) == ["first line", "zweite Zeile ü"]


def test_jsonl_reads_the_text_field_or_the_named_one(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "a\\nb", "title": "x"}\n\n{"text": "c", "title": "y"}\n')
    assert read_documents(str(file)) == ["a\nb", "c"]
    assert read_documents(str(file), text_column="title") == ["x", "y"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "unfinished', "is not JSON"),
        ('["text"]', "is not a JSON object"),
        ('{"body": "x"}', "has no field 'text' (it has: body)"),
        ('{"text": 3}', "'text' holds int, not text"),
    ],
)
def test_malformed_jsonl_names_the_line(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match="line 2") as caught:
        read_documents(str(file))
    assert said in caught.value.message
    assert caught.value.hint


def test_a_limit_stops_reading_before_a_malformed_line(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "fine"}\nnot json\n')
    assert read_documents(str(file), limit=1) == ["fine"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing.txt", "does not exist"),
        ("empty.txt", "holds no text"),
        ("latin.txt", "is not UTF-8"),
        ("folder", "it is a folder"),
        ("text.docx", "file of type .docx"),
        ("wikitext3", "unknown calibration data set"),
        ("./a/b", "unknown calibration data set"),
    ],
)
def test_unusable_sources_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes(b"gr\xfc\xdfe\n")
    Path("folder").mkdir()
    Path("text.docx").write_text("x")
    with pytest.raises(DataError, match=said) as caught:
        read_documents(source)
    assert caught.value.hint


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DataError) as caught:
        resolve_source("wikitext3")
    assert caught.value.hint is not None
    assert all(name in caught.value.hint for name in KNOWN_SOURCES)


def test_a_local_file_wins_over_a_hub_id_of_the_same_form() -> None:
    assert resolve_source("folder/text.txt") == LocalFile(Path("folder/text.txt"))


def test_a_hub_id_is_no_misspelt_name_in_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/data_v2").mkdir(parents=True)
    Path("org/text.parquet").touch()
    assert resolve_source("org/data_v1") == HubDataset("org/data_v1")
    with pytest.raises(DataError, match="does not exist") as caught:
        resolve_source("org/text.parqet")
    assert str(Path("org/text.parquet")) in str(caught.value.hint)


def test_a_folder_that_may_not_be_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(DataError, match="does not exist") as caught:
        read_documents(str(tmp_path / "text.txt"))
    assert caught.value.hint == "Check the path given as --calib-dataset or --eval-dataset."


def test_missing_optional_library_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    # where it is installed, another test may have imported it
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    parquet = tmp_path / "text.parquet"
    parquet.write_bytes(b"PAR1")
    for source in ("wikitext2", str(parquet)):
        with pytest.raises(DataError) as caught:
            read_documents(source)
        assert caught.value.hint == "pip install 'rotq[datasets]'"


class FakeDatasets(ModuleType):
    """Stands in for the ``datasets`` library: gives ``rows`` and remembers what it was asked
    for.
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__("datasets")
        self.rows = rows
        self.asked: dict[str, Any] = {}
        self.given = 0

    def load_dataset(self, path: str, **options: Any) -> Iterator[dict[str, Any]]:
        self.asked = {"path": path, **options}
        for row in self.rows:
            self.given += 1
            yield row


def fake(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> FakeDatasets:
    library = FakeDatasets(rows)
    monkeypatch.setitem(sys.modules, "datasets", library)
    return library


def test_wikitext_blocks_join_back_to_the_published_text(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f" line {i} " + "x" * (i % 700) if i % 3 else "" for i in range(200)]
    library = fake(monkeypatch, [{"text": line} for line in lines])
    blocks = read_documents("wikitext2")
    assert library.asked == {
        "path": "Salesforce/wikitext",
        "name": "wikitext-2-raw-v1",
        "split": "train",
        "streaming": False,
    }
    assert "\n\n".join(blocks) == "\n\n".join(lines)
    assert all(len(block) + 2 >= BLOCK_CHARACTERS for block in blocks[:-1])


def test_streamed_data_sets_are_read_no_further_than_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = fake(monkeypatch, [{"text": str(i)} for i in range(STREAMED_DOCUMENTS + 100)])
    assert len(read_documents("c4")) == STREAMED_DOCUMENTS == library.given
    assert library.asked["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert library.asked["streaming"] is True
    assert len(read_documents("c4", split="validation", limit=5)) == 5
    assert library.asked["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}


def test_other_hub_data_sets_and_their_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake(monkeypatch, [{"body": "x", "label": 1}])
    assert read_documents("someone/something", text_column="body", split="test") == ["x"]
    assert library.asked == {"path": "someone/something", "split": "test", "streaming": True}
    with pytest.raises(DataError, match=r"no column 'text' \(it has: body, label\)"):
        read_documents("someone/something")
    with pytest.raises(DataError, match="no split 'test'"):
        read_documents("c4", split="test")


def test_a_failing_download_is_a_known_error(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake(monkeypatch, [])

    def load_dataset(path: str, **options: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(library, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="no route to host") as caught:
        read_documents("cnn_dailymail")
    assert caught.value.hint is not None
    assert "HF_HUB_OFFLINE" in caught.value.hint


def test_parquet_is_read_through_pyarrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stand-in reads JSON and has the part of pyarrow's interface that is used."""

    class Column:
        def __init__(self, values: list[Any]) -> None:
            self.to_pylist = lambda: values

    class RecordBatch:
        def __init__(self, values: list[Any]) -> None:
            self.column = {0: Column(values)}.__getitem__

    class ParquetFile:
        def __init__(self, path: Path) -> None:
            self.table = json.loads(path.read_text())
            self.schema_arrow = type("Schema", (), {"names": list(self.table)})

        def iter_batches(self, columns: list[str]) -> list[RecordBatch]:
            return [RecordBatch([value]) for value in self.table[columns[0]]]

    parquet = ModuleType("pyarrow.parquet")
    monkeypatch.setattr(parquet, "ParquetFile", ParquetFile, raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    file = tmp_path / "text.parquet"
    file.write_text('{"text": ["a", " ", "b"], "n": [1]}')
    assert read_documents(str(file)) == ["a", "b"]
    with pytest.raises(DataError, match=r"no column 'title' \(it has: text, n\)"):
        read_documents(str(file), text_column="title")
    with pytest.raises(DataError, match="'n' holds int, not text"):
        read_documents(str(file), text_column="n")
    file.write_text("damaged")
    with pytest.raises(DataError, match="not a readable parquet file"):
        read_documents(str(file))
