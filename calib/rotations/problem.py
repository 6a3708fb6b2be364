"""The loss of a batch of activations and its derivative with respect to the rotation, tile by tile.

A tile of ``Y = X Q``, its loss and its derivative ``G`` stay in the cache, and of each tile only
its part of ``X^T G`` is kept; or ``G``, in memory that the caller lends, for a product that may
turn out not to be needed. A step so costs its two matmuls and what the loss takes beside them
(``python -m benchmarks.training``). Tiles depend on the shape alone and are added in their order,
losses in float64: the number of threads does not show in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.arithmetic.tiles import ordered_sum, rows_at_once
from calib.rotations.objectives import Objective


class Evaluation:
    """What a batch says of a rotation.

    Args:
        loss: see there.
        derivative: see there; or how to find it, once it is asked for.
        size: see there.
        curvature: see there.
    """

    def __init__(
        self,
        loss: Tensor,
        derivative: Tensor | Callable[[], Tensor],
        size: Tensor,
        curvature: Tensor,
    ) -> None:
        self.loss = loss
        """``[*batch]``, in the dtype of the activations."""
        self._derivative = derivative
        self.size = size
        """``|dL/dY|`` times the number of tokens ``[*batch, 1, 1]``; measured where the objective's
        curvature is not known."""
        self.curvature = curvature
        """``c`` ``[*batch, 1, 1]``."""

    @property
    def derivative(self) -> Tensor:
        """``d(L - c |Y|^2 / 2)/dQ`` times the number of tokens ``[*batch, m, m]``."""
        if not isinstance(self._derivative, Tensor):
            self._derivative = self._derivative()
        return self._derivative

    def replaced(self, where: Tensor, other: Evaluation) -> Evaluation:
        """Those of ``other`` where ``where``, bool ``[*batch]``."""
        wide = where[..., None, None]
        return Evaluation(
            torch.where(where, other.loss, self.loss),
            torch.where(wide, other.derivative, self.derivative),
            torch.where(wide, other.size, self.size),
            torch.where(wide, other.curvature, self.curvature),
        )


@dataclass(frozen=True)
class Problem:
    """Activations and what is asked of them, in the coordinates that are trained.

    Where ``basis`` ``U`` ``[n, m]`` is given, the rotation is ``U Q U^T + 1 1^T / n`` with ``Q``
    ``[m, m]``. Its input has no component along ones (LayerNorm has centred it), so ``Y = (X U) Q
    U^T`` and ``dL/dQ = (X U)^T (G U)``.
    """

    objective: Objective
    basis: Tensor | None = None

    def rotated(self, x: Tensor, q: Tensor) -> Tensor:
        """``Y`` ``[*batch, tokens, n]`` for reduced activations ``x`` ``[*batch, tokens, m]`` and
        ``q``.
        """
        return x @ self._outer(q)

    def loss(self, x: Tensor, q: Tensor, weights: Tensor | None) -> Tensor:
        """The loss ``[*batch]`` of ``x`` at ``q``; arguments as for :meth:`evaluate`."""
        flat, outer, shares = self._flat(x, q, weights)
        total = x.new_zeros(len(flat), dtype=torch.float64)
        for own, rows in self._tiles(flat):
            losses = self.objective.per_token(flat[own, rows] @ outer[own])
            total[own] += (losses.double() * shares[own, rows]).sum(-1)
        return self.objective.reduced(total).reshape(x.shape[:-2]).to(x.dtype)

    def evaluate(
        self,
        x: Tensor,
        q: Tensor,
        weights: Tensor | None,
        *,
        curvature: Tensor | None = None,
        slopes: Tensor | None = None,
        known: Evaluation | None = None,
        changed: Tensor | None = None,
    ) -> Evaluation:
        """Loss and derivative.

        Args:
            x: reduced activations ``[*batch, tokens, m]``.
            q: where ``[*batch, m, m]``.
            weights: token weights ``[*batch, tokens]``; ``None``: all equal.
            curvature: ``c`` ``[*batch, 1, 1]``, where the objective knows one; ``None``: 0.
            slopes: memory ``[*batch, tokens, n]`` for ``dL/dY - c Y``. Where it is given, the
                derivative is computed when it is asked for, from what lies there then.
            known: the evaluation where ``changed`` is false; with ``slopes``, made with the same.
            changed: which of the rotations are not those of ``known``, bool ``[*batch]``.
        """
        flat, outer, shares = self._flat(x, q, weights)
        count, n = len(flat), outer.shape[-1]
        bend = None if curvature is None else curvature.reshape(count, 1, 1)
        kept = None if slopes is None else slopes.view(count, -1, n)
        sums = x.new_zeros(2, count, dtype=torch.float64)  # of losses, and of squares of G
        products = x.new_zeros(count if kept is None else 0, x.shape[-1], n)
        again = None if changed is None else changed.flatten().tolist()
        for own, rows in self._tiles(flat):
            if again is not None and not any(again[own]):
                continue
            tile = flat[own, rows]
            share = shares[own, rows]
            relative = None if weights is None else (share * x.shape[-2]).to(x.dtype)
            losses, slope = self.objective.with_derivative(
                tile @ outer[own], relative, curvature=None if bend is None else bend[own]
            )
            sums[0, own] += (losses.double() * share).sum(-1)
            if self.objective.curvature is None:
                norms = torch.linalg.vector_norm(slope, dim=-1)
                sums[1, own] += norms.double().square().sum(-1)
            if kept is None:
                products[own].baddbmm_(tile.mT, slope)
            else:
                kept[own, rows] = slope

        factor = self.objective.factor(sums[0])

        def derivative() -> Tensor:
            total = products if kept is None else self._pulled_back(flat, kept)
            total = total if self.basis is None else total @ self.basis
            return total.mul_(factor.to(x.dtype)[:, None, None]).reshape(q.shape)

        found = Evaluation(
            self.objective.reduced(sums[0]).to(x.dtype).reshape(x.shape[:-2]),
            derivative if kept is not None else derivative(),
            (factor * sums[1].sqrt()).to(x.dtype).reshape(*x.shape[:-2], 1, 1),
            x.new_zeros(*x.shape[:-2], 1, 1) if curvature is None else curvature,
        )
        if known is None or changed is None:
            return found
        if kept is None:
            return known.replaced(changed, found)
        # the slopes of what is known still lie where they were
        found.loss = torch.where(changed, found.loss, known.loss)
        return found

    def _pulled_back(self, flat: Tensor, slopes: Tensor) -> Tensor:
        """``X^T G`` ``[elements, m, n]``."""
        total = flat.new_zeros(len(flat), flat.shape[-1], slopes.shape[-1])
        for own, rows in self._tiles(flat):
            total[own].baddbmm_(flat[own, rows].mT, slopes[own, rows])
        return total

    def moment(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """``X^T W X`` ``[*batch, m, m]`` with token weights of mean 1, in the dtype of ``x``."""
        flat, _, shares = self._flat(x, None, weights)
        total = x.new_zeros(len(flat), x.shape[-1], x.shape[-1])
        for own, rows in self._tiles(flat):
            tile = flat[own, rows]
            weighted = tile
            if weights is not None:
                weighted = tile * (shares[own, rows].to(x.dtype).unsqueeze(-1) * x.shape[-2])
            total[own].baddbmm_(tile.mT, weighted)
        return total.reshape(*x.shape[:-2], x.shape[-1], x.shape[-1])

    def channels(self, x: Tensor) -> int:
        """``n``."""
        return x.shape[-1] if self.basis is None else self.basis.shape[0]

    def _outer(self, q: Tensor) -> Tensor:
        """``[*batch, m, n]``, by which reduced activations are multiplied."""
        return q if self.basis is None else q @ self.basis.mT

    def _flat(
        self, x: Tensor, q: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Activations, matrices and float64 weights of sum 1 with one batch dimension."""
        flat = x.reshape(-1, *x.shape[-2:])
        outer = flat if q is None else self._outer(q).reshape(len(flat), x.shape[-1], -1)
        if weights is None:
            return (
                flat,
                outer,
                x.new_ones(1, dtype=torch.float64).div(x.shape[-2]).expand(flat.shape[:-1]),
            )
        wide = weights.double()
        return flat, outer, (wide / ordered_sum(wide).unsqueeze(-1)).reshape(flat.shape[:-1])

    def _tiles(self, flat: Tensor) -> Iterator[tuple[slice, slice]]:
        """Batch elements and rows of each tile; what the objective takes together stays so."""
        count, tokens, _ = flat.shape
        heads, entries = self.objective.heads, self.objective.entries
        most = max(1, rows_at_once(flat) // heads)
        rows = tokens if self.objective.whole else min(tokens, most - most % entries or entries)
        elements = heads * max(1, most // rows)
        for begin in range(0, count, elements):
            for first in range(0, tokens, rows):
                yield slice(begin, begin + elements), slice(first, first + rows)
