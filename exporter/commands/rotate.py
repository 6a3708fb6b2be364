"""``rotq rotate``: the rotated float checkpoint, as a stock Hugging Face folder.

The folder is checked before it is put in place: it is loaded as any user would, and its logits are
compared with those of the original.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from backends.cpu import cpu_words
from calib.architectures import Kind
from calib.artifact.older_config import with_older_keys
from calib.artifact.side_files import copy_side_files
from calib.errors import RotationError, UnsupportedModelError
from calib.fusing import FusedModel, materialize
from calib.process.ambient import plain_torch
from calib.process.progress import Progress, silent
from calib.rotations.files import save_rotations
from calib.rotations.foreign import export_dartquant
from calib.rotations.from_capture import TrainedRotations
from calib.rotations.rotate import FOLDED, Rotate
from calib.rotations.rotation_set import RotationSet
from exporter.parity.fold import check_folder
from exporter.recipe import RECIPE_FILE, Recipe
from exporter.reporting.card import render_rotated_card, source_license
from exporter.reporting.describe import (
    CONFIG_FILE,
    package_versions,
    rotation_summaries,
    source_summary,
)
from exporter.reporting.html import page
from exporter.reporting.report import (
    CARD_FILE,
    COMPARED_ROWS,
    ParityRow,
    RotateReport,
    RotationGateRow,
)
from exporter.run.destination import Destination
from exporter.run.generic import check_generic
from exporter.run.inputs import Inputs, open_inputs
from exporter.run.options import RunOptions
from exporter.run.quantizing import warn_of_slow_choices
from exporter.run.reservation import reserved
from exporter.run.rotations import imported_rotations, trained_rotations
from exporter.run.stopwatch import Stopwatch
from exporter.run.workdir import WorkDir
from exporter.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class RotateResult:
    """What :func:`rotate` made."""

    output: Path
    recipe: Recipe
    rotations: RotationSet
    report: RotateReport

    def __repr__(self) -> str:
        words = ", ".join(f"{name} {value}" for name, value in self._facts().items())
        return f"RotateResult('{self.output}': {words})"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return page(str(self.output), self._facts())

    def _facts(self) -> dict[str, object]:
        return {
            "rotate": self.report.rotate,
            "dtype": self.report.dtype,
        }


@plain_torch()
def rotate(
    recipe: Recipe,
    options: RunOptions,
    *,
    write_dartquant: bool = False,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress = silent,
) -> RotateResult:
    """Write the rotated float checkpoint.

    Args:
        recipe: what to do. ``rotate`` may be ``auto`` (R1 and R2, as far as the architecture offers
            them), ``none``, or some of r1 and r2; ``dtype`` ``auto`` is the source's own.
        options: where, and what to reuse.
        write_dartquant: also write the rotations as DartQuant's ``r1.pt`` and ``r2.pt``.
        model: a Hugging Face causal LM to use instead of ``recipe.model``.
        tokenizer: its tokenizer, where the model's folder is not at hand.
        progress: called after every unit of work.

    Raises:
        RotqError: a known failure, among them a folder that does not compute what the original
            does; nothing was written then.
    """
    _refuse_online(recipe)
    clock = Stopwatch(progress)
    with clock.profiled(options.profile), reserved(recipe, options) as output:
        warn_of_slow_choices(recipe)

        # Rotations are trained in float32 whatever is written, so that one capture serves every
        # dtype.
        training = recipe.model_copy(update={"dtype": "float32"})
        inputs = open_inputs(training, Destination.of(recipe), model, tokenizer)
        check_generic(recipe, inputs.source.wiring.architecture, "rotate")
        work = WorkDir.of(options, inputs)
        imported = imported_rotations(recipe, inputs.source)
        kinds = _kinds(inputs, imported)
        rows = inputs.rows(clock)
        trained = trained_rotations(kinds, inputs, imported, rows.train, options, work, clock)

        source, dtype = inputs.source, _stored_dtype(recipe, inputs.source)
        fused = _fused(inputs, trained.rotations, dtype, clock)
        with output.folder() as folder:
            with clock.stage("write"):
                _write(fused, source, recipe, folder)
                if write_dartquant:
                    export_dartquant(trained.rotations, folder)
            with clock.stage("compare"):
                compared = rows.evaluation[:COMPARED_ROWS]
                parity = check_folder(folder, source, compared, dtype, inputs.device, progress)
            report = _report(recipe, source, trained, dtype, parity, clock)
            card = render_rotated_card(recipe, report, source_license(recipe))
            (folder / CARD_FILE).write_text(card, encoding="utf-8")
            report.save(folder)
    return RotateResult(options.output, recipe, trained.rotations, report)


def _fused(
    inputs: Inputs, rotations: RotationSet, dtype: torch.dtype, clock: Stopwatch
) -> FusedModel:
    with clock.stage("fuse"):
        fused = inputs.source.fuse(
            rotations, dtype=dtype, device=inputs.device, progress=clock.progress
        )
    if fused.refusals:
        raise UnsupportedModelError(
            f"a stock folder cannot hold the rotated model: {'; '.join(fused.refusals)}",
            hint="`rotq export` can write it; or try --dtype float32",
        )
    return fused


def _report(
    recipe: Recipe,
    source: Source,
    trained: TrainedRotations,
    dtype: torch.dtype,
    parity: list[ParityRow],
    clock: Stopwatch,
) -> RotateReport:
    return RotateReport(
        model=source_summary(source),
        dtype=str(dtype).removeprefix("torch."),
        scheme=recipe.scheme,
        rotate=str(Rotate.of(trained.rotations.kinds())),
        rotations=rotation_summaries(trained.rotations),
        rotation_gate=[RotationGateRow.model_validate(asdict(row)) for row in trained.table],
        parity=parity,
        **clock.figures(),
        versions=package_versions(),
        cpu=cpu_words(),
        threads=torch.get_num_threads(),
    )


def _refuse_online(recipe: Recipe) -> None:
    online = [kind for kind in recipe.rotate.certain if kind not in FOLDED]
    if not online:
        return
    folded = Rotate.of(set(recipe.rotate.certain) - set(online))
    rest = folded if folded.certain else Rotate.of(FOLDED)
    raise RotationError(
        f"a stock folder cannot carry {' and '.join(kind.upper() for kind in online)}: online"
        " rotations are computed at run time, and the model code that loads the folder does"
        " not know of them",
        hint=(
            f"give --rotate {rest}, or write a graph that holds them with `rotq export"
            " --backend onnx`"
        ),
    )


def _kinds(inputs: Inputs, imported: RotationSet) -> tuple[Kind, ...]:
    kinds = inputs.recipe.rotate.folded(inputs.offered).certain
    unused = Rotate.of(set(imported.kinds()) - set(kinds)).certain
    if unused:
        raise RotationError(
            f"the given files hold {', '.join(kind.upper() for kind in unused)}, which this"
            " run leaves out",
            hint="a stock folder carries R1 and R2; name those that the files hold with --rotate",
        )
    return kinds


def _stored_dtype(recipe: Recipe, source: Source) -> torch.dtype:
    if recipe.dtype != "auto":
        dtype: torch.dtype = getattr(torch, recipe.dtype)
        return dtype
    return source.checkpoint[next(iter(source.checkpoint))].dtype


def _write(fused: FusedModel, source: Source, recipe: Recipe, folder: Path) -> None:
    # transformers writes the tensors under the names of published checkpoints, which runtimes other
    # than it read, and shards them with huggingface_hub.
    network: Any = materialize(fused)
    network.save_pretrained(folder)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    (folder / CONFIG_FILE).write_text(
        json.dumps(with_older_keys(config), indent=2) + "\n", encoding="utf-8"
    )
    copy_side_files(source.files, folder)
    save_rotations(fused.rotations, folder)
    (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
