"""Observing experts by their names, and counting the tokens that reach them.

While a model is observed, modules take the place of its 3-D expert parameters, whose memory they
share, and every observer of inputs works on an expert as on any other linear. ModelOpt is left out:
its plugin for such parameters gives all experts of a layer one input quantizer, and its search for
quantizers by name takes time in the square of their number. The scale is the same, amax over the
largest integer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.architectures.experts import expert_index
from calib.errors import QuantizationError
from calib.modules.paths import set_submodule
from calib.modules.watch import Run, watching
from calib.network.experts import Experts
from calib.network.online import rotation_of_experts

_SHOWN = 3
"""Experts that are named with their tokens beside those that saw none."""


@contextmanager
def experts_as_modules(module: nn.Module, names: Collection[str]) -> Iterator[dict[str, Experts]]:
    """Inside, the 3-D expert parameters of ``module`` that ``names`` reach into are
    :class:`Experts`.

    Args:
        module: a model, or a block of one; as it was, afterwards.
        names: linears by their path in ``module``, of experts or not.

    Yields:
        All :class:`Experts` in ``module`` by path, those that were there before included.
    """
    fused = {
        path: found
        for path, found in module.named_modules()
        if _is_fused(found) and any(name.startswith(f"{path}.") for name in names)
    }
    for path, found in fused.items():
        set_submodule(module, path, _unfused(found))
    try:
        yield {path: found for path, found in module.named_modules() if isinstance(found, Experts)}
    finally:
        for path, found in fused.items():
            set_submodule(module, path, found)


def count_tokens(
    module: nn.Module, experts: Mapping[str, Experts], run: Run
) -> dict[str, tuple[int, ...]]:
    """How many tokens each expert sees while ``run(module)`` runs.

    Args:
        module: what ``run`` runs.
        experts: the :class:`Experts` in it by path, as :func:`experts_as_modules` yields them.
        run: feeds batches without padding to the model.

    Returns:
        Tokens by expert, for every path.
    """
    counts = {path: _Count(len(found.down_proj)) for path, found in experts.items()}
    with watching(module, calls=counts, optional=True):
        run(module)
    return {path: tuple(count.tokens.tolist()) for path, count in counts.items()}


def check_reached(names: Collection[str], tokens: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse to calibrate experts that no token reached.

    Args:
        names: linears that something has to be observed of, of experts or not.
        tokens: what :func:`count_tokens` counted.

    Raises:
        QuantizationError: naming every such expert, and those of the others that saw the fewest,
            with their tokens.
    """
    wanted: dict[str, set[int]] = {
        path: {expert_index(name) for name in names if name.startswith(f"{path}.")}
        for path in tokens
    }
    empty = {
        path: [e for e in sorted(experts) if not tokens[path][e]]
        for path, experts in wanted.items()
    }
    missing = sum(map(len, empty.values()))
    if not missing:
        return

    others = sorted(
        (tokens[path][e], e, path)
        for path, experts in wanted.items()
        for e in experts
        if tokens[path][e]
    )
    fewest = "; ".join(f"expert {e} of {path}: {count}" for count, e, path in others[:_SHOWN])
    raise QuantizationError(
        f"calibration sent 0 tokens to {missing} of {sum(map(len, wanted.values()))} experts: "
        + "; ".join(
            f"{', '.join(map(str, found))} of {path}" for path, found in empty.items() if found
        )
        + (f". The fewest that others saw: {fewest}" if fewest else ""),
        hint=(
            "use more calibration rows (--nsamples), or round the weights of experts alone, to"
            " nearest: --override '*.experts.*=int8-weight-only' --weight-algorithm rtn"
        ),
    )


class _Product(nn.Module):
    """``x W^T`` by one slice of a 3-D parameter. No ``nn.Linear``, which ModelOpt would put
    quantizers into.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


def _is_fused(module: nn.Module) -> bool:
    found = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return all(isinstance(parameter, nn.Parameter) and parameter.dim() == 3 for parameter in found)


def _unfused(experts: Any) -> Experts:
    return Experts(
        (_Product(weight) for weight in experts.gate_up_proj.detach()),
        (_Product(weight) for weight in experts.down_proj.detach()),
        experts.act_fn,
        rotation_of_experts(experts),
    ).eval()


class _Count:
    """Tokens ``[E]`` that routes sent to each of some experts."""

    def __init__(self, experts: int) -> None:
        self.tokens = torch.zeros(experts, dtype=torch.int64)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        routed = top_k_index.flatten().cpu()
        self.tokens.add_(torch.bincount(routed, minlength=len(self.tokens)))
