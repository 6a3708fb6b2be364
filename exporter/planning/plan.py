"""What a run would do, how much it would read, hold and write, and roughly how long it would take:
``--dry-run``.

Nothing is loaded: sizes come from ``config.json`` and the safetensors headers, so planning a 70B
model takes a second.

The time is an estimate from floating-point operations. One forward pass costs ``2 · (weights in
matmuls)`` per token, plus ``2 · layers · seqlen · heads · head_dim`` for causal attention. A device
is taken to deliver :data:`EFFICIENCY` of its matmul throughput; the CPU's is timed here, a GPU's is
:data:`GPU_FLOPS`. To this come fixed costs: importing the libraries and tracing the graph. Small
models are dominated by those, and by overheads that this model does not know; large ones by the
passes.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calib.errors import UnsupportedModelError
from calib.schemes import FLOAT, PerBlock, PerChannel, Scheme
from calib.weights.algorithms import algorithm_named
from exporter.environment import cuda_devices
from exporter.planning.headers import CheckpointHeaders, TensorHeader, read_artifact, read_headers
from exporter.planning.targets import planned_artifact, planned_dtypes, planned_warnings
from exporter.recipe import RECIPE_FILE, Recipe, parse_size
from exporter.reporting.report import COMPARED_ROWS, REPORT_FILE, ROTATE_REPORT_FILE
from exporter.run.quantizing import customised_scheme

if TYPE_CHECKING:
    from exporter.run.options import RunOptions

Goal = Literal["export", "calibrate", "capture", "rotate"]

EFFICIENCY = 0.5
"""Share of the matmul throughput that a whole forward pass reaches: norms, softmax and memory
traffic take the rest. Measured 0.3 to 0.65 for the embedded model on two cores that other jobs used
too."""
LIBRARY_BYTES = 500 * 2**20
"""Resident memory once torch, transformers and ModelOpt are imported; measured 473 MiB."""
GPU_FLOPS = 2e13
"""Float32 matmul throughput assumed for a CUDA device. Data-centre cards of the last generations
reach 2 to 6 e13.
"""
IMPORT_SECONDS = 15.0
"""Importing torch, transformers and ModelOpt; measured 7 to 13 s for ModelOpt alone."""
TRACE_SECONDS_PER_LAYER = 2.0
"""torch.onnx.export of one decoder layer, whatever its width."""
_SCALES = ("_scale", "_zero_point")
GATE_CANDIDATES = 4
"""Rotation sets that ``--rotate auto`` compares."""
PARITY_PASSES = 7
"""Forward passes over the evaluation rows: float and rotated; fake-quant and split-sum; the runtime
in two modes; the per-layer comparison."""
FLOPS_PER_ENTRY = 4
"""Of training on X [tokens, n], for each token and entry of Q: X Q and the gradient or target, at 2
operations each.
"""

_FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_BLOCK = re.compile(r"\.\d+\.")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_EMBEDDING = re.compile(r"(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
_SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_FILES = {
    "onnx": ("model.onnx", "model.onnx.data"),
    "safetensors": ("model.safetensors (sharded above 5 GB)",),
    "calibrate": ("quantized_model.safetensors (sharded above 5 GB)", "quantized_model.json"),
    "capture": ("capture statistics and token reservoirs (safetensors and JSON)",),
    "rotate": ("model.safetensors (sharded above 5 GB)",),
}


@dataclass(frozen=True)
class Stage:
    """One step of a run."""

    name: str
    detail: str
    seconds: float


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

    @property
    def seconds(self) -> float:
        """Of all stages together."""
        return sum(stage.seconds for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "seconds": self.seconds}


@dataclass(frozen=True)
class _Sizes:
    """What the estimates need to know about a model."""

    hidden: int
    layers: int
    attention: int
    """heads · head_dim"""
    kv_heads: int
    head_dim: int
    vocabulary: int
    seqlen: int
    blocks: tuple[TensorHeader, ...]
    """Weights of the decoder's linears."""
    head: int
    """Elements of the output projection."""
    parameters: int
    stored: int
    """Parameters once a tied head has its own copy."""

    @property
    def linear_parameters(self) -> int:
        return sum(tensor.elements for tensor in self.blocks)

    def forward_flops(self, tokens: int) -> float:
        matmuls = 2 * (self.linear_parameters + self.head)
        return float(tokens) * (matmuls + 2 * self.layers * self.seqlen * self.attention)


