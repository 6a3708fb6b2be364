"""What a run would do, how much it would read, hold and write, and roughly how long it would take:
``--dry-run``.

Nothing is loaded: sizes come from ``config.json`` and the safetensors headers, so planning a 70B
model takes a second.

A device is taken to deliver :data:`EFFICIENCY` of its matmul throughput; the CPU's is timed here, a
GPU's is :data:`GPU_FLOPS`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calib.architectures import Kind, architecture_of
from calib.rotations.rotate import FOLDED, GateSet, gate_sets
from calib.schemes import FLOAT, LinearScheme, Scheme
from exporter.environment import cuda_devices
from exporter.planning.artifact import planned_artifact
from exporter.planning.files import (
    calibrate_files,
    capture_files,
    export_files,
    rotate_files,
)
from exporter.planning.headers import (
    ArtifactHeaders,
    CheckpointHeaders,
    check_headers,
    read_artifact,
    read_headers,
)
from exporter.planning.sizes import (
    FLOAT_BYTES,
    Sizes,
    capture_bytes,
    peak_memory,
    sizes_of,
    weight_bytes,
)
from exporter.planning.stages import Goal, Stage, Work, stages_of
from exporter.recipe import Recipe
from exporter.run.blocks import with_blocks
from exporter.run.calibration_text import check_text
from exporter.run.destination import Destination
from exporter.run.generic import check_generic
from exporter.run.options import RunOptions
from exporter.run.preflight import (
    check_disk,
    check_libraries,
    check_unlocked,
    row_warnings,
    tokenizer_warnings,
)
from exporter.run.quantizing import customised_scheme
from exporter.run.tables import with_tables

__all__ = ["Goal", "Plan", "Stage", "matmul_flops", "plan"]

EFFICIENCY = 0.5
"""Share of the matmul throughput that a whole forward pass reaches: norms, softmax and memory
traffic take the rest. Measured 0.3 to 0.65 for the embedded model on two cores that other jobs used
too."""
GPU_FLOPS = 2e13
"""Float32 matmul throughput assumed for a CUDA device. Data-centre cards of the last generations
reach 2 to 6 e13.
"""


@dataclass(frozen=True)
class Plan:
    """A run that has not happened. All sizes in bytes, of all targets together; ``peak_memory`` and
    ``seconds`` are estimates.
    """

    goal: Goal
    model: str
    model_type: str
    parameters: int
    quantized_parameters: int
    bytes_before: int
    bytes_after: int
    peak_memory: int
    stages: tuple[Stage, ...]
    output: str | None
    """``None`` where no folder was named, which a dry run allows."""
    files: tuple[str, ...]
    recipe: str
    """The complete resolved recipe, as YAML."""
    warnings: tuple[str, ...] = ()
    """What a target runs slowly."""
    source_quantized: str | None = None
    """How the stored weights are quantized that are read as floats, in words."""

    @property
    def seconds(self) -> float:
        """Of all stages together."""
        return sum(stage.seconds for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "seconds": self.seconds}


def plan(recipe: Recipe, options: RunOptions, *, goal: Goal = "export") -> Plan:
    """Work out a run from the checkpoint's headers.

    Raises:
        CheckpointError, DataError, UnsupportedModelError, QuantizationError: what the run itself
            would refuse at its start.
    """
    if options.from_artifact is None:
        check_text(recipe)
    destination = Destination.of(recipe)
    check_unlocked(options)
    if goal == "export":
        check_libraries(destination, options)
    artifact = None if options.from_artifact is None else read_artifact(options.from_artifact)
    checkpoint = (
        read_headers(recipe.model, recipe.revision) if artifact is None else artifact.checkpoint
    )
    model_type = str(checkpoint.config.get("model_type", "unknown"))
    family = architecture_of(checkpoint.config)
    if family.how == "generic":
        check_generic(recipe, family, goal, verify=options.verify)
    if artifact is None:
        check_headers(checkpoint, ignore_unused=recipe.ignore_unused)
    sizes, scheme = sizes_of(checkpoint, recipe), customised_scheme(recipe)
    if goal == "export" and artifact is None:
        recipe = with_blocks(
            with_tables(recipe, sizes.tables, destination, checkpoint.config),
            sizes.hidden,
            lambda each: planned_artifact(each, checkpoint, family, sizes.linears).linears,
            destination,
            checkpoint.config,
        )
        scheme = customised_scheme(recipe)
    model = artifact or planned_artifact(recipe, checkpoint, family, sizes.linears)
    if goal == "export":
        destination.check(recipe, checkpoint.config, model.linears, model.cache, model.rotations)
    dtypes = _dtypes(recipe, goal, destination, checkpoint, one=artifact is None)

    sets = _sets(recipe, goal, family.offered, destination, checkpoint.config)
    looks = family.how != "generic" and _looks_for_prefix(recipe, model)
    work = _work(recipe, options, goal, sizes, sets, prefix=looks)
    captured = capture_bytes(sizes, recipe, next(iter(dtypes.values())))
    before = sum(tensor.nbytes for tensor in checkpoint.tensors)
    weights = {
        target: weight_bytes(sizes, scheme, model.linears, dtype)
        for target, dtype in dtypes.items()
    }
    after, files = _output(recipe, options, goal, sizes, model, destination, weights, before)
    check_disk(options, captured.disk if goal == "capture" else after)
    layerwise = recipe.layerwise.enabled and goal in ("export", "calibrate")
    return Plan(
        goal=goal,
        model=checkpoint.source,
        model_type=model_type,
        parameters=sizes.parameters,
        quantized_parameters=(
            0 if goal in ("capture", "rotate") else _quantized(sizes, scheme, model.linears)
        ),
        bytes_before=before,
        bytes_after=captured.disk if goal == "capture" else after,
        peak_memory=peak_memory(sizes, recipe, captured, after, layerwise=layerwise),
        stages=tuple(stages_of(work)),
        output=None if options.output == Path() else str(options.output),
        files=files,
        recipe=recipe.to_yaml(),
        warnings=tuple(_warnings(recipe, options, goal, model, destination)),
        source_quantized=checkpoint.quantized,
    )


def _warnings(
    recipe: Recipe,
    options: RunOptions,
    goal: Goal,
    model: ArtifactHeaders,
    destination: Destination,
) -> list[str]:
    """What will be slow, missing or too little."""
    found = []
    if goal == "export":
        found += destination.warnings(model.linears, model.rotations)
    if options.from_artifact is None:
        found += tokenizer_warnings(model.checkpoint.beside, destination)
        found += row_warnings(recipe) if goal in ("export", "calibrate") else []
    return found


def matmul_flops(size: int = 768, seconds: float = 0.1) -> float:
    """Float32 matmul throughput of this CPU: the best of a few products, so that other jobs disturb
    it least.
    """
    import numpy as np

    a = np.full((size, size), 0.5, dtype=np.float32)
    a @ a  # the first product starts the thread pool
    best, stop = math.inf, time.perf_counter() + seconds
    while (start := time.perf_counter()) < stop:
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _work(
    recipe: Recipe,
    options: RunOptions,
    goal: Goal,
    sizes: Sizes,
    sets: tuple[GateSet, ...],
    *,
    prefix: bool,
) -> Work:
    """What the stages take their time from; the throughput of a CPU is timed for it."""
    flops = GPU_FLOPS if _on_gpu(recipe.device) else matmul_flops()
    return Work(
        recipe,
        options,
        goal,
        sizes,
        customised_scheme(recipe),
        sets,
        rate=flops * EFFICIENCY,
        prefix=prefix,
    )


def _quantized(sizes: Sizes, scheme: Scheme, linears: Mapping[str, LinearScheme]) -> int:
    """Elements that are quantized; arguments as for :func:`weight_bytes`."""
    tables = {sizes.tables.embedding: sizes.embedding, sizes.tables.head: sizes.head}
    if sizes.tied and len(tables.keys() & linears.keys()) == len(tables):
        del tables[sizes.tables.head]  # one tensor, which is quantized for each
    decoder = 0 if scheme.weight is None else sizes.linear_parameters
    return decoder + sum(elements for name, elements in tables.items() if name in linears)


def _looks_for_prefix(recipe: Recipe, model: ArtifactHeaders) -> bool:
    """Whether massive tokens are looked for: where one is asked for, or limits are fixed
    beforehand.
    """
    if recipe.prefix != "auto":
        return recipe.prefix != "none"
    fixed = (linear.input for linear in model.linears.values())
    return not recipe.layerwise.enabled and (
        model.cache is not None
        or any(each is not None and each.needs_calibration for each in fixed)
    )


def _dtypes(
    recipe: Recipe,
    goal: Goal,
    destination: Destination,
    checkpoint: CheckpointHeaders,
    *,
    one: bool,
) -> dict[str, str]:
    """What each target computes in, which is to be ``one`` where one calibration serves all."""
    # Rotations alone are trained in float32, whatever is written.
    asked = "float32" if goal == "rotate" else recipe.dtype
    if one:
        destination.common_dtype(asked, lambda: checkpoint.dtype)
    return destination.dtypes(asked, lambda: checkpoint.dtype)


def _sets(
    recipe: Recipe,
    goal: Goal,
    offered: tuple[Kind, ...],
    destination: Destination,
    config: Mapping[str, Any],
) -> tuple[GateSet, ...]:
    """The sets of rotations that a run goes through. Files are taken to hold all that is wanted."""
    if goal == "rotate":
        return (GateSet(recipe.rotate.folded(offered)),)
    refused = destination.refused_kinds(config) if goal == "export" else {}
    possible = [kind for kind in offered if kind not in refused]
    sets = recipe.rotate.sets(possible, quantizes=recipe.scheme != FLOAT)
    return gate_sets(sets, FOLDED if recipe.rotation.files else ())


def _output(
    recipe: Recipe,
    options: RunOptions,
    goal: Goal,
    sizes: Sizes,
    model: ArtifactHeaders,
    destination: Destination,
    weights: Mapping[str, int],
    before: int,
) -> tuple[int, tuple[str, ...]]:
    """Bytes and files of what is written; of a capture, the bytes beside the model."""
    side_files = model.checkpoint.side_files
    match goal:
        case "capture":
            return 0, capture_files()
        case "rotate":
            own = before // max(1, sizes.parameters)
            nbytes = sizes.stored * FLOAT_BYTES.get(recipe.dtype, own)
            return nbytes, rotate_files(side_files, nbytes)
        case "calibrate":
            nbytes = next(iter(weights.values()))
            return nbytes, calibrate_files(side_files, nbytes)
        case _:
            files = export_files(
                recipe, destination, model.linears, side_files, weights, page=options.report
            )
            return sum(weights.values()), files


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and bool(cuda_devices()))
