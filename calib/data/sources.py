"""Which calibration sources rotq knows by name, as a table; nothing is read or downloaded here.

A source is a local file (``.txt``, ``.jsonl``, ``.parquet``), one of the names in
:data:`KNOWN_SOURCES`, or any ``org/name`` data set of the Hugging Face hub.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from calib.errors import DataError

Layout = Literal["documents", "windows"]

LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet")
"""The local files that can be read; see :mod:`calib.data.documents`."""

GATE = EVALUATION = 0.15
"""The share of a corpus that each of the held-out splits takes."""

STREAMED_DOCUMENTS = 4096
"""How many documents of a streamed hub data set are read unless a limit is given: calibration needs
hundreds, while a full pass over one shard of C4 would take 350 000."""

_CONVERSIONS = {
    ".gz": "Unpack it first (gunzip FILE).",
    ".zst": "Unpack it first (unzstd FILE).",
    ".zip": "Unpack it first (unzip FILE).",
    ".json": "Write one JSON object a line into a .jsonl file (jq -c '.[]' FILE > FILE.jsonl).",
    ".csv": "Write the column of the text as parquet (pandas.read_csv(FILE).to_parquet(OUT)).",
    ".tsv": "Write the column of the text as parquet (pandas.read_table(FILE).to_parquet(OUT)).",
    ".md": "Rename it to .txt; every line is a document then, or part of a window.",
}
"""What to do about files that are not read, by their suffix."""


@dataclass(frozen=True)
class LocalFile:
    """A text file on this machine. Its layout is decided by its rows."""

    path: Path

    @property
    def layout(self) -> Layout | None:
        """None: no file says how it wants to be cut."""
        return None

    @property
    def joiner(self) -> str:
        """What stands between rows where they are joined: a .txt file becomes what it was."""
        return "\n" if self.path.suffix.lower() == ".txt" else "\n\n"


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub.

    Attributes:
        hub_id: the repository, ``org/name``.
        config: the configuration of the data set, or None for its only one.
        split: the split read by default.
        text_column: the column that holds the text.
        layout: how rows become token rows: ``"documents"`` or ``"windows"``; None: their lengths
            decide.
        joiner: what stands between rows where they are joined, as in published perplexities.
        streamed: whether rows are fetched as they are read, rather than the whole data set first.
        load_options: further arguments of ``datasets.load_dataset``.
        files: the data files of each split, where the repository holds far more than calibration
            needs.
    """

    hub_id: str
    config: str | None = None
    split: str = "train"
    text_column: str = "text"
    layout: Layout | None = None
    joiner: str = "\n\n"
    streamed: bool = True
    load_options: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


KNOWN_SOURCES: dict[str, HubDataset] = {
    "wikitext2": HubDataset(
        "Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        layout="windows",
        joiner="\n\n",
        streamed=False,
    ),
    # This repository holds a loading script, which datasets 4 refuses to run; the hub's own
    # conversion to parquet is on the branch below, one folder per configuration.
    "ptb": HubDataset(
        "ptb-text-only/ptb_text_only",
        text_column="sentence",
        layout="windows",
        joiner=" ",
        streamed=False,
        load_options={"revision": "refs/convert/parquet", "data_dir": "penn_treebank"},
    ),
    "c4": HubDataset(
        "allenai/c4",
        layout="documents",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "cnn_dailymail": HubDataset(
        "abisee/cnn_dailymail", config="3.0.0", text_column="article", layout="documents"
    ),
}
"""The data sets known by name. The layouts of wikitext2 and ptb are those of GPTQ, so that
perplexities compare.
"""


def missing_file(path: Path) -> DataError:
    """What is raised of a local file that is not there, with one that is called much the same."""
    close = _close_to(path)
    return DataError(
        f"the text file '{path}' does not exist",
        hint=f"Did you mean '{path.parent / close[0]}'?"
        if close
        else "Check the path given as --calib-dataset or --eval-dataset.",
    )


def _close_to(path: Path) -> list[str]:
    """The file beside ``path`` that is called much the same, if there is one."""
    try:
        beside = [other.name for other in path.parent.iterdir()]
    except OSError:  # there is no such folder, or it may not be looked into
        return []
    return difflib.get_close_matches(path.name, beside, n=1)


def resolve_source(source: str) -> LocalFile | HubDataset:
    """Decide what ``source`` names, without reading it.

    Args:
        source: a path ending in one of :data:`LOCAL_SUFFIXES`, a name in :data:`KNOWN_SOURCES`, or
            a hub ``org/name``.

    Raises:
        DataError: ``source`` is none of these; the message lists what is known.
    """
    if source in KNOWN_SOURCES:
        return KNOWN_SOURCES[source]
    path = Path(source).expanduser()
    if path.suffix.lower() in LOCAL_SUFFIXES:
        return LocalFile(path)
    if path.exists():
        kind = "folder" if path.is_dir() else f"file of type {path.suffix or '(none)'}"
        raise DataError(
            f"cannot read calibration text from '{source}': it is a {kind}",
            hint=_CONVERSIONS.get(
                path.suffix.lower(),
                f"Give a {', '.join(LOCAL_SUFFIXES)} file; a .txt file holds one document a line.",
            ),
        )
    # what has no suffix may be a data set of the hub, unless it is that of a file that is there
    close = _close_to(path)
    meant = bool(close) and (bool(path.suffix) or Path(close[0]).stem == path.name)
    if path.suffix.lower() in _CONVERSIONS or meant:
        raise missing_file(path)
    organisation, slash, name = source.partition("/")
    if slash and organisation and name and "/" not in name and not source.startswith((".", "~")):
        return HubDataset(source)
    raise DataError(
        f"unknown calibration data set '{source}'",
        hint=f"Use one of {', '.join(KNOWN_SOURCES)}, a hub data set as org/name, "
        f"or a local {', '.join(LOCAL_SUFFIXES)} file.",
    )
