"""``rotq rotate``: the rotated float checkpoint, as a stock Hugging Face folder.

The folder is checked before it is put in place: it is loaded as any user would, and its logits are
compared with those of the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.artifact.files import copy_side_files
from calib.errors import CheckpointError, RotationError, UnsupportedModelError
from calib.fusing import FusedModel, fuse, materialize
from calib.modules.attention import attention_implementation
from calib.progress import Progress, silent, track
from calib.rotations.files import save_rotations
from calib.rotations.foreign import export_dartquant
from calib.rotations.rotation_set import RotationSet
from exporter.commands.export import Run
from exporter.output import atomic_folder
from exporter.output import check_target as check_output
from exporter.recipe import RECIPE_FILE, Recipe
from exporter.reporting.card import CARD_FILE, render_rotated_card, source_license
from exporter.reporting.describe import package_versions
from exporter.reporting.report import (
    COMPARED_ROWS,
    ModelSummary,
    ParityRow,
    RotateReport,
    RotationGateRow,
)
from exporter.run.options import RunOptions
from exporter.run.rotations import kinds_of, rotation_summaries
from exporter.source import Source

FLOAT32_BOUND = 1e-5
"""Relative L2 of logits: the fold is exact, and rounding to float32 alone costs about 3e-7."""
ROUNDING_FACTOR = 2.0
"""In a shorter dtype: how much farther from the float32 original the folder may be than the
original in that dtype. The rotated weights are rounded, where the original's are stored exactly:
one more error of the size of those that rounding activations makes anyway."""


@dataclass(frozen=True)
class RotateResult:
    """What :func:`rotate` made."""

    output: Path
    recipe: Recipe
    rotations: RotationSet
    report: RotateReport


def rotate(
    recipe: Recipe,
    options: RunOptions,
    *,
    write_dartquant: bool = False,
    model: Any = None,
    tokenizer: Any = None,
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
    check_output(options.output, options.overwrite)
    # Rotations are trained in float32 whatever is written, so that one capture serves every dtype.
    run = Run(recipe.model_copy(update={"dtype": "float32"}), options, model, tokenizer, progress)
    source = run.source
    kinds = _kinds(recipe, source, run.given)
    found = run.rotations(kinds)
    dtype = _stored_dtype(recipe, source)
    with run.stage("fuse"):
        fused = fuse(
            source.checkpoint,
            source.wiring,
            found.rotations,
            dtype=dtype,
            device=run.device,
            progress=progress,
        )
    if fused.refusals:
        raise UnsupportedModelError(
            f"a stock folder cannot hold the rotated model: {'; '.join(fused.refusals)}",
            hint="`rotq export` can write it; or try --dtype float32",
        )
    with atomic_folder(options.output, overwrite=options.overwrite) as folder:
        with run.stage("write"):
            _write(fused, source, recipe, folder)
            if write_dartquant:
                export_dartquant(found.rotations, folder)
        with run.stage("compare"):
            parity = compare_folder(
                folder, source, run.rows.evaluation[:COMPARED_ROWS], dtype, run.device, progress
            )
        report = RotateReport(
            model=ModelSummary(
                source=source.name,
                model_type=source.config.model_type,
                parameters=source.parameters(),
                fingerprint=run.fingerprint,
            ),
            dtype=str(dtype).removeprefix("torch."),
            scheme=recipe.scheme,
            rotate=",".join(found.rotations.kinds()) or "none",
            rotations=rotation_summaries(found.rotations),
            rotation_gate=[RotationGateRow.model_validate(asdict(row)) for row in found.table],
            parity=parity,
            seconds=run.seconds,
            versions=package_versions(),
        )
        card = render_rotated_card(recipe, report, source_license(recipe))
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        report.save(folder)
    return RotateResult(options.output, recipe, found.rotations, report)


def compare_folder(
    folder: Path,
    source: Source,
    rows: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = silent,
) -> list[ParityRow]:
    """Relative L2 of the logits of a written folder against the original in float32.

    Args:
        folder: a checkpoint folder, loaded with ``AutoModelForCausalLM``.
        source: the original.
        rows: token rows ``[tokens]``.
        dtype: what the folder is stored and run in.
        device: where both run.
        progress: called after every row.

    Raises:
        RotationError: a figure misses its bound, or the folder lacks or has too many tensors.
    """
    original, rotated = (
        source.original(device),
        _reload(folder, attention_implementation(source.config), dtype, device),
    )
    short = dtype is not torch.float32
    rounded = _parameters_in(deepcopy(original), dtype) if short else None
    lost = {"rotated": 0.0, "original": 0.0}
    power = 0.0
    with torch.no_grad():
        for row in track(rows, "compare", len(rows), progress):
            ids = row.unsqueeze(0).to(device)
            wanted = original(input_ids=ids).logits.double()
            power += float(wanted.square().sum())
            lost["rotated"] += float(
                (rotated(input_ids=ids).logits.double() - wanted).square().sum()
            )
            if rounded is not None:
                lost["original"] += float(
                    (rounded(input_ids=ids).logits.double() - wanted).square().sum()
                )
    errors = {name: (value / power) ** 0.5 for name, value in lost.items()}
    name = str(dtype).removeprefix("torch.")
    bound = ROUNDING_FACTOR * errors["original"] if short else FLOAT32_BOUND
    figures = [_row(f"rotated folder in {name}, original in float32", errors["rotated"], bound)]
    if short:
        figures.append(_row(f"original in {name}, original in float32", errors["original"], None))
    if not errors["rotated"] <= bound:
        raise RotationError(
            "the rotated folder does not compute what the original does: relative L2 of logits "
            f"{errors['rotated']:.3g}, bound {bound:.3g}",
            hint="this should not happen: please report it, with the model and the recipe",
        )
    return figures


def _row(name: str, measured: float, bound: float | None) -> ParityRow:
    passed = None if bound is None else measured <= bound
    return ParityRow(
        rung=1, name=name, metric="relative L2", measured=measured, bound=bound, passed=passed
    )


def _refuse_online(recipe: Recipe) -> None:
    online = sorted({"r3", "r4"} & set(recipe.rotate.split(",")))
    if online:
        rest = ",".join(kind for kind in recipe.rotate.split(",") if kind not in online) or "r1,r2"
        raise RotationError(
            f"a stock folder cannot carry {' and '.join(kind.upper() for kind in online)}: online"
            " rotations are computed at run time, and the model code that loads the folder does"
            " not know of them",
            hint=(
                f"give --rotate {rest}, or write a graph that holds them with `rotq export"
                " --backend onnx`"
            ),
        )


def _kinds(recipe: Recipe, source: Source, given: RotationSet) -> list[str]:
    if recipe.rotate == "auto":
        kinds = [kind for kind in ("r1", "r2") if source.wiring.refusal(kind) is None]
    else:
        kinds = kinds_of(recipe.rotate)
    unused = set(given.kinds()) - set(kinds)
    if unused:
        raise RotationError(
            f"the given files hold {', '.join(kind.upper() for kind in sorted(unused))}, which this"
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
    copy_side_files(source.files, folder)
    save_rotations(fused.rotations, folder)
    (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")


def _reload(folder: Path, attention: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, output_loading_info=True
    )
    wrong = sorted({str(key) for names in info.values() for key in names})
    if wrong:
        raise CheckpointError(
            "transformers does not load the rotated folder as it was written:"
            f" {', '.join(wrong[:4])}",
            hint="this should not happen: please report it, with the model and the recipe",
        )
    network: nn.Module = model.to(device).eval()
    return network


def _parameters_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` in ``dtype`` as from_pretrained gives it: buffers such as rotary frequencies stay
    in float32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
