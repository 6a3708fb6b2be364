"""What callers of ``rotq`` give, as the commands take it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from calib.process.progress import Progress
    from rotq.texts import Dataset

Pathlike = str | os.PathLike[str]


def text_of(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel | Pathlike,
) -> str:
    """What a recipe calls the data set; token ids are written out by the model's own tokenizer
    where none is given and the model is in a folder."""
    if isinstance(dataset, str | os.PathLike):
        return os.fspath(dataset)
    from exporter.source import load_tokenizer
    from rotq.texts import text_source

    named = isinstance(model, str | os.PathLike)
    folder = str(model if named else getattr(model, "name_or_path", "") or "")
    if tokenizer is None and folder and Path(folder).is_dir():
        tokenizer = load_tokenizer(Path(folder))
    return text_source(dataset, tokenizer)


def tokenizer_of(
    given: PreTrainedTokenizerBase | Pathlike | None,
) -> PreTrainedTokenizerBase | None:
    """A tokenizer, which may be given by its folder."""
    if not isinstance(given, str | os.PathLike):
        return given
    from exporter.source import load_tokenizer

    return load_tokenizer(Path(given))


def progress_of(asked: Progress | bool | None) -> Progress:
    """What is called after every unit of work; bars where they are asked for, or in a notebook."""
    from calib.process.progress import silent
    from rotq.bars import Bars

    if asked is None:
        asked = "ipykernel" in sys.modules
    if not isinstance(asked, bool):
        return asked
    return Bars() if asked else silent