def plan(recipe: Recipe, options: RunOptions, *, goal: Goal = "export") -> Plan:
    """Work out a run from the checkpoint's headers.

    Raises:
        CheckpointError, UnsupportedModelError, QuantizationError: what the run itself would refuse
            at its start.
    """
    artifact = None if options.from_artifact is None else read_artifact(options.from_artifact)
    checkpoint = (
        read_headers(recipe.model, recipe.revision) if artifact is None else artifact.checkpoint
    )
    model_type = str(checkpoint.config.get("model_type", "unknown"))
    _check_model_type(model_type)
    sizes = _sizes(checkpoint, recipe)
    scheme = customised_scheme(recipe)
    made = artifact or planned_artifact(
        recipe, checkpoint, [tensor.name.removesuffix(".weight") for tensor in sizes.blocks]
    )
    warnings = planned_warnings(recipe, made) if goal == "export" else []
    flops = GPU_FLOPS if _on_gpu(recipe.device) else matmul_flops()
    before = sum(tensor.nbytes for tensor in checkpoint.tensors)
    if goal == "capture":
        after = sizes.parameters * 4
    elif goal == "rotate":
        after = sizes.stored * _FLOAT_BYTES.get(recipe.dtype, before // max(1, sizes.parameters))
    else:
        dtypes = planned_dtypes(recipe, checkpoint, calibrated=artifact is not None)
        written = list(dtypes.values()) if goal == "export" else list(dtypes.values())[:1]
        after = sum(_bytes_after(sizes, scheme, _FLOAT_BYTES[dtype]) for dtype in written)
    return Plan(
        goal=goal,
        model=checkpoint.source,
        model_type=model_type,
        parameters=sizes.parameters,
        quantized_parameters=(
            0 if goal in ("capture", "rotate") or scheme.weight is None else sizes.linear_parameters
        ),
        bytes_before=before,
        bytes_after=_capture_bytes(sizes, recipe) if goal == "capture" else after,
        peak_memory=_peak_memory(sizes, recipe, goal, after),
        stages=tuple(_stages(recipe, options, goal, sizes, scheme, flops * EFFICIENCY)),
        output=None if options.output == Path() else str(options.output),
        files=_files(recipe, goal),
        recipe=recipe.to_yaml(),
        warnings=tuple(warnings),
    )


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


def _check_model_type(model_type: str) -> None:
    from calib.architectures import supported_model_types

    if model_type not in supported_model_types():
        raise UnsupportedModelError(
            f"model_type '{model_type}' is not in the architecture table; "
            f"supported are: {', '.join(supported_model_types())}",
            hint="use a model of a supported family; rotq never guesses how a model is wired",
        )


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and bool(cuda_devices()))


