"""Steps on the orthogonal group. Each takes the rotation ``Q`` to a better one for a batch of activations.

Notation: rows are tokens, ``Y = X Q`` the rotated activations, ``G = dL/dY`` and so ``dL/dQ = X^T G``. Everything is
batched over leading dimensions: the rotations of all heads of all layers are one ``[layers, heads, n, n]`` tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from calib.errors import RotationError
from calib.rotations.objectives import Objective
from calib.rotations.polar import newton_schulz, polar_factor

OptimizerName = Literal["qr", "riemannian-ns", "riemannian-cayley", "monotone"]
OPTIMIZER_NAMES: tuple[str, ...] = get_args(OptimizerName)
# The monotone step's curvature, as a fraction of its unit: doubled this often in one step, and never beyond this, where
# the step is below float32 resolution.
_LARGEST_FRACTION = 1e4
_MOST_DOUBLINGS = 6

UpdateRule = Literal["sgd", "adam"]


@dataclass(frozen=True)
class Problem:
    """Activations and what is asked of them, in the coordinates that are trained.

    Where ``basis`` ``U`` ``[n, m]`` is given, the rotation is ``U Q U^T + 1 1^T / n`` with ``Q`` ``[m, m]``. Its input
    has no component along ones (LayerNorm has centred it), so ``Y = (X U) Q U^T`` and ``dL/dQ = (X U)^T (G U)``.
    """

    objective: Objective
    basis: Tensor | None = None

    def rotated(self, x: Tensor, q: Tensor) -> Tensor:
        """``Y`` ``[*batch, tokens, n]`` for reduced activations ``x`` ``[*batch, tokens, m]`` and ``q``."""
        y = x @ q
        return y if self.basis is None else y @ self.basis.T

    def pulled_back(self, x: Tensor, g: Tensor) -> Tensor:
        """``dL/dQ`` times the number of tokens ``[*batch, m, m]`` for ``g`` ``[*batch, tokens, n]``."""
        return x.mT @ (g if self.basis is None else g @ self.basis)


class Stepper(Protocol):
    """One optimiser with its state."""

    def step(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Move by one batch of reduced activations; return its loss ``[*batch]`` *before* the move."""

    def rotation(self) -> Tensor:
        """The current rotation ``[*batch, m, m]``, after the last step; orthogonal up to rounding."""

    def set_rate(self, factor: float) -> None:
        """Multiply the initial learning rate by ``factor``."""


