"""Every choice in training a rotation, checked before the first step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from calib.rotations.objectives import ObjectiveName, make_objective
from calib.rotations.optimizers import OPTIMIZER_NAMES, OptimizerName, UpdateRule
from calib.rotations.quantizer import ActivationScheme
from calib.rotations.starts import START_NAMES, StartName
from calib.rotations.tokens import require

# Learning rates by optimiser: the reference's published one for R1; for the Riemannian steps one
# that in 100 steps on a small Llama went farther than the reference. The monotone step has none.
DEFAULT_RATE: dict[str, float] = {
    "qr": 1.5e-3,
    "riemannian-ns": 1e-2,
    "riemannian-cayley": 1e-2,
    "monotone": 0.0,
}

AS_MUCH_AGAIN = 4
"""Held-out errors fall most in the first steps: for two small models and two schemes, in 8 of 40 by
0.87 of what they fell by in all, or more."""
LEAST_GAIN = 0.005
"""The share of the start's held-out error below which a gain is none."""


@dataclass(frozen=True)
class TrainConfig:
    """Every choice in training a rotation. The defaults are the recommended ones, not the
    reference's.

    ``TrainConfig.reference()`` gives the reference's.
    """

    objective: ObjectiveName = "auto"
    """What to minimise; ``auto`` picks by ``scheme``: see
    :func:`calib.rotations.objectives.make_objective`. From a capture, it spends the second half of
    the epochs on objective ``scheme`` where scales are not static."""
    optimizer: OptimizerName = "monotone"
    """How to step; ``qr`` is the reference."""
    scheme: ActivationScheme | None = None
    """The quantizer that will be exported: objectives ``scheme`` and ``range`` and the held-out
    error use it.
    """
    epochs: int = 40
    """Passes over the samples (reference: 10 for R1, 5 for R2)."""
    batch_size: int | None = None
    """Tokens per step; ``None``: all of them, which is what makes the monotone step monotone."""
    subset: float = 1.0
    """Fraction of the batches seen in each epoch, drawn anew each time (reference: 0.1)."""
    accumulation_steps: int = 1
    """Batches whose gradients are averaged before a step; ``qr`` and ``riemannian-*``."""
    lr: float | None = None
    """Learning rate; ``None``: 1.5e-3 for ``qr``, the reference's for R1 (it uses 1e-3 for R2), and
    1e-2 for ``riemannian-*``. Not used by ``monotone``."""
    momentum: float = 0.9
    """Momentum of ``qr`` with ``sgd`` and of ``riemannian-*``."""
    update: UpdateRule = "sgd"
    """``sgd`` or ``adam`` on the latent matrix; ``qr`` only."""
    cosine: bool = False
    """Lower the learning rate to zero along a half cosine over the epochs."""
    start: StartName | Literal["auto"] = "auto"
    """Where to start, unless a matrix is given; ``auto``: ``pca-ones`` where each token has a zero
    point of its own to absorb what its channels share, else ``hadamard``."""
    seed: int = 0
    """Seed of the start and of the order of the batches."""
    fix_ones: bool = False
    """Train only rotations that fix the all-ones vector: needed by R1 of models with LayerNorm."""
    p: float = 4.0
    """Exponent of objective ``lp``; higher ones come closer to the maximum and fit fewer tokens."""
    normalize: bool = True
    """Scale the samples to unit mean square first: Whip is not scale-free, and inputs of o_proj
    have any size. Each token for itself where heads share a quantizer with a scale for each token,
    whose relative error does not depend on its size; otherwise each batch element. Activations
    after a norm without gain have it already."""
    curvature_fraction: float | None = None
    """``monotone``: first curvature as a fraction of the proven bound. 1 is the proven step; less
    is faster, and backtracking keeps it monotone. ``None``: 0.2 where a bound is proven (Whip),
    else 0.1 of a unit taken from the gradient."""
    damping: float | None = None
    """``monotone``: strength of the proximal term, relative to the mean singular value of the
    target. ``None``: 0.2 where a bound is proven (Whip), else 0.03: with 0.2 there, held-out errors
    came out 1 to 4 % higher."""
    tolerance: float = 0.0
    """Stop when an epoch lowers the training loss by less than this fraction (0: never)."""
    patience: int | None = None
    """Stop after this many epochs without a lower held-out error (``None``: never). Needs
    ``held_out`` and ``scheme``. Whether or not it stops early, the rotation with the lowest
    held-out error is returned where both are given."""
    look: int | None = None
    """Stop after so many epochs where training will not win: where the held-out error would stay
    above that of no rotation, or hardly leave that of the start, even if it fell by another
    :data:`AS_MUCH_AGAIN` times what it fell by so far. Needs what ``patience`` needs."""

    @classmethod
    def reference(cls, *, rotation: str = "r1") -> TrainConfig:
        """DartQuant's published hyper-parameters for ``r1`` or ``r2``, with tokens for its
        sequences of 2048.

        R1: 10 epochs over 10 % of the data, 64 sequences a step, lr 1.5e-3. R2: 5 epochs, 128
        sequences, two batches a step, lr 1e-3. SGD with momentum 0.9, no schedule, random Hadamard
        start, Whip.
        """
        common = cls(objective="whip", optimizer="qr", start="hadamard", normalize=False)
        if rotation == "r2":
            return replace(common, epochs=5, batch_size=128 * 2048, accumulation_steps=2, lr=1e-3)
        return replace(common, epochs=10, batch_size=64 * 2048, subset=0.1, lr=1.5e-3)

    def __post_init__(self) -> None:
        require(
            self.optimizer in OPTIMIZER_NAMES,
            f"unknown optimizer {self.optimizer!r}",
            _one_of(OPTIMIZER_NAMES),
        )
        starts = ("auto", *START_NAMES)
        require(self.start in starts, f"unknown start {self.start!r}", _one_of(starts))
        require(
            self.update in get_args(UpdateRule),
            f"unknown update {self.update!r}",
            _one_of(get_args(UpdateRule)),
        )
        require(self.epochs >= 0, f"{self.epochs} epochs", "use 0 or more")
        require(
            self.batch_size is None or self.batch_size > 0,
            f"batch size {self.batch_size}",
            "use 1 token or more",
        )
        require(
            0 < self.subset <= 1, f"subset {self.subset}", "use a fraction above 0 and at most 1"
        )
        require(
            self.accumulation_steps > 0,
            f"{self.accumulation_steps} accumulation steps",
            "use 1 or more",
        )
        require(
            self.lr is None or 0 < self.lr < math.inf,
            f"learning rate {self.lr}",
            "use a positive one, such as 1.5e-3",
        )
        require(
            0 <= self.momentum < 1, f"momentum {self.momentum}", "use 0 or more and less than 1"
        )
        require(
            self.curvature_fraction is None or self.curvature_fraction > 0,
            f"curvature fraction {self.curvature_fraction}",
            "use 0.2",
        )
        require(self.damping is None or self.damping > 0, f"damping {self.damping}", "use 0.2")
        require(
            self.update == "sgd" or self.optimizer == "qr",
            f"update 'adam' with optimizer {self.optimizer!r}",
            "its entry-wise scaling is defined for the latent matrix of optimizer 'qr' only",
        )
        make_objective(self.objective, scheme=self.scheme, p=self.p)  # refuses what it cannot build

    @property
    def first(self) -> StartName:
        """The start that ``start`` means."""
        if self.start != "auto":
            return self.start
        scheme = self.scheme
        shifted = scheme is not None and not scheme.symmetric and scheme.granularity != "tensor"
        return "pca-ones" if shifted and not self.fix_ones else "hadamard"


def _one_of(names: tuple[str, ...]) -> str:
    return f"use one of: {', '.join(names)}"
