"""Whether a module computes what its name and its shapes suggest, tried on small random numbers in
float64: a class may have a forward of its own, which no shape shows.

    linear    y = x W^T + b
    experts   y = sum over the chosen experts e of w_e  down_e (act(gate_e x) * up_e x)
              gate_up_proj [E, 2 f, h], gate before up;  down_proj [E, h, f]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]
_EXPERTS, _HIDDEN, _INNER = 3, 5, 7
_SCALES = (0.1, 1.0, 10.0, 100.0)
"""Of inputs: a clamp shows only where something reaches it."""
_TOLERANCE = 1e-12
"""Relative L2 of two sums of the same float64 products in another order."""


def is_linear_map(module: nn.Linear) -> bool:
    """Whether ``module``, an ``nn.Linear`` or of a class derived from it, computes a linear map and
    nothing else; its parameters may be on the meta device.
    """
    if type(module) is nn.Linear:
        return True
    own = dict(module.named_parameters())
    if own.keys() - {"bias"} != {"weight"} or next(module.buffers(), None) is not None:
        return False
    square = module.in_features == module.out_features
    inner = _HIDDEN if square else _INNER
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (inner, _HIDDEN), "bias": (inner,)}
    random = {
        name: torch.randn(*shapes[name], generator=generator, dtype=torch.float64) for name in own
    }
    scales = torch.tensor(_SCALES, dtype=torch.float64)[:, None, None]
    x = scales * torch.randn(len(_SCALES), 2, _HIDDEN, generator=generator).double()
    try:
        small = _small(module, {module.in_features: _HIDDEN, module.out_features: inner}, random)
        found = small(x)
        return isinstance(found, Tensor) and _same(found, functional.linear(x, **random))
    except Exception:  # whatever a module makes of sizes that are not its own
        return False


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` holds experts as two 3-D parameters."""
    found = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return all(isinstance(parameter, nn.Parameter) and parameter.dim() == 3 for parameter in found)


def is_known(module: nn.Module, activation: str | None) -> bool:
    """Whether ``module`` computes the formula above.

    Args:
        module: with :func:`is_fused`; its parameters may be on the meta device.
        activation: transformers' name of ``act``.
    """
    from transformers.activations import ACT2FN  # here: it takes seconds to import

    own: Any = module
    experts, width, hidden = own.gate_up_proj.shape
    whole = dict(own.named_parameters()).keys() == {"gate_up_proj", "down_proj"}
    if (
        not whole
        or own.down_proj.shape != (experts, hidden, width // 2)
        or activation not in ACT2FN
    ):
        return False
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gate_up, down = random(_EXPERTS, 2 * _INNER, _HIDDEN), random(_EXPERTS, _HIDDEN, _INNER)
    x = torch.cat([scale * random(2, _HIDDEN) for scale in _SCALES])
    chosen = torch.arange(2 * len(x)).reshape(-1, 2) % _EXPERTS
    weights = random(len(x), 2).abs()
    wanted = _computed(gate_up, down, ACT2FN[activation], x, chosen, weights)
    sizes = {experts: _EXPERTS, hidden: _HIDDEN, width: 2 * _INNER, width // 2: _INNER}
    try:
        small = _small(module, sizes, {"gate_up_proj": gate_up, "down_proj": down})
        found = small(x, chosen, weights)
        return isinstance(found, Tensor) and _same(found, wanted)
    except Exception:  # whatever a module makes of sizes that are not its own
        return False


def _same(found: Tensor, wanted: Tensor) -> bool:
    """Whether all rows agree."""
    if found.shape != wanted.shape:
        return False
    errors = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return bool((errors <= _TOLERANCE).all())


def _small(
    module: nn.Module, sizes: Mapping[int, int], parameters: Mapping[str, Tensor]
) -> nn.Module:
    """A copy of ``module`` with these parameters, its sizes changed to theirs.

    Args:
        module: its parameters may be on the meta device.
        sizes: those of the copy, by those of ``module``.
        parameters: by name.
    """
    small: Any = deepcopy(module)
    for name, value in list(vars(small).items()):
        if type(value) is int and value in sizes:
            setattr(small, name, sizes[value])
    for name, tensor in parameters.items():
        setattr(small, name, nn.Parameter(tensor, requires_grad=False))
    if hasattr(small, "config"):
        small.config = deepcopy(small.config)
        small.config._experts_implementation = "eager"
    ready: nn.Module = small.eval()
    return ready


def _computed(
    gate_up: Tensor, down: Tensor, act: Activation, x: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    total = torch.zeros_like(x)
    for expert in range(_EXPERTS):
        gate, up = functional.linear(x, gate_up[expert]).chunk(2, dim=-1)
        y = functional.linear(act(gate) * up, down[expert])
        total += y * torch.where(chosen == expert, weights, 0.0).sum(dim=-1, keepdim=True)
    return total
