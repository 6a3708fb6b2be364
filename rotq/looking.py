"""What ``import rotq`` offers to look at what is there: exported folders, and models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rotq.given import Pathlike, progress_of, text_of, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from calib.process.progress import Progress
    from exporter.commands.diff import Differences
    from exporter.commands.evaluate import EvalResult
    from exporter.commands.inspect import Inspection
    from exporter.commands.report import ReportPage
    from exporter.commands.tasks import TasksResult
    from exporter.reporting.report import Report
    from rotq.texts import Dataset

__all__ = ["diff", "evaluate", "evaluate_tasks", "inspect", "report", "verify"]


def verify(
    folder: Pathlike,
    *,
    model: Pathlike | None = None,
    rows: int | None = None,
    expect_sha256: str | None = None,
    progress: Progress | bool | None = None,
) -> Report:
    """Repeat the parity check on an exported folder, in its runtime, and update its report.

    Args:
        folder: what :func:`rotq.api.export` wrote.
        model: the float model, where it is no longer where the recipe says.
        rows: evaluation rows; by default the recipe's.
        expect_sha256: refuse another export than this.
        progress: as for :func:`rotq.api.export`.

    Raises:
        calib.errors.RotqError: a known failure, with a hint.
    """
    from exporter.commands.verify import verify as run

    return run(
        Path(folder),
        model=None if model is None else os.fspath(model),
        rows=rows,
        expect_sha256=expect_sha256,
        progress=progress_of(progress),
    )


def evaluate(
    source: PreTrainedModel | Pathlike,
    dataset: Dataset | None = None,
    *,
    reference: PreTrainedModel | Pathlike | None = None,
    tokenizer: PreTrainedTokenizerBase | Pathlike | None = None,
    window: int | None = None,
    stride: int | None = None,
    nsamples: int | None = None,
    device: str = "auto",
    progress: Progress | bool | None = None,
) -> EvalResult:
    """Perplexity of an exported folder in its runtime, or in torch of an artifact, a checkpoint or
    a model object (where it is).

    Args:
        source: an exported or calibrated folder, a checkpoint folder, a hub id, or a Hugging Face
            model object.
        dataset: as for :func:`rotq.api.export`; by default the embedded evaluation text.
        reference: compare predictions with those of this one as well, as ``source``: KL, top-1,
            top-5.
        tokenizer: needed with a model object that was not loaded from a folder.
        window: tokens that the model sees at once; by default 2048, or what it takes.
        stride: tokens that windows move on by; by default the window.
        nsamples: documents; by default all.
        device: where a checkpoint runs.
        progress: as for :func:`rotq.api.export`.

    Raises:
        calib.errors.RotqError: a known failure, with a hint.
    """
    from exporter.commands.evaluate import evaluate as run

    given = tokenizer_of(tokenizer)
    return run(
        _named(source),
        None if dataset is None else text_of(dataset, given, source),
        reference=None if reference is None else _named(reference),
        tokenizer=given,
        window=window,
        stride=stride,
        nsamples=nsamples,
        device=device,
        progress=progress_of(progress),
    )


def evaluate_tasks(
    source: PreTrainedModel | Pathlike,
    tasks: Sequence[str],
    *,
    include: Pathlike | None = None,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    tokenizer: PreTrainedTokenizerBase | Pathlike | None = None,
    device: str = "auto",
    progress: Progress | bool | None = None,
) -> TasksResult:
    """Tasks of lm-evaluation-harness, in the runtime of an exported folder or in torch; needs
    ``lm-eval``.

    Args:
        source: as for :func:`evaluate`.
        tasks: names, as ``lm_eval ls tasks`` lists them.
        include: a folder with further tasks, as YAML; Python code in it is run.
        shots: examples before each question; by default what the task says.
        limit: documents of each task; by default all.
        chat: put questions through the chat template.
        tokenizer: needed with a model object that was not loaded from a folder.
        device: where a checkpoint runs.
        progress: as for :func:`rotq.api.export`.

    Raises:
        calib.errors.RotqError: a known failure, with a hint.
    """
    from exporter.commands.tasks import evaluate_tasks as run

    return run(
        _named(source),
        tasks,
        include=None if include is None else Path(include),
        shots=shots,
        limit=limit,
        chat=chat,
        tokenizer=tokenizer_of(tokenizer),
        device=device,
        progress=progress_of(progress),
    )


def inspect(folder: Pathlike) -> Inspection:
    """What a folder of :func:`rotq.api.export` or :func:`rotq.api.calibrate` holds, and how its
    runtime executes it.

    Raises:
        calib.errors.RotqError: it is incomplete or damaged.
    """
    from exporter.commands.inspect import inspect_folder

    return inspect_folder(Path(folder))


def report(folder: Pathlike, output: Pathlike | None = None) -> ReportPage:
    """The page of all that is known of an exported folder, with charts; a notebook shows it.

    Args:
        folder: what :func:`rotq.api.export` wrote.
        output: an ``.html`` file to write it to as well.

    Raises:
        calib.errors.RotqError: the folder is incomplete or was edited, or matplotlib is missing.
    """
    from exporter.commands.report import report_page, write_report

    return report_page(Path(folder)) if output is None else write_report(Path(folder), Path(output))


def diff(first: Pathlike, second: Pathlike) -> Differences:
    """In what two exported folders differ, from what each says of itself.

    Raises:
        calib.errors.RotqError: one is incomplete or damaged.
    """
    from exporter.commands.diff import diff as run

    return run(Path(first), Path(second))


def _named(source: PreTrainedModel | Pathlike) -> PreTrainedModel | str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else source
