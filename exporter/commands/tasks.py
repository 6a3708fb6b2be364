"""``rotq eval --tasks``: the tasks of lm-evaluation-harness, in the runtime of an exported folder
or in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import DataError
from calib.process.ambient import plain_torch
from calib.process.progress import Progress, silent
from exporter.commands.opened import opened
from exporter.reporting.html import page
from exporter.reporting.summary import Table
from exporter.source import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SEED = 1234
"""Of the examples before a question: the harness's own."""
_RESAMPLED = 1000
"""How often documents are drawn again for the standard error of a figure that is no mean."""

INSTALL = "pip install 'lm-eval>=0.4.13,<0.5'"


@dataclass(frozen=True)
class TaskFigure:
    """One figure of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    samples: int | None
    """Documents that it is of."""


@dataclass(frozen=True)
class TasksResult:
    """What the tasks gave."""

    figures: tuple[TaskFigure, ...]
    runtime: str
    """What ran it."""
    harness: str
    """Version of lm-evaluation-harness."""
    shots: dict[str, int]
    """Examples before each question, by task."""

    def table(self) -> Table:
        """For people."""
        rows = tuple(
            (
                row.task,
                row.metric,
                f"{row.value:.4f}",
                "-" if row.stderr is None else f"{row.stderr:.4f}",
                "-" if row.samples is None else str(row.samples),
                str(self.shots.get(row.task, 0)),
            )
            for row in self.figures
        )
        title = f"lm-evaluation-harness {self.harness}, in {self.runtime}"
        header = ("task", "metric", "value", "stderr", "documents", "shots")
        return Table(title, header, rows, right=frozenset({2, 3, 4, 5}))

    def _repr_html_(self) -> str:
        """For notebooks."""
        return page("tasks", {"in": self.runtime}, [self.table()])


def check_harness() -> None:
    """Refuse to go on without lm-evaluation-harness.

    Raises:
        DataError: it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise DataError(
            "tasks are those of lm-evaluation-harness, which is not installed", hint=INSTALL
        )


@plain_torch()
def evaluate_tasks(
    source: str | PreTrainedModel,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> TasksResult:
    """Run tasks of lm-evaluation-harness on a model.

    Tasks are programs: those of ``include`` may hold Python code, which is run.

    Args:
        source: as for :func:`exporter.commands.evaluate.evaluate`.
        tasks: their names, or YAML files.
        include: a folder with further tasks.
        shots: examples before each question; by default what the task says.
        limit: documents of each task; by default all.
        chat: put each question through the chat template.
        tokenizer: instead of that of the source.
        max_length: tokens that the model is run on at most.
        device: where a checkpoint runs.
        progress: called after each request.

    Raises:
        RotqError: the model cannot be read, the harness is not installed, or a task is not known
            or cannot be run.
    """
    check_harness()
    import lm_eval
    from lm_eval.tasks import TaskManager

    from exporter.commands.lm_model import OpenedLM

    manager = TaskManager(include_path=None if include is None else str(include))
    _check_known(tasks, manager)
    scored = opened(source, device)
    model = OpenedLM(
        scored,
        tokenizer or load_tokenizer(scored.folder),
        max_length=max_length,
        progress=progress,
    )
    try:
        loaded = manager.load(list(tasks))
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own != 0:  # a task that says 0 means it, here as in the harness
                task.set_config(key="num_fewshot", value=own or 0 if shots is None else shots)
            task.set_fewshot_seed(seed=_SEED)
        found: Any = lm_eval.evaluate(
            lm=model,
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=_RESAMPLED,
            apply_chat_template=chat,
            log_samples=False,
        )
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise DataError(
            f"the tasks {', '.join(tasks)} cannot be run: {error}",
            hint="see the tasks' own descriptions in lm-evaluation-harness",
        ) from error
    return TasksResult(
        tuple(_figures(found)),
        scored.runtime,
        str(lm_eval.__version__),
        {name: int(number or 0) for name, number in found.get("n-shot", {}).items()},
    )


def _check_known(tasks: Sequence[str], manager: Any) -> None:
    """Before the model is loaded."""
    unknown = [
        name for name in tasks if not manager.match_tasks([name]) and not Path(name).is_file()
    ]
    if unknown:
        raise DataError(
            f"lm-evaluation-harness has no task {', '.join(map(repr, unknown))}",
            hint="'lm_eval ls tasks' lists them; --tasks-folder names a folder with others",
        )


def _figures(found: Any) -> list[TaskFigure]:
    """Every figure of every task: its keys are ``metric,filter`` and ``metric_stderr,filter``."""
    figures = []
    for task, values in found["results"].items():
        samples = found.get("n-samples", {}).get(task, {}).get("effective")
        better = found.get("higher_is_better", {}).get(task, {})
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{chosen}")
            figures.append(
                TaskFigure(
                    task,
                    metric if chosen == "none" else f"{metric} ({chosen})",
                    float(value),
                    float(stderr) if isinstance(stderr, int | float) else None,
                    better.get(metric),
                    samples,
                )
            )
    return figures
