"""Steps on the orthogonal group. Each takes the rotation ``Q`` to a better one for a batch of
activations.

Notation: rows are tokens, ``Y = X Q`` the rotated activations, ``G = dL/dY`` and so ``dL/dQ = X^T
G``. Everything is batched over leading dimensions: the rotations of all heads of all layers are one
``[layers, heads, n, n]`` tensor.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from calib.errors import RotationError
from calib.rotations.polar import newton_schulz, polar_factor
from calib.rotations.problem import Evaluation, Problem

OptimizerName = Literal["qr", "riemannian-ns", "riemannian-cayley", "monotone"]
OPTIMIZER_NAMES: tuple[str, ...] = get_args(OptimizerName)
# The monotone step's curvature, as a fraction of its unit: doubled this often in one step, and
# never beyond this, where the step is below float32 resolution.
_LARGEST_FRACTION = 1e4
_MOST_DOUBLINGS = 6
# How far the monotone step runs on, as a share of the way between the last two steps' matrices.
# Among 0.5 to 0.9 the most lowered the loss of unseen tokens fastest.
_EXTRAPOLATION = 0.9
# The monotone step's polar factors are orthogonal up to this root mean square of s^2 - 1. What is
# left is in the weakest directions and does not add up: each step takes a new polar factor, and the
# loss it has to lower is measured.
_ORTHOGONALITY = 5e-3

UpdateRule = Literal["sgd", "adam"]


class Stepper(Protocol):
    """One optimiser with its state."""

    def step(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Move by one batch of reduced activations; return its loss ``[*batch]`` *before* the
        move.
        """

    def rotation(self) -> Tensor:
        """The current rotation ``[*batch, m, m]``, after the last step; orthogonal up to
        rounding.
        """

    def set_rate(self, factor: float) -> None:
        """Multiply the initial learning rate by ``factor``."""


