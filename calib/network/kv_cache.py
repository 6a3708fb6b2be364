"""The quantized KV cache: observing keys and values, and rounding them.

One static scale each for a layer is applied element by element, so rounding what attention reads is
the same as rounding what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calib.architectures import Wiring
from calib.arithmetic.grids import round_to_grid
from calib.artifact import QuantizedCache
from calib.errors import QuantizationError
from calib.modules.cached_attention import attach, attached_to
from calib.modules.paths import get_submodule
from calib.modules.watch import Run, require_finite, watching
from calib.schemes import TensorScheme


def observe_caches(
    model: nn.Module, attentions: Mapping[int, str], run: Run
) -> dict[int, tuple[Tensor, Tensor]]:
    """Largest magnitude of keys and values while ``run`` runs the model.

    Args:
        model: a causal LM, or one block of it.
        attentions: names of attention modules in ``model``, by layer.
        run: runs the model it is given over all calibration data.

    Returns:
        Two float32 tensors ``[]`` on the CPU, by layer.

    Raises:
        QuantizationError: an attention module that was never reached, or keys or values with NaN or
            Inf.
    """
    observed = {name: _Magnitudes() for name in attentions.values()}
    with watching(model, caches=observed, optional=True) as watch:
        run(model)
    unreached = [name for name in observed if name not in watch.reached]
    if unreached:
        raise QuantizationError(
            f"calibration never reached the attention of {', '.join(unreached)}",
            hint="this attention bypasses transformers' interface: leave --kv out",
        )
    require_finite(
        {name: torch.stack(magnitudes.amax) for name, magnitudes in observed.items()},
        of="keys or values of ",
    )
    return {layer: observed[name].amax for layer, name in attentions.items()}


class _Magnitudes:
    """The largest magnitude of keys and of values so far."""

    def __init__(self) -> None:
        self.amax = (torch.zeros(()), torch.zeros(()))

    def __call__(self, key: Tensor, value: Tensor) -> None:
        amax = [x.detach().abs().amax().float().cpu() for x in (key, value)]
        self.amax = (torch.maximum(self.amax[0], amax[0]), torch.maximum(self.amax[1], amax[1]))


@dataclass(frozen=True)
class CacheRounding:
    """What a quantized cache does to the keys and values of one layer."""

    scheme: TensorScheme
    key_scale: Tensor
    value_scale: Tensor

    def __call__(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, kv_heads, T, head_dim]``, rounded."""
        fmt = self.scheme.format
        return (
            round_to_grid(key, self.key_scale.to(key), None, fmt),
            round_to_grid(value, self.value_scale.to(value), None, fmt),
        )


def attach_cache(model: nn.Module, wiring: Wiring, cache: QuantizedCache) -> None:
    """Let every attention module of ``model`` round keys and values as ``cache`` says, for good."""
    roundings = {}
    for layer, key_scale in cache.key_scale.items():
        name = wiring.attention(layer)
        rounding = CacheRounding(cache.scheme, key_scale.float(), cache.value_scale[layer].float())
        roundings[get_submodule(model, name)] = rounding
    attach(roundings)


def attached_caches(model: nn.Module) -> dict[str, CacheRounding]:
    """What :func:`attach_cache` attached to ``model``, by attention module; nothing to any other
    model.
    """
    transforms = {name: attached_to(module) for name, module in model.named_modules()}
    return {
        name: transform
        for name, transform in transforms.items()
        if isinstance(transform, CacheRounding)
    }
