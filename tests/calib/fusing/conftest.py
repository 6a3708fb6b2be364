"""Tiny random models of every family in the table, and float64 versions of what transformers
computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calib.modules.attention import attention_implementation
from tests.rows import EVERY, ROWS, WHOLE
from tests.tiny import CONFIGS, Tiny, make_tiny, relative_l2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of 48 rows only lose time to threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=WHOLE)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """One model of every family and variant; of the rows of the table, in the census alone."""
    return make_tiny(EVERY[request.param]())


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Tiny:
    """One model of every row of the table that the census proves."""
    return make_tiny(ROWS[request.param]())


@pytest.fixture
def tiny_of() -> Callable[[str], Tiny]:
    """A model by its name in the list above."""
    return lambda name: make_tiny(CONFIGS[name]())


@pytest.fixture
def tiny_from() -> Callable[[Any], Tiny]:
    """A model of a config of the test's own."""
    return make_tiny


@pytest.fixture
def tokens() -> Tensor:
    """Token ids ``[2, 11]``."""
    return torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def exact() -> Callable[[Any], Any]:
    """Patch a model so that norms, routers and capped scores compute in float64 where transformers
    drops to float32.
    """

    def patch(model: Any) -> Any:
        for module in model.modules():
            name = type(module).__name__
            if name.endswith("RMSNorm"):
                offset = 1.0 if name.startswith("Gemma") else 0.0
                module.forward = _RmsNorm(module, offset)
            elif name.startswith("Cohere") and name.endswith("LayerNorm"):
                module.forward = _CenteredNorm(module, 0.0)
            elif name == "GraniteMoeTopKRouter":
                module.forward = _LateRouter(module)
            elif name.endswith("TopKRouter") and not isinstance(module, nn.Linear):
                module.forward = _Router(module)
        if getattr(model.config, "attn_logit_softcapping", None):  # "eager" has a float32 softmax
            model.set_attn_implementation(attention_implementation(model.config))
        return model

    return patch


@dataclass
class _RmsNorm:
    module: Any
    offset: float

    def __call__(self, x: Tensor) -> Tensor:
        eps = getattr(self.module, "variance_epsilon", None) or self.module.eps
        return (
            x
            * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
            * (self.offset + self.module.weight)
        )


class _CenteredNorm(_RmsNorm):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x - x.mean(-1, keepdim=True))


@dataclass
class _LateRouter:
    """The softmax is taken over the chosen experts alone."""

    module: Any

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(x, self.module.weight)
        chosen, index = torch.topk(logits, self.module.top_k)
        return index, chosen.softmax(-1), logits


@dataclass
class _Router:
    module: Any

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(x.reshape(-1, x.shape[-1]), self.module.weight)
        scores, index = torch.topk(logits.softmax(-1), self.module.top_k)
        if getattr(self.module, "norm_topk_prob", True):
            scores = scores / scores.sum(-1, keepdim=True)
        return logits, scores, index


@pytest.fixture
def relative() -> Callable[[Tensor, Tensor], float]:
    """Relative L2 distance of a tensor to a reference, in float64."""

    return relative_l2
