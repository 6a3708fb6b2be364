"""What ``import rotq`` offers to make something: the commands as functions that take what a
notebook has. Those that look at what is there are in :mod:`rotq.looking`.

A model is a folder, a hub id or an object, a recipe is a file, a preset, a mapping, a
:class:`~exporter.recipe.Recipe` or nothing, and every option of the command line is a keyword
(``scheme="int8"``, ``nsamples=64``; :data:`exporter.flags.RECIPE_KEYS` lists them). Each function
imports what it needs when it is called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rotq.given import Pathlike, progress_of, text_of, tokenizer_of
from rotq.settings import keyed, plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from calib.process.progress import Progress
    from exporter.commands.export import CalibrateResult
    from exporter.commands.rotate import RotateResult
    from exporter.commands.stats import StatsResult
    from exporter.recipe import Recipe
    from exporter.run.options import RunOptions
    from exporter.run.results import ExportResult
    from exporter.sweeping.sweep import SweepResult
    from rotq.texts import Dataset

__all__ = [
    "calibrate",
    "capture",
    "export",
    "load_recipe",
    "rotate",
    "stats",
    "sweep",
]


def load_recipe(
    source: Recipe | Pathlike | Mapping[str, object] | None = None,
    overrides: Mapping[str, object] | None = None,
    **settings: object,
) -> Recipe:
    """A recipe, with what is given here in place of what it says.

    Args:
        source: a YAML file, a preset's name, a mapping of keys (nested, or dotted), a recipe, or
            ``None`` for the defaults.
        overrides: values by dotted key (``{"calibration.nsamples": 64}``); ``None`` values are
            skipped.
        settings: values by the name of an option, with underscores (``nsamples=64``). A target
            names its backend.

    Raises:
        RecipeError: an unknown key, preset or file, or a value out of range.
        TypeError: a keyword that is no option.
    """
    from exporter.recipe import Recipe as RecipeType
    from exporter.recipe import load_recipe as load
    from exporter.recipe import with_values
    from exporter.run.named_targets import with_backend

    values = plain({**(overrides or {}), **keyed(settings)})
    if isinstance(source, RecipeType):
        return with_values(source, with_backend(values, source.backend))
    if isinstance(source, Mapping):
        base = plain(source)
        load(None, deepcopy(base))  # what is no recipe has no target
        base = with_backend(base)
        own = load(None, deepcopy(base)).backend
        return load(None, {**base, **with_backend(values, own)})
    named = None if source is None else os.fspath(source)
    return load(named, with_backend(values, load(named).backend))


def export(
    model: PreTrainedModel | Pathlike | None = None,
    recipe: Recipe | Pathlike | Mapping[str, object] | None = None,
    *,
    output: Pathlike | None = None,
    dataset: Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | Pathlike | None = None,
    overwrite: bool = False,
    verify: bool = True,
    retry: bool = False,
    work_dir: Pathlike | None = None,
    resume: bool = False,
    from_artifact: Pathlike | None = None,
    from_capture: Pathlike | None = None,
    report: bool = False,
    progress: Progress | bool | None = None,
    **settings: object,
) -> ExportResult:
    """Rotate, calibrate, quantize and write a causal LM for a runtime, and check parity there.

    Args:
        model: a checkpoint folder, a hub id, a Hugging Face model object, or ``None`` for the
            recipe's (by default the embedded example model).
        recipe: as ``source`` of :func:`load_recipe`.
        output: the folder to create; by default ``out/MODEL-SCHEME-TARGET``.
        dataset: the calibration text: a name or file, or rows: texts, conversations, token ids
            ``[tokens]`` (written out by the tokenizer), or a ``datasets.Dataset`` of these.
        tokenizer: needed with a model object that was not loaded from a folder; a folder will do.
        overwrite: replace an existing output folder that rotq wrote.
        verify: run the parity check.
        retry: where it fails, try what would most likely mend it, and keep the first that passes.
        work_dir: where intermediate results are kept.
        resume: go on from what ``work_dir`` holds.
        from_artifact: what :func:`calibrate` wrote: only write and verify.
        from_capture: what :func:`capture` wrote.
        report: draw the page of the report into the folder.
        progress: called after every unit of work; ``True``: bars, which ``None`` means in a
            notebook.
        settings: recipe values by the name of an option: ``scheme="int8"``, ``target="vllm"``.

    Returns:
        The output folder, the resolved recipe and a report for each target.
        ``result.report.status`` is ``passed``, ``failed`` (the folder is kept) or ``unverified``.

    Raises:
        calib.errors.RotqError: a known failure, with a hint; nothing was written.
        TypeError: a keyword that is no option.
    """
    if from_artifact is not None and recipe is None:
        recipe, settings = _recipe_of_artifact(Path(from_artifact)), {"dtype": "auto", **settings}
    if retry:
        from exporter.commands.retry import export_until_passed as run
    else:
        from exporter.commands.export import export as run
    from dataclasses import replace

    given = _Given.of(model, recipe, dataset, tokenizer, settings)
    options = replace(
        _options(given.recipe, "export", output, overwrite, work_dir, resume, from_capture),
        verify=verify,
        from_artifact=None if from_artifact is None else Path(from_artifact),
        report=report,
    )
    return run(
        given.recipe,
        options,
        model=given.model,
        tokenizer=given.tokenizer,
        progress=progress_of(progress),
    )


def calibrate(
    model: PreTrainedModel | Pathlike | None = None,
    recipe: Recipe | Pathlike | Mapping[str, object] | None = None,
    *,
    output: Pathlike | None = None,
    dataset: Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | Pathlike | None = None,
    overwrite: bool = False,
    work_dir: Pathlike | None = None,
    resume: bool = False,
    from_capture: Pathlike | None = None,
    progress: Progress | bool | None = None,
    **settings: object,
) -> CalibrateResult:
    """Stop at the quantized model that no runtime has shaped yet; as :func:`export`, which writes
    it with ``from_artifact=``.
    """
    from exporter.commands.export import calibrate as run

    given = _Given.of(model, recipe, dataset, tokenizer, settings)
    options = _options(given.recipe, "calibrate", output, overwrite, work_dir, resume, from_capture)
    return run(
        given.recipe,
        options,
        model=given.model,
        tokenizer=given.tokenizer,
        progress=progress_of(progress),
    )


def capture(
    model: PreTrainedModel | Pathlike | None = None,
    recipe: Recipe | Pathlike | Mapping[str, object] | None = None,
    *,
    output: Pathlike | None = None,
    dataset: Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | Pathlike | None = None,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
    **settings: object,
) -> Path:
    """Only capture the statistics that rotations are trained on; as :func:`export`, which reuses
    them with ``from_capture=``. Returns their folder.
    """
    from exporter.commands.export import run_capture as run

    given = _Given.of(model, recipe, dataset, tokenizer, settings)
    return run(
        given.recipe,
        _options(given.recipe, "capture", output, overwrite),
        model=given.model,
        tokenizer=given.tokenizer,
        progress=progress_of(progress),
    )


def rotate(
    model: PreTrainedModel | Pathlike | None = None,
    recipe: Recipe | Pathlike | Mapping[str, object] | None = None,
    *,
    output: Pathlike | None = None,
    dataset: Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | Pathlike | None = None,
    overwrite: bool = False,
    write_dartquant: bool = False,
    from_capture: Pathlike | None = None,
    progress: Progress | bool | None = None,
    **settings: object,
) -> RotateResult:
    """Write the rotated float checkpoint, which loads like the original; as :func:`export`."""
    from exporter.commands.rotate import rotate as run

    given = _Given.of(model, recipe, dataset, tokenizer, settings)
    return run(
        given.recipe,
        _options(given.recipe, "rotate", output, overwrite, from_capture=from_capture),
        write_dartquant=write_dartquant,
        model=given.model,
        tokenizer=given.tokenizer,
        progress=progress_of(progress),
    )


def stats(
    model: PreTrainedModel | Pathlike | None = None,
    recipe: Recipe | Pathlike | Mapping[str, object] | None = None,
    *,
    output: Pathlike | None = None,
    dataset: Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | Pathlike | None = None,
    overwrite: bool = False,
    from_capture: Pathlike | None = None,
    progress: Progress | bool | None = None,
    **settings: object,
) -> StatsResult:
    """Statistics of every linear before and after rotation, by damage; as :func:`export`."""
    from exporter.commands.stats import stats as run

    given = _Given.of(model, recipe, dataset, tokenizer, settings)
    return run(
        given.recipe,
        _options(given.recipe, "stats", output, overwrite, from_capture=from_capture),
        model=given.model,
        tokenizer=given.tokenizer,
        progress=progress_of(progress),
    )


def sweep(
    model: Pathlike | None = None,
    recipe: Recipe | Pathlike | Mapping[str, object] | None = None,
    *,
    output: Pathlike,
    schemes: Sequence[str] = (),
    rotations: Sequence[str] = (),
    vary: Mapping[str, Sequence[object]] | None = None,
    jobs: int | None = None,
    speed: bool = True,
    resume: bool = False,
    progress: Progress | bool | None = None,
    **settings: object,
) -> SweepResult:
    """Export every combination of schemes, rotations and settings, each in a process of its own,
    and compare them.

    Args:
        model: a checkpoint folder or a hub id; by default the recipe's.
        recipe: what all points have in common, as ``source`` of :func:`load_recipe`.
        output: gets an export for each point, and ``sweep.json``.
        schemes: names of schemes.
        rotations: sets as ``--rotate`` takes them.
        vary: values by dotted recipe key.
        jobs: exports at once; by default as many as cores and memory allow.
        speed: measure tokens per second at the end.
        resume: go on from the points that ``output`` holds.
        progress: as for :func:`export`.
        settings: recipe values by the name of an option.

    Raises:
        calib.errors.RotqError: a known failure, with a hint.
    """
    from exporter.sweeping.sweep import SweepOptions
    from exporter.sweeping.sweep import sweep as run

    if model is not None:
        settings["model"] = os.fspath(model)
    grid = {
        **({"scheme": list(schemes)} if schemes else {}),
        **({"rotate": list(rotations)} if rotations else {}),
        **{key: [str(value) for value in values] for key, values in (vary or {}).items()},
    }
    return run(
        load_recipe(recipe, keyed(settings)),
        grid,
        SweepOptions(Path(output), resume=resume, jobs=jobs, speed=speed),
        progress=progress_of(progress),
    )


@dataclass(frozen=True)
class _Given:
    """What a caller gave, as the commands take it."""

    recipe: Recipe
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | Pathlike | None,
        recipe: Recipe | Pathlike | Mapping[str, object] | None,
        dataset: Dataset | None,
        tokenizer: PreTrainedTokenizerBase | Pathlike | None,
        settings: Mapping[str, object],
    ) -> _Given:
        """Arguments as for :func:`export`."""
        values = dict(settings)
        own, loaded = None, tokenizer_of(tokenizer)
        if isinstance(model, str | os.PathLike):
            values["model"] = os.fspath(model)
        elif model is not None:
            own = model
            values["model"] = str(getattr(model, "name_or_path", "") or type(model).__name__)
        if dataset is not None:
            where = own if own is not None else load_recipe(recipe, keyed(values)).model
            values["calib_dataset"] = text_of(dataset, loaded, where)
        return cls(load_recipe(recipe, keyed(values)), own, loaded)


def _recipe_of_artifact(folder: Path) -> Path | None:
    """The recipe that lies with it, which says where its original is."""
    from exporter.recipe import RECIPE_FILE

    saved = folder / RECIPE_FILE
    return saved if saved.is_file() else None


def _options(
    recipe: Recipe,
    goal: str,
    output: Pathlike | None,
    overwrite: bool,
    work_dir: Pathlike | None = None,
    resume: bool = False,
    from_capture: Pathlike | None = None,
) -> RunOptions:
    from exporter.run.destination import default_output
    from exporter.run.options import RunOptions as Options

    return Options(
        output=default_output(recipe, goal) if output is None else Path(output),
        overwrite=overwrite,
        work_dir=None if work_dir is None else Path(work_dir),
        resume=resume,
        from_capture=None if from_capture is None else Path(from_capture),
    )