def _sizes(checkpoint: CheckpointHeaders, recipe: Recipe) -> _Sizes:
    config = checkpoint.config.get("text_config") or checkpoint.config

    def number(*keys: str, default: int = 1) -> int:
        return int(next((config[key] for key in keys if config.get(key)), default))

    hidden = number("hidden_size", "n_embd")
    heads = number("num_attention_heads", "n_head")
    head_dim = number("head_dim", default=hidden // heads)
    # Weights only: the scales of an artifact are 1-D or 2-D too.
    weights = [
        tensor
        for tensor in checkpoint.tensors
        if len(tensor.shape) >= 2 and not tensor.name.endswith(_SCALES)
    ]
    embedding = next((tensor.elements for tensor in weights if _EMBEDDING.search(tensor.name)), 0)
    head = next((tensor.elements for tensor in weights if _HEAD.search(tensor.name)), 0)
    parameters = sum(tensor.elements for tensor in checkpoint.tensors)
    return _Sizes(
        hidden=hidden,
        layers=number("num_hidden_layers", "n_layer"),
        attention=heads * head_dim,
        kv_heads=number("num_key_value_heads", default=heads),
        head_dim=head_dim,
        vocabulary=number("vocab_size"),
        seqlen=min(
            recipe.calibration.seqlen,
            number("max_position_embeddings", "n_positions", default=2**31),
        ),
        blocks=tuple(tensor for tensor in weights if _BLOCK.search(tensor.name)),
        head=head or embedding,
        parameters=parameters,
        stored=parameters + (0 if head else embedding),
    )


def _bytes_after(sizes: _Sizes, scheme: Scheme, width: int) -> int:
    if scheme.weight is None:
        return sizes.stored * width
    total = (sizes.stored - sizes.linear_parameters) * width
    for tensor in sizes.blocks:
        total += math.ceil(tensor.elements * scheme.weight.format.bits / 8)
        match scheme.weight.granularity:
            case PerChannel():
                total += math.prod(tensor.shape[:-1]) * width
            case PerBlock(size=size):
                total += math.prod(tensor.shape[:-1]) * math.ceil(tensor.shape[-1] / size) * width
            case _:
                total += width
    return total


def _capture_bytes(sizes: _Sizes, recipe: Recipe) -> int:
    """Float64 covariances and float32 samples: one of each for R1; for R2 one a layer, its
    covariance by KV head.
    """
    r1 = 8 * sizes.hidden**2 + 4 * recipe.rotation.r1_tokens * sizes.hidden
    r2 = 8 * sizes.kv_heads * sizes.head_dim**2 + 4 * recipe.rotation.r2_tokens * sizes.attention
    return r1 + sizes.layers * r2


def _peak_memory(sizes: _Sizes, recipe: Recipe, goal: Goal, after: int) -> int:
    """The libraries, the float32 model, the statistics, the largest weight in float64 twice, the
    logits of a batch, and the output.
    """
    largest = max((tensor.elements for tensor in sizes.blocks), default=0)
    if recipe.layerwise.enabled and goal in ("export", "calibrate"):
        block = sizes.linear_parameters // sizes.layers
        outside = (sizes.stored - sizes.linear_parameters) * 4
        return (
            LIBRARY_BYTES
            + max(8 * block, outside)
            + 16 * largest
            + parse_size(recipe.layerwise.max_memory)
        )
    logits = recipe.calibration.batch_size * sizes.seqlen * sizes.vocabulary * 4
    written = 0 if goal == "capture" else after
    return (
        LIBRARY_BYTES
        + 4 * sizes.stored
        + _capture_bytes(sizes, recipe)
        + 16 * largest
        + logits
        + written
    )


def _stages(
    recipe: Recipe, options: RunOptions, goal: Goal, sizes: _Sizes, scheme: Scheme, rate: float
) -> list[Stage]:
    """The steps in order, with their time at ``rate`` floating-point operations a second."""
    data = recipe.calibration
    one_pass = sizes.forward_flops(data.nsamples * sizes.seqlen) / rate
    stages = [Stage("start", "import torch, transformers and ModelOpt", IMPORT_SECONDS)]
    if options.from_artifact is None:
        rows = f"{data.nsamples} rows of {sizes.seqlen} tokens of {data.dataset}"
        stages.append(
            Stage(
                "load",
                f"read {sizes.parameters:,} parameters, fold the norms",
                sizes.stored * 4 / 1e9,
            )
        )
        wanted = (
            {"r1", "r2"}
            if recipe.rotate == "auto"
            else {"r1", "r2"} & set(recipe.rotate.split(","))
        )
        if recipe.rotation.files or recipe.layerwise.enabled or recipe.scheme == FLOAT:
            # files are taken to hold all that is wanted; the others have Hadamard matrices
            wanted = set()
        if goal == "capture" or wanted:
            reused = options.from_capture
            what = f"statistics of {rows}" if reused is None else f"reuse {reused}"
            stages.append(Stage("capture", what, one_pass if reused is None else 0.0))
        if goal == "capture":
            return stages
        stages += _training_stages(recipe, sizes, wanted, rate)
        if goal == "rotate":
            return stages + _rotating_stages(recipe, sizes, rate)
        stages += _quantizing_stages(recipe, sizes, scheme, rate, rows)
    if goal == "calibrate":
        return stages
    write = sizes.layers * TRACE_SECONDS_PER_LAYER if recipe.backend == "onnx" else 0.0
    for target in recipe.targets:
        named = f"{recipe.backend} ({target or 'default target'})"
        stages.append(Stage("write", named, write + sizes.stored * 4 / 1e9))
        if options.verify:
            evaluation_tokens = recipe.evaluation.nsamples * sizes.seqlen
            parity = PARITY_PASSES * sizes.forward_flops(evaluation_tokens) / rate
            stages.append(
                Stage("verify", f"three rungs of parity on {evaluation_tokens:,} tokens", parity)
            )
    return stages


def _training_stages(recipe: Recipe, sizes: _Sizes, wanted: set[str], rate: float) -> list[Stage]:
    rotation = recipe.rotation
    stages = []
    if "r1" in wanted:
        flops = FLOPS_PER_ENTRY * rotation.r1.epochs * rotation.r1_tokens * sizes.hidden**2
        detail = (
            f"{sizes.hidden} x {sizes.hidden}, {rotation.r1.epochs} epochs, {rotation.r1.optimizer}"
        )
        stages.append(Stage("train R1", detail, flops / rate))
    if "r2" in wanted:
        count = sizes.layers * sizes.kv_heads
        flops = (
            FLOPS_PER_ENTRY * rotation.r2.epochs * rotation.r2_tokens * sizes.head_dim**2 * count
        )
        detail = (
            f"{count} of {sizes.head_dim} x {sizes.head_dim}, {rotation.r2.epochs} epochs,"
            f" {rotation.r2.optimizer}"
        )
        stages.append(Stage("train R2", detail, flops / rate))
    return stages


def _rotating_stages(recipe: Recipe, sizes: _Sizes, rate: float) -> list[Stage]:
    """Fusing once, writing, and comparing the written folder with the original."""
    tokens = min(COMPARED_ROWS, recipe.evaluation.nsamples) * sizes.seqlen
    return [
        Stage("fuse", "exact, in float64", 4 * sizes.stored * sizes.hidden / rate),
        Stage("write", "a Hugging Face folder", sizes.stored * 4 / 1e9),
        Stage(
            "compare",
            f"the folder with the original on {tokens:,} tokens",
            2 * sizes.forward_flops(tokens) / rate,
        ),
    ]


def _quantizing_stages(
    recipe: Recipe, sizes: _Sizes, scheme: Scheme, rate: float, rows: str
) -> list[Stage]:
    """Fusing and calibrating, once for each candidate of ``--rotate auto``, and the comparison of
    these.
    """
    candidates = GATE_CANDIDATES if recipe.rotate == "auto" and recipe.scheme != FLOAT else 1
    each = f", for {candidates} rotation sets" if candidates > 1 else ""
    # Every weight meets one residual rotation, in float64, at half of float32's speed.
    stages = [
        Stage(
            "fuse", f"exact, in float64{each}", candidates * 4 * sizes.stored * sizes.hidden / rate
        )
    ]
    algorithm = algorithm_named(recipe.weights.algorithm)
    if (
        scheme.weight_only
        and not algorithm.needs_moment
        and recipe.kv is None
        and recipe.smoothing == "none"
    ):
        stages.append(Stage("calibrate", f"scales of the weights only: needs no data{each}", 0.0))
    else:
        one_pass = sizes.forward_flops(recipe.calibration.nsamples * sizes.seqlen) / rate
        what = "block by block" if recipe.layerwise.enabled else "limits"
        if algorithm.name != "rtn":
            what += f", weights by {algorithm.name}"
        stages.append(Stage("calibrate", f"{what} over {rows}{each}", candidates * one_pass))
    if candidates > 1:
        tokens = recipe.gate.nsamples * sizes.seqlen
        compared = (candidates + 1) * sizes.forward_flops(tokens) / rate
        stages.append(
            Stage(
                "gate",
                f"the {candidates} sets and the original on {tokens:,} held-out tokens",
                compared,
            )
        )
    return stages


def _files(recipe: Recipe, goal: Goal) -> tuple[str, ...]:
    if goal == "capture":
        return (*_FILES["capture"], RECIPE_FILE)
    rotations = ("rotations.safetensors", "rotations.json")
    if goal == "rotate":
        return (
            *_FILES["rotate"],
            *_SIDE_FILES,
            *rotations,
            RECIPE_FILE,
            ROTATE_REPORT_FILE,
            "README.md",
        )
    weights = (
        _FILES["calibrate"]
        if goal == "calibrate"
        else _FILES.get(recipe.backend, (f"files of {recipe.backend}",))
    )
    last = (RECIPE_FILE,) if goal == "calibrate" else (RECIPE_FILE, REPORT_FILE, "README.md")
    return (*weights, *_SIDE_FILES, *rotations, *last)
