"""rotq's front door: the command line, and :func:`export` for Python.

Importing this package imports neither torch nor a runtime; they come with the first call.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from calib.process.progress import Progress
    from exporter.recipe import Recipe
    from exporter.run.results import ExportResult

__all__ = ["export", "load_recipe"]


def export(
    model: PreTrainedModel | str | os.PathLike[str] | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    *,
    output: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> ExportResult:
    """Rotate, calibrate, quantize and write a causal LM for a runtime, and check parity there.

    Args:
        model: a checkpoint folder, a hub id, a Hugging Face model object, or ``None`` for the
            recipe's (by default the embedded example model).
        recipe: a :class:`~exporter.recipe.Recipe`, a YAML file, a preset's name, or ``None`` for
            the defaults.
        output: the folder to create.
        tokenizer: needed with a model object that was not loaded from a folder.
        overwrite: replace an existing output folder that rotq wrote.
        verify: run the parity check.
        progress: called after every unit of work.

    Returns:
        The output folder, the resolved recipe and a report for each target.
        ``result.report.status`` is ``passed``, ``failed`` (the folder is kept) or ``unverified``.

    Raises:
        calib.errors.RotqError: a known failure, with a hint; nothing was written.
    """
    from calib.process.progress import silent
    from exporter.commands.export import export as run
    from exporter.recipe import Recipe as RecipeType
    from exporter.run.options import RunOptions

    resolved = recipe if isinstance(recipe, RecipeType) else load_recipe(recipe)
    named = isinstance(model, str | os.PathLike)
    if named:
        resolved = resolved.model_copy(update={"model": str(model)})
    elif model is not None:
        resolved = resolved.model_copy(
            update={"model": str(getattr(model, "name_or_path", "") or type(model).__name__)}
        )
    options = RunOptions(output=Path(output), overwrite=overwrite, verify=verify)
    return run(
        resolved,
        options,
        model=None if named else model,
        tokenizer=tokenizer,
        progress=progress or silent,
    )


def load_recipe(
    source: str | os.PathLike[str] | None = None, overrides: dict[str, Any] | None = None
) -> Recipe:
    """A recipe from a YAML file, a preset's name or the defaults; see
    :func:`exporter.recipe.load_recipe`.
    """
    from exporter.recipe import load_recipe as load

    return load(source, overrides)
