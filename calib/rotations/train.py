"""Training one rotation, or a batch of them, on captured activations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from calib.errors import RotationError
from calib.process.memory import freed_memory_kept
from calib.process.progress import Progress, silent
from calib.rotations.objectives import make_objective, over_heads, whole_inputs
from calib.rotations.optimizers import (
    MonotoneStepper,
    QrStepper,
    RiemannianStepper,
    Stepper,
)
from calib.rotations.polar import project_orthogonal
from calib.rotations.problem import Problem
from calib.rotations.quantizer import scheme_error
from calib.rotations.starts import (
    embed_fixing_ones,
    make_start,
    ones_complement,
    restrict_to_complement,
)
from calib.rotations.tokens import Tokens, at_unit_power, check_samples, require, second_moment
from calib.rotations.train_config import AS_MUCH_AGAIN, DEFAULT_RATE, LEAST_GAIN, TrainConfig

__all__ = ["TrainConfig", "TrainResult", "make_stepper", "train_rotation"]


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
    hopeless: bool = False
    """Whether training ended early because it would not have won; see :attr:`TrainConfig.look`."""


@freed_memory_kept()
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

    The same seed gives the same bytes on the same machine; of up to 1024 channels with any number
    of threads, but for optimizer ``qr``. A batch element whose activations are all zero keeps its
    start.

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

    # R2's heads are one tensor, which is quantized as a whole
    by_token = (
        group is not None and config.scheme is not None and config.scheme.granularity != "tensor"
    )

    def scaled(x: Tensor) -> Tensor:
        if not config.normalize:
            return x.float()
        return at_unit_power(x, samples, group, by_token=by_token)

    # what is trained on, and what is only measured on
    tokens = Tokens(
        scaled(samples), None if weights is None else weights.to(samples.device, torch.float32)
    )
    unseen = None
    if held_out is not None and config.scheme is not None:
        share = None if held_out_weights is None else held_out_weights.to(samples.device)
        unseen = Tokens(scaled(held_out.to(samples.device)), share)

    # where ones are fixed, a rotation of their complement is trained
    basis = ones_complement(samples.shape[-1]).to(tokens.x) if config.fix_ones else None
    objective = make_objective(config.objective, scheme=config.scheme, p=config.p)
    problem = Problem(
        objective if group is None else over_heads(objective, samples.shape[-3], group), basis
    )
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
    final = Problem(problem.objective).loss(tokens.x, matrix.to(tokens.x), tokens.weights)
    return TrainResult(
        matrix=matrix,
        losses=(*run.losses, float(final.mean())),
        held_out_errors=tuple(run.errors),
        start=config.first if start is None else "given",
        optimizer=config.optimizer,
        objective=problem.objective.name,
        steps=run.steps,
        hopeless=run.hopeless,
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
        self.hopeless = False
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
            if epoch + 1 == config.look and epoch + 1 < config.epochs and self._cannot_win():
                self.hopeless = True
                break
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

    def _cannot_win(self) -> bool:
        """Whether no rotation, or the start, will be as good as what training may still find."""
        if self._lowest is None:
            return False
        begin, now = self.errors[0], float(self._lowest.mean())
        reached = now - AS_MUCH_AGAIN * (begin - now)
        plain = self._error(torch.eye(self.best.shape[-1]).expand(self.best.shape))
        if plain is not None and reached > float(plain.mean()):
            return True
        return reached > (1 - LEAST_GAIN) * begin

    def _error(self, q: Tensor) -> Tensor | None:
        """Held-out error of each rotation; ``None`` where nothing is held out."""
        scheme = self.config.scheme
        if self.held_out is None or scheme is None:
            return None
        seen, weights = self.problem.rotated(self.held_out.x, q.to(self.x)), self.held_out.weights
        if self.group is None:
            return scheme_error(seen, scheme, weights=weights)
        # all heads of a layer are kept or left together
        weights = None if weights is None else weights[..., 0, :: self.group]
        error = scheme_error(whole_inputs(seen, self.group), scheme, weights=weights)
        return error.unsqueeze(-1).expand(q.shape[:-2])

    def _measure(self, q: Tensor) -> bool:
        """Keep ``q`` where it is the best so far, quantizer by quantizer; whether any was."""
        error = self._error(q)
        if error is None:  # nothing to choose by: the last is the best
            self.best = q
            return True
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
    lr = DEFAULT_RATE[config.optimizer] if config.lr is None else config.lr
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
