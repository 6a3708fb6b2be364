"""Loss and derivative by tiles: those of the whole batch, however it is cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import calib.rotations.problem as problem_module
from calib.rotations.objectives import ObjectiveName, make_objective, over_heads
from calib.rotations.problem import Problem
from calib.rotations.quantizer import ActivationScheme
from calib.rotations.starts import haar_start, ones_complement

KV, GROUP = 3, 2


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["whip", "lp", "scheme"])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 64, 10**6])
def test_tiles_add_up_to_autograd_over_the_whole_batch(
    name: ObjectiveName,
    granularity: str,
    weighted: bool,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(problem_module, "rows_at_once", lambda x: rows)
    scheme = ActivationScheme(4, granularity=granularity)  # type: ignore[arg-type]
    objective = over_heads(make_objective(name, scheme=scheme), KV, GROUP)
    basis = ones_complement(9)
    problem = Problem(objective, basis)
    x, q = tokens(2, KV, 20 * GROUP, 8, seed=1), haar_start(8, 0).expand(2, KV, 8, 8)
    share = tokens(20, seed=2).abs().repeat_interleave(GROUP) + 0.1
    weights = share.expand(2, KV, 20 * GROUP) if weighted else None

    leaf = q.clone().requires_grad_()
    loss = objective(problem.rotated(x, leaf), weights)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    found = problem.evaluate(x, q, weights)
    # the same float64 sums in another order
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(found.derivative, slope * x.shape[-2], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(problem.loss(x, q, weights), found.loss, rtol=1e-11, atol=0)
    wide = x if weights is None else x * (weights / weights.mean(-1, keepdim=True)).unsqueeze(-1)
    torch.testing.assert_close(problem.moment(x, weights), x.mT @ wide, rtol=1e-11, atol=1e-11)


def test_only_what_changed_is_evaluated_again() -> None:
    problem = Problem(make_objective("lp"))
    x, q = tokens(3, 30, 8), haar_start(8, 0).repeat(3, 1, 1)
    known = problem.evaluate(x, q, None)
    q[1] = haar_start(8, 1)
    changed = torch.tensor([False, True, False])
    again = problem.evaluate(x, q, None, known=known, changed=changed)
    whole = problem.evaluate(x, q, None)
    for name in ("loss", "derivative", "size"):
        torch.testing.assert_close(getattr(again, name), getattr(whole, name), rtol=0, atol=0)
