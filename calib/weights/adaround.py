"""AdaRound: learn for each weight whether to round it up or down.

Nagel, Amjad, van Baalen, Louizos, Blankevoort, "Up or Down? Adaptive Rounding for Post-Training
Quantization", 2020. With s and z the scale and zero point of a weight w, and V a free variable for
each,

    h(V) = clamp(sigmoid(V) (ζ - γ) + γ, 0, 1)                   ζ = 1.1, γ = -0.1
    w̃   = s (clamp(floor(w / s) + h(V) + z, qmin, qmax) - z)

V starts where w̃ = w, and minimises the layer's reconstruction error and a regulariser that drives
h to 0 or 1,

    E|x W̃ᵀ - x Wᵀ|² + λ Σ (1 - |2 h(V) - 1|^β)

by Adam. The first term is ``tr(dW H dWᵀ)`` with ``H = E[x xᵀ]``, the same for the second moment as
for all the tokens it was taken from. The regulariser is left out at first; then β falls from 20 to
2, so that h is pushed to the ends by and by. In the end each weight is rounded up where h is at
least 1/2.

Rows do not depend on each other. Each row's first term is divided by its error when rounded to
nearest, and multiplied by the number of columns, so that λ means the same whatever the units and
the width. A row without an error has nothing to gain: its first term is left out, and the
regulariser takes it to where it is nearest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calib.arithmetic.grids import Grid, expand_grid
from calib.arithmetic.rounding import encode
from calib.errors import QuantizationError
from calib.schemes import TensorScheme
from calib.weights.clip import clip_grid, rtn
from calib.weights.rounded import Rounded, check_moment, keep_best, on_grid, row_errors

_ZETA, _GAMMA = 1.1, -0.1
_BETA_START, _BETA_END = 20.0, 2.0
_WARM_UP = 0.2


def adaround(
    weight: Tensor,
    moment: Tensor,
    scheme: TensorScheme,
    dtype: torch.dtype = torch.float32,
    *,
    iterations: int = 1000,
    regularisation: float = 100.0,
    learning_rate: float = 0.02,
    clip: bool = True,
) -> Rounded:
    """Quantize ``weight`` [out, in] by AdaRound. Nothing in it is random.

    A row whose output error comes out larger than that of rounding to nearest, with searched limits
    or on the grid that just covers the weight, is rounded to nearest instead (all rows or none
    where they share one scale).

    Args:
        weight: any float dtype.
        moment: ``E[x xᵀ]`` of the input, ``[in, in]``.
        scheme: an integer format, and its granularity.
        dtype: dtype of the scales.
        iterations: steps of Adam; the first fifth is without the regulariser.
        regularisation: λ. A large one is best: while β is high, only those weights feel it that are
            nearly decided, and the others make up for what deciding them costs.
        learning_rate: of Adam.
        clip: search the limits of each group as :func:`calib.weights.clip.mse` does, counting
            columns by E[x²].

    Raises:
        QuantizationError: the format is not an integer one, or ``moment`` does not fit or holds NaN
            or Inf.
    """
    if scheme.format.kind != "integer":
        raise QuantizationError(
            f"AdaRound rounds to integers, and {scheme.format.name} is a floating-point format",
            hint="use gptq or mse for this scheme",
        )
    weight = weight.detach().float()
    moment = check_moment(weight, moment).float()
    nearest = [rtn(weight, scheme, dtype)]
    if clip:
        grid = clip_grid(weight, scheme, dtype, importance=moment.diagonal())
        nearest.append(on_grid(weight, grid, scheme))
    start = nearest[-1]
    error = row_errors(weight, start.values(scheme), moment).float()
    # infinite for a row without an error
    row_weights = (weight.shape[1] / error).nan_to_num(posinf=0.0)
    problem = _Problem(weight, moment, start.grid, scheme, row_weights)
    learnt = problem.learn(iterations, regularisation, learning_rate)
    return keep_best(weight, moment, scheme, [*nearest, Rounded(learnt, start.grid)])


class _Problem:
    """The rounding of one weight.

    Args:
        weight: float32 ``[out, in]``.
        moment: float32 ``[in, in]``.
        grid: where to.
        scheme: format and granularity.
        row_weights: ``[out]``, what the reconstruction error of each row counts.
    """

    def __init__(
        self, weight: Tensor, moment: Tensor, grid: Grid, scheme: TensorScheme, row_weights: Tensor
    ) -> None:
        self._weight, self._moment = weight, moment
        self._format = scheme.format
        self._scale, zero = expand_grid(grid, weight.shape, scheme.granularity)
        self._zero: Tensor | float = 0.0 if zero is None else zero
        self._floor = (weight / self._scale).floor()
        self._row_weights = row_weights.unsqueeze(1)

    def learn(self, iterations: int, regularisation: float, learning_rate: float) -> Tensor:
        """The stored values ``[out, in]``."""
        remainder = self._weight / self._scale - self._floor
        free = torch.special.logit((remainder - _GAMMA) / (_ZETA - _GAMMA)).requires_grad_()
        # a third of the time on the CPU
        adam = torch.optim.Adam([free], lr=learning_rate, fused=True)
        for step in range(iterations):
            up = _rectified_sigmoid(free)
            loss = self._reconstruction(up)
            progress = (step / iterations - _WARM_UP) / (1 - _WARM_UP)
            if progress >= 0:
                loss = loss + regularisation * (1 - (2 * up - 1).abs().pow(_beta(progress))).sum()
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
        return encode(self._codes((_rectified_sigmoid(free.detach()) >= 0.5).float()), self._format)

    def _reconstruction(self, up: Tensor) -> Tensor:
        """A scalar whose *gradient* is that of ``Σ_rows weight · dw H dwᵀ``, which is linear in
        ``dw H``.

        The gradient is ``2 dW H``: one matrix product, where differentiating the trace would take
        two.
        """
        difference = self._scale * (self._codes(up) - self._zero) - self._weight
        gradient = 2 * self._row_weights * (difference.detach() @ self._moment)
        return (gradient * difference).sum()

    def _codes(self, up: Tensor) -> Tensor:
        return (self._floor + up + self._zero).clamp(self._format.qmin, self._format.qmax)


def _rectified_sigmoid(free: Tensor) -> Tensor:
    return (torch.sigmoid(free) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def _beta(progress: float) -> float:
    """20 at the start of the regularised part, 2 at its end, along half a period of a cosine."""
    return _BETA_END + (_BETA_START - _BETA_END) * (1 + math.cos(math.pi * progress)) / 2
