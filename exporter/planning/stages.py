"""The steps of a run that has not happened, and how long each may take.

The time is an estimate from floating-point operations. One forward pass costs ``2 · (weights in
matmuls)`` per token, plus ``2 · layers · seqlen · heads · head_dim`` for causal attention. To this
come fixed costs: importing the libraries and tracing the graph. Small models are dominated by
those, and by overheads that this model does not know; large ones by the passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from calib.architectures import Kind
from calib.rotations.rotate import GateSet, trainable, union
from calib.schemes import Scheme
from calib.weights.algorithms import algorithm_named
from exporter.planning.sizes import Sizes
from exporter.recipe import Recipe
from exporter.reporting.report import COMPARED_ROWS, PROOF_ROWS, PROOF_TOKENS
from exporter.run.options import RunOptions
from exporter.run.quantizing import GATE_ROW_TOKENS, GATE_TOKENS, QUICK_TOKENS, captured_tokens

Goal = Literal["export", "calibrate", "capture", "rotate"]

IMPORT_SECONDS = 15.0
"""Importing torch, transformers and ModelOpt; measured 7 to 13 s for ModelOpt alone."""
TRACE_SECONDS_PER_LAYER = 2.0
"""torch.onnx.export of one decoder layer, whatever its width."""
PROOF_PASSES = 7
"""Forward passes over the rows of rungs 1 and 2: float and rotated; fake-quant and split-sum; the
runtime in two modes; the per-layer comparison."""
QUALITY_PASSES = 2
"""Those of rung 3 over all evaluation rows: float, and the runtime."""
PREFIX_LOOK, PREFIX_SEARCH = 1024, 7 * 256
"""Tokens on which massive ones are looked for, and on which one more token of a prefix is: seven
candidates, as a rule (:mod:`calib.stats.massive`)."""
FLOPS_PER_ENTRY = 4
"""Of training on X [tokens, n], for each token and entry of Q: X Q and the gradient or target, at 2
operations each.
"""


@dataclass(frozen=True)
class Stage:
    """One step of a run."""

    name: str
    detail: str
    seconds: float


@dataclass(frozen=True)
class Work:
    """What a run does, as far as its time depends on it."""

    recipe: Recipe
    options: RunOptions
    goal: Goal
    sizes: Sizes
    scheme: Scheme
    sets: Sequence[GateSet]
    """Sets of rotations that it goes through."""
    rate: float
    """Floating-point operations a second."""
    prefix: bool = False
    """Whether massive tokens are looked for, and a prefix where there are any."""

    @property
    def trained(self) -> tuple[Kind, ...]:
        """Kinds of rotations that are trained. Files are taken to hold all that is wanted; a run
        that quantizes nothing has Hadamard matrices.
        """
        recipe = self.recipe
        if recipe.rotation.files or self.scheme.weight is None:
            return ()
        return trainable(union([candidate.rotate for candidate in self.sets]))

    @property
    def rows(self) -> str:
        """The calibration text, in words."""
        data = self.recipe.calibration
        return f"{data.nsamples} rows of {self.sizes.seqlen} tokens of {data.dataset}"

    @property
    def one_pass(self) -> float:
        """Seconds of a forward pass over the calibration rows."""
        return self.forward(self.tokens)

    @property
    def tokens(self) -> int:
        """Of the calibration rows."""
        return self.recipe.calibration.nsamples * self.sizes.seqlen

    @property
    def comparing(self) -> float:
        """Seconds of calibrating all sets for the comparison, and the chosen one."""
        sets = len(self.sets)
        quick = self.forward(min(self.tokens, QUICK_TOKENS))
        return sets * quick + self.one_pass if sets > 1 else self.one_pass

    def forward(self, tokens: int) -> float:
        """Seconds of a forward pass."""
        return self.sizes.forward_flops(tokens) / self.rate


def stages_of(work: Work) -> list[Stage]:
    """The steps in order, with their time."""
    stages = [Stage("start", "import torch, transformers and ModelOpt", IMPORT_SECONDS)]
    if work.options.from_artifact is None:
        stages += _float_stages(work)
        if work.goal == "capture":
            return stages
        if work.goal == "rotate":
            return stages + _rotating_stages(work)
        stages += _quantizing_stages(work)
    return stages if work.goal == "calibrate" else stages + _writing_stages(work)


def _float_stages(work: Work) -> list[Stage]:
    """Loading, capturing and training."""
    recipe, sizes = work.recipe, work.sizes
    stages = [Stage("load", f"read {sizes.parameters:,} parameters", sizes.stored * 4 / 1e9)]
    if work.prefix and work.goal != "rotate":
        tokens = min(work.tokens, PREFIX_LOOK)
        detail = f"massive tokens among {tokens:,}, and a prefix if there are any"
        seconds = _fusing(work) + work.forward(tokens + PREFIX_SEARCH)
        stages.append(Stage("prefix", detail, seconds))
    if work.goal == "capture" or work.trained:
        reused = work.options.from_capture
        what = f"statistics of {work.rows}" if reused is None else f"reuse {reused}"
        tokens = min(work.tokens, captured_tokens(recipe))
        stages.append(Stage("capture", what, work.forward(tokens) if reused is None else 0.0))
    if work.goal == "capture":
        return stages

    rotation = recipe.rotation
    if "r1" in work.trained:
        flops = FLOPS_PER_ENTRY * rotation.r1.epochs * rotation.r1_tokens * sizes.hidden**2
        detail = (
            f"{sizes.hidden} x {sizes.hidden}, {rotation.r1.epochs} epochs, {rotation.r1.optimizer}"
        )
        stages.append(Stage("train R1", detail, flops / work.rate))
    if "r2" in work.trained:
        count = sizes.layers * sizes.kv_heads
        flops = (
            FLOPS_PER_ENTRY * rotation.r2.epochs * rotation.r2_tokens * sizes.head_dim**2 * count
        )
        detail = (
            f"{count} of {sizes.head_dim} x {sizes.head_dim}, {rotation.r2.epochs} epochs,"
            f" {rotation.r2.optimizer}"
        )
        stages.append(Stage("train R2", detail, flops / work.rate))
    return stages


def _rotating_stages(work: Work) -> list[Stage]:
    """Fusing once, writing, and comparing the written folder with the original."""
    sizes = work.sizes
    tokens = min(COMPARED_ROWS, work.recipe.evaluation.nsamples) * sizes.seqlen
    return [
        Stage("fuse", "exact, in float64", _fusing(work)),
        Stage("write", "a Hugging Face folder", sizes.stored * 4 / 1e9),
        Stage(
            "compare",
            f"the folder with the original on {tokens:,} tokens",
            2 * work.forward(tokens),
        ),
    ]


def _quantizing_stages(work: Work) -> list[Stage]:
    """Fusing and calibrating, once for each set that the gate compares, and the comparison."""
    recipe, sets = work.recipe, len(work.sets)
    each = f", for {sets} rotation sets" if sets > 1 else ""
    stages = [Stage("fuse", f"exact, in float64{each}", sets * _fusing(work))]

    algorithm = algorithm_named(recipe.weights.algorithm)
    if (
        work.scheme.weight_only
        and not algorithm.needs_moment
        and recipe.kv is None
        and recipe.smoothing == "none"
    ):
        stages.append(Stage("calibrate", f"scales of the weights only: needs no data{each}", 0.0))
    else:
        what = "block by block" if recipe.layerwise.enabled else "limits"
        if algorithm.name != "rtn":
            what += f", weights by {algorithm.name}"
        stages.append(Stage("calibrate", f"{what} over {work.rows}{each}", work.comparing))

    if sets > 1:
        rows = min(work.sizes.seqlen, GATE_ROW_TOKENS)
        tokens = min(recipe.gate.nsamples * rows, GATE_TOKENS)
        detail = f"the {sets} sets and the original on {tokens:,} held-out tokens"
        stages.append(Stage("gate", detail, (sets + 1) * work.forward(tokens)))
    return stages


def _writing_stages(work: Work) -> list[Stage]:
    """Writing for every target, and the parity check of each."""
    recipe, sizes = work.recipe, work.sizes
    tracing = sizes.layers * TRACE_SECONDS_PER_LAYER if recipe.backend == "onnx" else 0.0
    rows = recipe.evaluation.nsamples
    proof_rows = min(rows, max(PROOF_ROWS, math.ceil(PROOF_TOKENS / sizes.seqlen)))
    proof, quality = proof_rows * sizes.seqlen, rows * sizes.seqlen
    stages = []
    for target in recipe.targets:
        named = f"{recipe.backend} ({target or 'default target'})"
        stages.append(Stage("write", named, tracing + sizes.stored * 4 / 1e9))
        if work.options.verify:
            detail = f"parity: rungs 1 and 2 on {proof:,} tokens, rung 3 on up to {quality:,}"
            seconds = PROOF_PASSES * work.forward(proof) + QUALITY_PASSES * work.forward(quality)
            stages.append(Stage("verify", detail, seconds))
    return stages


def _fusing(work: Work) -> float:
    """Seconds: every weight meets one residual rotation, in float64, at half of float32's speed."""
    return 4 * work.sizes.stored * work.sizes.hidden / work.rate
