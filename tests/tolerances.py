"""Every tolerance that the numeric tests use, by name, with where it comes from; another one is
added here.

Relative figures are relative L2 over all elements, unless the name says otherwise.
"""

from __future__ import annotations

import torch

FLOAT32_EPS = torch.finfo(torch.float32).eps

LINEAR = 1e-5
"""One linear in torch against the same linear in a runtime, both fed the same values: the product's
bound for rung 2. Only the order of a float sum differs. These linears have up to 256 inputs; 3e-7
is the most that was seen."""

WEIGHT_ONLY = 1e-5
"""A whole model whose activations stay in float, in torch against a runtime: nothing is rounded to
integers on the way, so the error of each linear adds up and does not grow. 8e-7 is the most that
was seen."""

FLIPS = 5e-2
"""A whole tiny model with quantized activations, in torch against a runtime, or a runtime against
itself under another batch. Sums in another order may push an activation over the edge to the next
integer, and a tiny model has few of them: one flip was seen to cost 1.2e-2, none 2e-7. Whether each
linear is right is held to LINEAR; this bound only tells a model that lost a rotation, a bias or a
mask (0.3 and more) from one that did not."""

SAME_SUMS = 2e-6
"""The same float32 computation under another batch shape or a longer cache, with other summation
orders in the kernels: a few eps (1.2e-7) for each of the two layers."""

NAIVE = 2.0
"""Times the error of the same computation done naively in torch in the dtype of the graph: where
that dtype is float16, no fixed figure says what is right. The rule, and the factor, are those of
Dao's tests of fast kernels."""

FLOAT16_STEPS = 2 * torch.finfo(torch.float16).eps
"""One layer in a graph of float16 against the same layer behind an online rotation. Each of its
operators rounds to float16, by half an eps at most, and errors of a dozen operators add up like
their root: 5.8e-4 is the most that was seen, and a rotation that is missing costs 1."""


def half_step(maxbound: float) -> float:
    """Largest distance, in steps of the scale, between a value within range and what its integer
    stands for.

    Half a step by rounding, and as the quotient reaches ``maxbound``, its float32 rounding (half an
    eps of it), that of the scale and that of the product: less than two eps in all.
    """
    return 0.5 + 2 * maxbound * FLOAT32_EPS


def rounded_once(dtype: torch.dtype) -> float:
    """Relative error of one correct rounding to ``dtype``, and a hair for the float64 division
    before it.
    """
    return torch.finfo(dtype).eps / 2 * (1 + 1e-9)
