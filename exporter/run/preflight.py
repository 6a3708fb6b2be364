"""What can be refused, or warned of, before anything is loaded: by a run at its start, and by
``--dry-run``, which asks the same. Names and settings are checked in
:func:`exporter.run.quantizing.check_names`, paths in :mod:`exporter.run.reservation`, and what a
target expresses by :class:`exporter.run.destination.Destination`. Imports no torch.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Collection
from pathlib import Path

from backends.base import NeedsLibraries
from calib.data.sources import EVALUATION, LocalFile, resolve_source
from calib.errors import BackendError, OutputError
from exporter.output import check_free
from exporter.recipe import EMBEDDED, Recipe
from exporter.reporting.charts.style import check_matplotlib
from exporter.run.destination import Destination
from exporter.run.options import RunOptions

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files of which a tokenizer has one."""
_CHARACTERS = 4
"""Of a token, in most languages and vocabularies, about."""


def check_libraries(destination: Destination, options: RunOptions) -> None:
    """Refuse a target, or a page, whose files are written by a library that is not installed.

    Raises:
        BackendError: naming the library, and how to install it.
    """
    if options.report:
        check_matplotlib()
    backend = destination.backend
    if not isinstance(backend, NeedsLibraries):
        return
    for target in destination.targets:
        for module, command in backend.libraries(target).items():
            if module not in sys.modules and importlib.util.find_spec(module) is None:
                raise BackendError(
                    f"target '{target}' is written with the library '{module}', which is not"
                    " installed",
                    hint=command,
                )


def check_disk(options: RunOptions, nbytes: int) -> None:
    """Refuse an output for which the disk has no room.

    Args:
        options: name the output, and the work folder, which holds the model as well.
        nbytes: of what is written, about.

    Raises:
        OutputError: with what is free.
    """
    places = [options.output, *([] if options.work_dir is None else [options.work_dir])]
    for place in places:
        folder = _existing(place)
        sharing = sum(_existing(each).stat().st_dev == folder.stat().st_dev for each in places)
        free, wanted = shutil.disk_usage(folder).free, nbytes * sharing
        if free < wanted:
            raise OutputError(
                f"the disk of '{place}' has {free / 1e9:.1f} GB free, and about"
                f" {wanted / 1e9:.1f} GB are written",
                hint="free some space, or choose another -o/--output or --work-dir",
            )


def check_unlocked(options: RunOptions) -> None:
    """Refuse an output, or a work folder, that another run holds.

    Raises:
        OutputError: naming that run.
    """
    check_free(options.output, options.work_dir)


def tokenizer_warnings(beside: Collection[str], destination: Destination) -> list[str]:
    """What of a checkpoint's tokenizer a run or its readers will miss, as far as names tell.

    Args:
        beside: names of the files beside its weights.
        destination: what reads it.
    """
    if not any(name in beside for name in _TOKENIZERS):
        return ["the model has no tokenizer beside it: the run will refuse to read text"]
    if destination.backend.name == "onnx" and "tokenizer.json" not in beside:
        return ["the model has no tokenizer.json, which onnxruntime-genai and the card's code read"]
    return []


def row_warnings(recipe: Recipe) -> list[str]:
    """Which rows a local text has not enough of, as far as its size tells."""
    data, evaluation = recipe.calibration, recipe.evaluation
    if data.dataset == EMBEDDED or evaluation.dataset is not None:
        return []
    source = resolve_source(data.dataset)
    if not isinstance(source, LocalFile) or source.path.suffix == ".parquet":
        return []
    text = source.path.read_bytes()
    documents = sum(1 for line in text.splitlines() if line.strip())
    windows = len(text) // (_CHARACTERS * data.seqlen)
    room = int(EVALUATION * max(documents, windows))
    if room >= evaluation.nsamples:
        return []
    return [
        f"'{data.dataset}' has room for about {room} evaluation rows, and"
        f" {evaluation.nsamples} are asked for: give a longer text, a smaller --eval-nsamples or"
        " --seqlen, or an --eval-dataset"
    ]


def _existing(path: Path) -> Path:
    """The folder that is there and that ``path`` will be in."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())
