"""Training one rotation, or a batch of them, on captured activations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from calib.errors import RotationError
from calib.progress import Progress, silent
from calib.rotations.objectives import (
    ActivationScheme,
    ObjectiveName,
    make_objective,
    over_heads,
    scheme_error,
    whole_inputs,
)
from calib.rotations.optimizers import (
    OPTIMIZER_NAMES,
    MonotoneStepper,
    OptimizerName,
    Problem,
    QrStepper,
    RiemannianStepper,
    Stepper,
    UpdateRule,
)
from calib.rotations.polar import project_orthogonal
from calib.rotations.starts import (
    START_NAMES,
    StartName,
    embed_fixing_ones,
    make_start,
    ones_complement,
    restrict_to_complement,
)
from calib.rotations.tokens import Tokens, at_unit_power, check_samples, require, second_moment

# Learning rates by optimiser: the reference's published one for R1; for the Riemannian steps one
# that in 100 steps on a small Llama went farther than the reference. The monotone step has none.
_DEFAULT_RATE: dict[str, float] = {
    "qr": 1.5e-3,
    "riemannian-ns": 1e-2,
    "riemannian-cayley": 1e-2,
    "monotone": 0.0,
}


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


@dataclass(frozen=True)
class TrainResult:
    """A trained rotation and how it came about."""

    matrix: Tensor
    """Float64 ``[*batch, n, n]`` on the CPU, orthogonal to 1e-12."""
    losses: tuple[float, ...]
    """Loss before each step, averaged over the batch; then, in the last place, that of the returned
    rotation.
    """
    held_out_errors: tuple[float, ...] = field(default=())
    """Relative squared error of ``scheme`` on the held-out tokens at the start and after each
    epoch, where measured.
    """
    start: str = "hadamard"
    optimizer: str = "monotone"
    objective: str = "whip"
    steps: int = 0
    """Steps taken."""


def train_rotation(
    samples: Tensor,
    config: TrainConfig,
    *,
    weights: Tensor | None = None,
    held_out: Tensor | None = None,
    held_out_weights: Tensor | None = None,
    start: Tensor | None = None,
    group: int | None = None,
    progress: Progress = silent,
) -> TrainResult:
    """Train one rotation for each element of the leading batch dimensions, all in one batched
    solve.

    The same seed gives the same bytes on the same machine with the same number of threads. A batch
    element whose activations are all zero keeps its start.

    Args:
        samples: activations ``[*batch, tokens, n]`` in any floating dtype; trained in float32 on
            their device.
        config: how to train.
        weights: inverse inclusion probabilities ``[*batch, tokens]``; ``None``: all equal.
        held_out: activations ``[*batch, tokens', n]`` to measure the error of ``config.scheme`` on.
        held_out_weights: their weights ``[*batch, tokens']``; ``None``: all equal.
        start: orthogonal ``[n, n]`` or ``[*batch, n, n]`` to start from instead of
            ``config.start``.
        group: where the last batch dimension holds the KV heads of one tensor that is quantized as
            a whole: how many query heads share each; see
            :func:`calib.rotations.objectives.whole_inputs`. ``None``: every batch element has a
            quantizer of its own.
        progress: told the number of finished steps.

    Raises:
        RotationError: shapes that do not fit, NaN or Inf, weights that are not positive, a start
            that is not orthogonal or does not fix ones where it must, or training that diverged.
    """
    check_samples(samples, weights, held_out, held_out_weights)
    first = _checked_start(samples, weights, config, start)
    by_token = (
        group is not None and config.scheme is not None and config.scheme.granularity != "tensor"
    )

    def scaled(x: Tensor) -> Tensor:
        if not config.normalize:
            return x.float()
        return at_unit_power(x, samples, group, by_token=by_token)

    tokens = Tokens(
        scaled(samples), None if weights is None else weights.to(samples.device, torch.float32)
    )
    unseen = None
    if held_out is not None and config.scheme is not None:
        share = None if held_out_weights is None else held_out_weights.to(samples.device)
        unseen = Tokens(scaled(held_out.to(samples.device)), share)
    basis = ones_complement(samples.shape[-1]).to(tokens.x) if config.fix_ones else None
    objective = make_objective(config.objective, scheme=config.scheme, p=config.p)
    problem = Problem(objective if group is None else over_heads(objective, group), basis)
    inner = restrict_to_complement(first) if config.fix_ones else first
    reduced = tokens if basis is None else replace(tokens, x=tokens.x @ basis)
    run = _Run(
        config,
        problem,
        make_stepper(inner.to(tokens.x), problem, config),
        reduced,
        unseen,
        inner,
        group,
    )
    run.train(progress)
    trained = project_orthogonal(run.best)
    matrix = embed_fixing_ones(trained.cpu()) if config.fix_ones else trained.cpu()
    final = problem.objective(tokens.x @ matrix.to(tokens.x), tokens.weights)
    return TrainResult(
        matrix=matrix,
        losses=(*run.losses, float(final.mean())),
        held_out_errors=tuple(run.errors),
        start=config.first if start is None else "given",
        optimizer=config.optimizer,
        objective=problem.objective.name,
        steps=run.steps,
    )


class _Run:
    """The training loop and what it has seen."""

    def __init__(
        self,
        config: TrainConfig,
        problem: Problem,
        stepper: Stepper,
        tokens: Tokens,
        held_out: Tokens | None,
        start: Tensor,
        group: int | None,
    ) -> None:
        self.config = config
        self.problem = problem
        self.stepper = stepper
        self.x, self.weights = tokens.x, tokens.weights
        self.group = group
        basis = problem.basis
        self.held_out = held_out
        if held_out is not None and basis is not None:
            self.held_out = replace(held_out, x=held_out.x @ basis)
        self.best = start.to(tokens.x.device)
        self.losses: list[float] = []
        self.errors: list[float] = []
        self.steps = 0
        self._lowest: Tensor | None = None

    def train(self, progress: Progress) -> None:
        config = self.config
        if self.held_out is not None and config.scheme is not None:
            self._measure(self.best)
        without_gain, previous = 0, math.inf
        total = config.epochs * self._batches_per_epoch()
        for epoch in range(config.epochs):
            if config.cosine:
                self.stepper.set_rate(0.5 * (1 + math.cos(math.pi * epoch / config.epochs)))
            epoch_losses = []
            for x, weights in self._batches(epoch):
                epoch_losses.append(self._step(x, weights))
                progress("train rotation", self.steps, total)
            without_gain = 0 if self._measure(self.stepper.rotation()) else without_gain + 1
            mean = sum(epoch_losses) / len(epoch_losses)
            if config.patience is not None and self.errors and without_gain >= config.patience:
                break
            if (
                config.tolerance > 0
                and previous - mean < config.tolerance * abs(previous) < math.inf
            ):
                break
            previous = mean

    def _step(self, x: Tensor, weights: Tensor | None) -> float:
        loss = float(self.stepper.step(x, weights).mean())
        if not math.isfinite(loss):
            raise RotationError(
                f"training diverged: the loss is {loss} at step {self.steps}",
                hint="lower the learning rate, or use optimizer 'monotone', which has none",
            )
        self.losses.append(loss)
        self.steps += 1
        return loss

    def _measure(self, q: Tensor) -> bool:
        """Keep ``q`` where it is the best so far, quantizer by quantizer; whether any was."""
        scheme = self.config.scheme
        if self.held_out is None or scheme is None:  # nothing to choose by: the last is the best
            self.best = q
            return True
        seen, weights = self.problem.rotated(self.held_out.x, q.to(self.x)), self.held_out.weights
        if self.group is None:
            error = scheme_error(seen, scheme, weights=weights)
        else:  # all heads of a layer are kept or left together
            weights = None if weights is None else weights[..., 0, :: self.group]
            error = scheme_error(whole_inputs(seen, self.group), scheme, weights=weights)
            error = error.unsqueeze(-1).expand(q.shape[:-2])
        self.errors.append(float(error.mean()))
        if self._lowest is None:
            self._lowest = error
            return True
        better = error < self._lowest
        self._lowest = torch.where(better, error, self._lowest)
        self.best = torch.where(better[..., None, None], q.double(), self.best)
        return bool(better.any())

    @property
    def _entries(self) -> int:
        """Entries of one token, which stay together."""
        return self.group or 1

    @property
    def _tokens(self) -> int:
        return self.x.shape[-2] // self._entries

    def _batch_size(self) -> int:
        return min(self.config.batch_size or self._tokens, self._tokens)

    def _batches_per_epoch(self) -> int:
        batches = -(-self._tokens // self._batch_size())
        return max(1, round(self.config.subset * batches))

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        tokens, size = self._tokens, self._batch_size()
        if size == tokens:
            yield self.x, self.weights
            return
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(tokens, generator=generator).to(self.x.device)
        entries = torch.arange(self._entries, device=self.x.device)
        for begin in range(0, self._batches_per_epoch() * size, size):
            chosen = (order[begin : begin + size, None] * self._entries + entries).flatten()
            yield (
                self.x[..., chosen, :],
                None if self.weights is None else self.weights[..., chosen],
            )


def make_stepper(start: Tensor, problem: Problem, config: TrainConfig) -> Stepper:
    """The optimiser that ``config`` names, at ``start`` ``[*batch, n, n]``."""
    lr = _DEFAULT_RATE[config.optimizer] if config.lr is None else config.lr
    accumulate = config.accumulation_steps
    if config.optimizer == "qr":
        return QrStepper(
            start,
            problem,
            lr=lr,
            momentum=config.momentum,
            update=config.update,
            accumulate=accumulate,
        )
    if config.optimizer == "monotone":
        fraction, damping = (0.1, 0.03) if problem.objective.curvature is None else (0.2, 0.2)
        return MonotoneStepper(
            start,
            problem,
            fraction=fraction if config.curvature_fraction is None else config.curvature_fraction,
            damping=damping if config.damping is None else config.damping,
        )
    return RiemannianStepper(
        start,
        problem,
        lr=lr,
        momentum=config.momentum,
        retraction="ns" if config.optimizer == "riemannian-ns" else "cayley",
        accumulate=accumulate,
    )


def _checked_start(
    x: Tensor, weights: Tensor | None, config: TrainConfig, given: Tensor | None
) -> Tensor:
    """The float64 start ``[*batch, n, n]`` on the CPU."""
    n = x.shape[-1]
    if given is None:
        moment = second_moment(x.float(), weights).cpu() if config.first.startswith("pca") else None
        first = make_start(
            config.first, n, seed=config.seed, moment=moment, fix_ones=config.fix_ones
        )
    else:
        first = given.detach().double().cpu()
    shape = (*x.shape[:-2], n, n)
    require(
        first.shape[-2:] == (n, n) and first.dim() <= len(shape),
        f"the start has shape {tuple(first.shape)} for activations {tuple(x.shape)}",
        f"pass [{n}, {n}], or one matrix for each batch element",
    )
    first = first.expand(shape)
    distance = float((first.mT @ first - torch.eye(n, dtype=torch.float64)).abs().max())
    require(
        distance <= 1e-4,
        f"the start is {distance:.1e} from orthogonal",
        "pass an orthogonal matrix",
    )
    if config.fix_ones:
        moved = float((first.sum(-2) - 1.0).abs().max())
        require(
            moved <= 1e-4,
            f"the start moves the all-ones vector by {moved:.1e}",
            "use start 'hadamard'",
        )
    return first


def _one_of(names: tuple[str, ...]) -> str:
    return f"use one of: {', '.join(names)}"