class QrStepper:
    """The reference: a free latent matrix ``Z``, rotation ``Q = qr(Z).Q``, gradient by autograd
    through the QR.

    DartQuant (NeurIPS 2025) publishes this with SGD of momentum 0.9. It returns the rotation
    computed *before* the last update; here :meth:`rotation` factors the latent again, so that no
    step is lost.
    """

    def __init__(
        self,
        start: Tensor,
        problem: Problem,
        *,
        lr: float,
        momentum: float,
        update: UpdateRule,
        accumulate: int,
    ) -> None:
        self._problem = problem
        self._latent = start.clone().requires_grad_()
        self._lr = lr
        self._accumulate = accumulate
        self._calls = 0
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.Adam([self._latent], lr=lr)
            if update == "adam"
            else torch.optim.SGD([self._latent], lr=lr, momentum=momentum)
        )

    def step(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """One forward and backward pass; the latent moves at every ``accumulate``-th call."""
        loss = self._problem.objective(
            self._problem.rotated(x, torch.linalg.qr(self._latent).Q), weights
        )
        # The heads of a batch do not interact: the gradient of the sum is that of each.
        torch.autograd.backward(loss.sum() / self._accumulate)
        self._calls += 1
        if self._calls % self._accumulate == 0:
            if self._latent.grad is None or not bool(torch.isfinite(self._latent.grad).all()):
                raise RotationError(
                    "the QR latent became singular, its gradient is not finite",
                    hint=(
                        "lower the learning rate, use another start, or optimizer 'monotone', which"
                        " has no latent"
                    ),
                )
            self._optimizer.step()
            self._optimizer.zero_grad()
        return loss.detach()

    def rotation(self) -> Tensor:
        """The Q of the present latent: one more QR than the reference, and the last step is not
        lost.
        """
        q: Tensor = torch.linalg.qr(self._latent.detach()).Q
        return q

    def set_rate(self, factor: float) -> None:
        """Multiply the initial learning rate by ``factor``."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * factor


class RiemannianStepper:
    """Gradient descent along the group: project the gradient, step, retract.

    The component of ``D = dL/dQ`` tangent to the group at ``Q`` is ``D - Q sym(Q^T D) = Q W`` with
    the skew matrix ``W = (Q^T D - D^T Q) / 2``. Momentum accumulates ``W``, which needs no
    transport from one ``Q`` to the next. The step ``Q (I - lr W)`` is then brought back onto the
    group:

    * ``ns``: by its polar factor. Its singular values ``sqrt(1 + lr^2 w^2)`` are near 1, so two or
      three Newton-Schulz iterations of two matmuls suffice.
    * ``cayley``: ``Q (I + lr W / 2)^-1 (I - lr W / 2)`` is exactly orthogonal and agrees to second
      order; one solve.
    """

    def __init__(
        self,
        start: Tensor,
        problem: Problem,
        *,
        lr: float,
        momentum: float,
        retraction: Literal["ns", "cayley"],
        accumulate: int,
    ) -> None:
        self._problem = problem
        self._q = start.clone()
        self._eye = torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
        self._velocity = torch.zeros_like(start)
        self._gradient = torch.zeros_like(start)
        self._base_lr = self._lr = lr
        self._momentum = momentum
        self._retraction = retraction
        self._accumulate = accumulate
        self._calls = 0

    def step(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Add one gradient; the rotation moves at every ``accumulate``-th call."""
        found = self._problem.evaluate(x, self._q, weights)
        pulled = self._q.mT @ found.derivative
        self._gradient += (pulled - pulled.mT) * (0.5 / (x.shape[-2] * self._accumulate))
        self._calls += 1
        if self._calls % self._accumulate == 0:
            self._velocity = self._momentum * self._velocity + self._gradient
            self._gradient = torch.zeros_like(self._q)
            self._move(self._lr * self._velocity)
        return found.loss

    def _move(self, angle: Tensor) -> None:
        if self._retraction == "cayley":
            self._q = self._q @ torch.linalg.solve(self._eye + 0.5 * angle, self._eye - 0.5 * angle)
        else:
            # All singular values are at least 1 before normalisation, so the ratio is at least 1 /
            # norm; 0.5 covers steps of up to 60 degrees and larger ones only cost iterations.
            moved = newton_schulz(self._eye - angle, least=0.5, tolerance=1e-6)
            self._q = self._q @ moved

    def rotation(self) -> Tensor:
        """The rotation after the last step."""
        return self._q

    def set_rate(self, factor: float) -> None:
        """Multiply the initial learning rate by ``factor``."""
        self._lr = self._base_lr * factor


class MonotoneStepper:
    """The step without a learning rate: minimise a bound of the loss exactly, ``Q <- polar(X^T (c Y
    - G))``.

    Let the loss be a sum of ``f(y)`` over entries with ``f'' <= c``, kinks pointing up allowed.
    Then ``h(y) = c y^2 / 2 - f(y)`` is convex, so it lies above its tangent at the present ``y0``:

        f(y) = c y^2 / 2 - h(y) <= c y^2 / 2 - h(y0) - h'(y0) (y - y0),    with equality at ``y0``.

    Summed over ``Y = X Q`` the first term is ``c |X|^2 / 2`` for every orthogonal ``Q``, so the
    bound is least where ``<h'(Y0), X Q> = <Q, X^T (c Y0 - f'(Y0))>`` is greatest, and that is the
    polar factor of ``X^T (c Y0 - f'(Y0))``. The loss on the batch cannot rise. For Whip, ``f =
    exp(-|y|)``: ``f'' = exp(-|y|) <= 1`` and the kink at 0 points up, so ``c = 1`` and the step is
    ``polar(X^T (Y + sign(Y) exp(-|Y|)))``.

    ``c`` is the worst case. Averaged over a bell-shaped ``y`` the kink alone outweighs the
    curvature elsewhere, the loss is nearly concave in ``Q``, and a smaller ``c`` takes longer
    steps. So ``c`` starts at ``fraction`` of the bound; a step that turns out to have raised the
    loss is taken back and ``c`` doubled until it does not. At the bound the guarantee holds. Losses
    without a known bound use ``|G| / |Y|`` as the unit of ``c``.

    Minimising a bound is slow where the bound is loose, which is where the activations have most
    power. So the polar factor is taken of a matrix ahead, ``A + b (A - A0)``, with ``A0`` and ``A``
    the matrices of the last two steps on this batch, each over ``|A| / sqrt(n)``. As the polar
    factor is smooth, that is ``P + b (P - P0)`` to first order in ``A - A0``, with ``P0`` and ``P``
    the last two minimisers: the acceleration of Nesterov ("A method for solving the convex
    programming problem with convergence rate O(1/k^2)", 1983), on the group and without a second
    polar factor to return to it. Where it would raise the loss the step goes to ``P`` instead.
    Damped and accelerated, steps move along the signal of many tokens before they fit the noise of
    few. Losses without a known bound are not accelerated: ``lp`` and ``kurtosis`` then left more
    quantization error on unseen tokens after 10 passes.

    ``damping`` adds ``damping * |A| / sqrt(n) * Q0`` to the matrix ``A`` whose polar factor is
    taken. As ``<Q, Q0> = n - |Q - Q0|^2 / 2`` this is a proximal term: it keeps the guarantee,
    leaves directions alone in which the activations carry nothing (fewer tokens than channels, dead
    heads), and bounds the condition number.
    """

    def __init__(self, start: Tensor, problem: Problem, *, fraction: float, damping: float) -> None:
        self._problem = problem
        self._q = start.clone()
        self._damping = damping
        self._fraction = torch.full(
            (*start.shape[:-2], 1, 1), fraction, dtype=start.dtype, device=start.device
        )
        self._batch: Tensor | None = None
        self._moment: Tensor | None = None  # X^T X of the batch, where it was needed
        self._slopes: Tensor | None = None  # memory that trials share
        self._target: Tensor | None = None  # of the last step, to extrapolate from
        self._seen: Evaluation | None = None  # of the batch at Q

    def step(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """One step that does not raise the loss of this batch; two matmuls with ``x`` if it is the
        batch before.

        Nothing is carried over to another batch: the difference of their matrices is noise as much
        as progress.
        """
        if self._batch is not x:
            self._batch, self._seen, self._target, self._moment = x, None, None, None
        seen = self._seen or self._evaluate(x, self._q, weights)
        self._seen = seen
        if not bool(torch.isfinite(seen.loss).all()):
            return seen.loss  # for the caller to refuse; there is no polar factor of NaN

        target = self._damped(self._minimiser(seen, x, weights))
        extrapolated = self._target is not None
        q = polar_factor(self._ahead(target), tolerance=_ORTHOGONALITY)
        found = self._evaluate(x, q, weights)
        rose = _rose(seen.loss, found.loss)
        for _ in range(_MOST_DOUBLINGS + 1):
            if not bool(rose.any()):
                break
            again = rose[..., None, None]  # the heads that did not rise keep their Q
            if not extrapolated:
                doubled = (2.0 * self._fraction).clamp_max(_LARGEST_FRACTION)
                self._fraction = torch.where(again, doubled, self._fraction)
                target = self._damped(self._minimiser(seen, x, weights))
            extrapolated = False  # the first retry only drops the extrapolation
            q = torch.where(again, polar_factor(target, tolerance=_ORTHOGONALITY), q)
            found = self._evaluate(x, q, weights, known=found, changed=rose)
            rose = _rose(seen.loss, found.loss)
        if bool(rose.any()):
            # At a minimum to rounding: every step rises by noise. Staying is the monotone choice.
            q = torch.where(rose[..., None, None], self._q, q)
            found = found.replaced(rose, seen)
        self._q, self._seen = q, found
        if self._problem.objective.curvature is not None:
            self._target = target
        return seen.loss

    def _ahead(self, target: Tensor) -> Tensor:
        if self._target is None:
            return target
        return torch.add(target, target - self._target, alpha=_EXTRAPOLATION)

    def _evaluate(
        self,
        x: Tensor,
        q: Tensor,
        weights: Tensor | None,
        *,
        known: Evaluation | None = None,
        changed: Tensor | None = None,
    ) -> Evaluation:
        """Where the curvature is known, its part of the minimiser comes along, and a trial that is
        not taken costs one product instead of two.
        """
        bound = self._problem.objective.curvature
        if bound is None:
            return self._problem.evaluate(x, q, weights, known=known, changed=changed)
        shape = (*x.shape[:-1], self._problem.channels(x))
        if self._slopes is None or self._slopes.shape != shape:
            self._slopes = x.new_empty(shape)
        return self._problem.evaluate(
            x,
            q,
            weights,
            curvature=self._fraction * bound,
            slopes=self._slopes,
            known=known,
            changed=changed,
        )

    def _minimiser(self, seen: Evaluation, x: Tensor, weights: Tensor | None) -> Tensor:
        """``X^T (c Y - G)`` at the present rotation. What of ``c`` the evaluation does not hold
        yet is, as ``Y = X Q``, one product of ``[n, n]`` matrices.
        """
        if self._problem.objective.curvature is not None:
            missing = self._fraction * self._problem.objective.curvature - seen.curvature
            if not bool(missing.any()):
                return -seen.derivative
            return torch.sub(missing * (self._second(x, weights) @ self._q), seen.derivative)
        # c is a fraction of |G| / |Y|, where |Y| = |X|
        moment = self._second(x, weights)
        power = moment.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        unit = torch.where(power > 0, seen.size / power.sqrt().clamp_min(1e-30), 1.0)
        return torch.sub(self._fraction * unit * (moment @ self._q), seen.derivative)

    def _second(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """``X^T X`` of the batch."""
        if self._moment is None:
            self._moment = self._problem.moment(x, weights)
        return self._moment

    def _damped(self, raw: Tensor) -> Tensor:
        """``A sqrt(n) / |A| + damping * Q0``."""
        rows = torch.linalg.vector_norm(raw, dim=-1, keepdim=True)  # threads share no row
        scale = torch.linalg.vector_norm(rows, dim=-2, keepdim=True) / raw.shape[-1] ** 0.5
        # no signal at all: the polar factor of Q itself, Q stays
        scale = torch.where(scale > 0, scale, 1.0)
        return torch.add(raw / scale, self._q, alpha=self._damping)

    def rotation(self) -> Tensor:
        """The rotation after the last step."""
        return self._q

    def set_rate(self, factor: float) -> None:
        """Nothing: there is no learning rate."""


def _rose(before: Tensor, after: Tensor) -> Tensor:
    """Whether a loss rose by more than the float32 rounding of a mean over many tokens."""
    return after > before + 1e-6 * before.abs()