class QrStepper:
    """The reference: a free latent matrix ``Z``, rotation ``Q = qr(Z).Q``, gradient by autograd through the QR.

    DartQuant (NeurIPS 2025) publishes this with SGD of momentum 0.9. It returns the rotation computed *before* the last
    update; here :meth:`rotation` factors the latent again, so that no step is lost.
    """

    def __init__(
        self, start: Tensor, problem: Problem, *, lr: float, momentum: float, update: UpdateRule, accumulate: int
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
        loss = self._problem.objective(self._problem.rotated(x, torch.linalg.qr(self._latent).Q), weights)
        # The heads of a batch do not interact: the gradient of the sum is that of each.
        torch.autograd.backward(loss.sum() / self._accumulate)
        self._calls += 1
        if self._calls % self._accumulate == 0:
            if self._latent.grad is None or not bool(torch.isfinite(self._latent.grad).all()):
                raise RotationError(
                    "the QR latent became singular, its gradient is not finite",
                    hint="lower the learning rate, use another start, or optimizer 'monotone', which has no latent",
                )
            self._optimizer.step()
            self._optimizer.zero_grad()
        return loss.detach()

    def rotation(self) -> Tensor:
        """The Q of the present latent: one more QR than the reference, and the last step is not lost."""
        q: Tensor = torch.linalg.qr(self._latent.detach()).Q
        return q

    def set_rate(self, factor: float) -> None:
        """Multiply the initial learning rate by ``factor``."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * factor


class RiemannianStepper:
    """Gradient descent along the group: project the gradient, step, retract.

    The component of ``D = dL/dQ`` tangent to the group at ``Q`` is ``D - Q sym(Q^T D) = Q W`` with the skew matrix
    ``W = (Q^T D - D^T Q) / 2``. Momentum accumulates ``W``, which needs no transport from one ``Q`` to the next. The
    step ``Q (I - lr W)`` is then brought back onto the group:

    * ``ns``: by its polar factor. Its singular values ``sqrt(1 + lr^2 w^2)`` are near 1, so two or three Newton-Schulz
      iterations of two matmuls suffice.
    * ``cayley``: ``Q (I + lr W / 2)^-1 (I - lr W / 2)`` is exactly orthogonal and agrees to second order; one solve.
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
        y = self._problem.rotated(x, self._q)
        loss, gradient = self._problem.objective.loss_and_gradient(y, weights)
        pulled = self._q.mT @ self._problem.pulled_back(x, gradient)
        self._gradient += (pulled - pulled.mT) * (0.5 / (x.shape[-2] * self._accumulate))
        self._calls += 1
        if self._calls % self._accumulate == 0:
            self._velocity = self._momentum * self._velocity + self._gradient
            self._gradient = torch.zeros_like(self._q)
            self._move(self._lr * self._velocity)
        return loss

    def _move(self, angle: Tensor) -> None:
        if self._retraction == "cayley":
            self._q = self._q @ torch.linalg.solve(self._eye + 0.5 * angle, self._eye - 0.5 * angle)
        else:
            # All singular values are at least 1 before normalisation, so the ratio is at least 1 / norm; 0.5 covers
            # steps of up to 60 degrees and larger ones only cost iterations.
            moved = newton_schulz(self._eye - angle, least=0.5, tolerance=1e-6)
            self._q = self._q @ moved

    def rotation(self) -> Tensor:
        """The rotation after the last step."""
        return self._q

    def set_rate(self, factor: float) -> None:
        """Multiply the initial learning rate by ``factor``."""
        self._lr = self._base_lr * factor


class MonotoneStepper:
    """The step without a learning rate: minimise a bound of the loss exactly, ``Q <- polar(X^T (c Y - G))``.

    Let the loss be a sum of ``f(y)`` over entries with ``f'' <= c``, kinks pointing up allowed. Then
    ``h(y) = c y^2 / 2 - f(y)`` is convex, so it lies above its tangent at the present ``y0``:

        f(y) = c y^2 / 2 - h(y) <= c y^2 / 2 - h(y0) - h'(y0) (y - y0),    with equality at ``y0``.

    Summed over ``Y = X Q`` the first term is ``c |X|^2 / 2`` for every orthogonal ``Q``, so the bound is least where
    ``<h'(Y0), X Q> = <Q, X^T (c Y0 - f'(Y0))>`` is greatest, and that is the polar factor of ``X^T (c Y0 - f'(Y0))``.
    The loss on the batch cannot rise. For Whip, ``f = exp(-|y|)``: ``f'' = exp(-|y|) <= 1`` and the kink at 0 points
    up, so ``c = 1`` and the step is ``polar(X^T (Y + sign(Y) exp(-|Y|)))``.

    ``c`` is the worst case. Averaged over a bell-shaped ``y`` the kink alone outweighs the curvature elsewhere, the
    loss is nearly concave in ``Q``, and a smaller ``c`` takes longer steps. So ``c`` starts at ``fraction`` of the
    bound; a step that turns out to have raised the loss is taken back and ``c`` doubled until it does not. At the bound
    the guarantee holds. Losses without a known bound use ``|G| / |Y|`` as the unit of ``c``.

    ``damping`` adds ``damping * |A| / sqrt(n) * Q0`` to the matrix ``A`` whose polar factor is taken. As
    ``<Q, Q0> = n - |Q - Q0|^2 / 2`` this is a proximal term: it keeps the guarantee, leaves directions alone in which
    the activations carry nothing (fewer tokens than channels, dead heads), and bounds the condition number.
    """

    def __init__(self, start: Tensor, problem: Problem, *, fraction: float, damping: float) -> None:
        self._problem = problem
        self._q = start.clone()
        self._damping = damping
        self._fraction = torch.full((*start.shape[:-2], 1, 1), fraction, dtype=start.dtype, device=start.device)
        self._batch: Tensor | None = None
        self._moment = start  # X^T X of the batch: X^T Y = (X^T X) Q costs n^3 a step and no tokens
        self._seen: tuple[Tensor, Tensor] | None = None  # loss and G of the batch at Q

    def step(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """One step that does not raise the loss of this batch; two matmuls with ``x`` if it is the batch before."""
        if self._batch is not x:
            self._batch = x
            self._moment = x.mT @ (x if weights is None else x * _relative(weights))
            self._seen = None
        loss, gradient = self._seen or self._evaluate(x, self._q, weights)
        self._seen = None
        if not bool(torch.isfinite(loss).all()):
            return loss  # for the caller to refuse; there is no polar factor of NaN
        spread = self._unit(gradient) * (self._moment @ self._q)
        target = torch.addcmul(self._problem.pulled_back(x, gradient).neg_(), self._fraction, spread)
        del gradient  # as large as the batch: make room for the next one
        q = self._solve(target)
        seen = self._evaluate(x, q, weights)
        rose = _rose(loss, seen[0])
        for _ in range(_MOST_DOUBLINGS):
            if not bool(rose.any()):
                break
            # The heads that did not rise keep their target and get the same Q again.
            doubled = (2.0 * self._fraction).clamp_max(_LARGEST_FRACTION)
            increase = torch.where(rose[..., None, None], doubled - self._fraction, 0.0)
            self._fraction = self._fraction + increase
            target = torch.addcmul(target, increase, spread)
            q = self._solve(target)
            seen = self._evaluate(x, q, weights)
            rose = _rose(loss, seen[0])
        if bool(rose.any()):
            # At a minimum to rounding: every step rises by noise. Staying is the monotone choice.
            q = torch.where(rose[..., None, None], self._q, q)
            seen = self._evaluate(x, q, weights)
        self._q, self._seen = q, seen
        return loss

    def _evaluate(self, x: Tensor, q: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._problem.objective.loss_and_gradient(self._problem.rotated(x, q), weights)

    def _unit(self, gradient: Tensor) -> Tensor | float:
        """What ``fraction`` is a fraction of: the proven curvature, or ``|G| / |Y|``, as ``|Y|^2 = trace(X^T X)``."""
        if self._problem.objective.curvature is not None:
            return self._problem.objective.curvature
        size = self._moment.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[..., None, None]
        ratio = torch.linalg.matrix_norm(gradient, keepdim=True) / size.clamp_min(1e-30)
        return torch.where(size > 0, ratio, 1.0)

    def _solve(self, target: Tensor) -> Tensor:
        scale = torch.linalg.matrix_norm(target, keepdim=True) / target.shape[-1] ** 0.5
        scale = torch.where(scale > 0, scale, 1.0)  # no signal at all: the polar factor of Q itself, Q stays
        damped = torch.add(target / scale, self._q, alpha=self._damping)
        return polar_factor(damped, tolerance=1e-3)

    def rotation(self) -> Tensor:
        """The rotation after the last step."""
        return self._q

    def set_rate(self, factor: float) -> None:
        """Nothing: there is no learning rate."""


def _rose(before: Tensor, after: Tensor) -> Tensor:
    """Whether a loss rose by more than the float32 rounding of a mean over many tokens."""
    return after > before + 1e-6 * before.abs()


def _relative(weights: Tensor) -> Tensor:
    """Token weights of mean 1, as a column."""
    return (weights / weights.mean(-1, keepdim=True)).unsqueeze(-1)
