"""The quantized KV cache: looking at keys and values where attention takes them from the cache, and
rounding them.

Keys are seen after RoPE and R3, values after R2: what a runtime stores. One static scale each for a
layer is applied element by element, so rounding what attention reads is the same as rounding what
is written.

transformers calls attention through a registry of functions. An attention module with quantizers is
switched to a function that passes keys and values through them and then on to the scaled dot
product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.architectures import Wiring
from calib.arithmetic.grids import round_to_grid
from calib.artifact import QuantizedCache
from calib.errors import QuantizationError
from calib.network.attention import registered
from calib.network.modules import get_submodule
from calib.schemes import TensorScheme

_PREFIX = "rotq_cache_"
_ATTRIBUTE = "_rotq_cache"
Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def observe_caches(
    model: nn.Module, attentions: Mapping[int, str], run: Callable[[nn.Module], None]
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
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def look(layer: int) -> Transform:
        def transform(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            amax = tuple(x.detach().abs().amax().float().cpu() for x in (key, value))
            before = seen.get(layer, (torch.zeros(()), torch.zeros(())))
            seen[layer] = (torch.maximum(before[0], amax[0]), torch.maximum(before[1], amax[1]))
            return key, value

        return transform

    with _attached({get_submodule(model, name): look(layer) for layer, name in attentions.items()}):
        run(model)
    unreached = [name for layer, name in attentions.items() if layer not in seen]
    if unreached:
        raise QuantizationError(
            f"calibration never reached the attention of {', '.join(unreached)}",
            hint="this attention bypasses transformers' interface: leave --kv out",
        )
    for layer, amax in seen.items():
        if not all(bool(torch.isfinite(part)) for part in amax):
            raise QuantizationError(
                f"keys or values of layer {layer} hold NaN or Inf",
                hint="try --dtype bfloat16 or float32",
            )
    return seen


def attach_cache(model: nn.Module, wiring: Wiring, cache: QuantizedCache) -> None:
    """Let every attention module of ``model`` round keys and values as ``cache`` says, for good."""
    transforms = {}
    for layer, key_scale in cache.key_scale.items():
        name = wiring.attention(layer)
        rounding = CacheRounding(cache.scheme, key_scale.float(), cache.value_scale[layer].float())
        transforms[get_submodule(model, name)] = rounding
    _attach(transforms)


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


@contextmanager
def watched_caches(
    model: nn.Module, look: Callable[[nn.Module, CacheRounding, Tensor, Tensor], None]
) -> Iterator[None]:
    """While this lasts, ``look`` gets copies of keys and values before they are rounded, and may
    change them.

    Args:
        model: a model that :func:`attach_cache` was called on, or any other, which has nothing to
            look at.
        look: called with the attention module, what it rounds with, keys and values ``[B, kv_heads,
            T, head_dim]``.
    """
    before = {
        module: found
        for module in model.modules()
        if isinstance(found := _transform(module), CacheRounding)
    }

    def watched(module: nn.Module, rounding: CacheRounding) -> Transform:
        def transform(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            key, value = (
                part.clone(memory_format=torch.contiguous_format) for part in (key, value)
            )
            look(module, rounding, key, value)
            return rounding(key, value)

        return transform

    try:
        for module, rounding in before.items():
            setattr(module, _ATTRIBUTE, watched(module, rounding))
        yield
    finally:
        for module, rounding in before.items():
            setattr(module, _ATTRIBUTE, rounding)


def _transform(module: nn.Module) -> Transform | None:
    found: Transform | None = getattr(module, _ATTRIBUTE, None)
    return found


@contextmanager
def _attached(transforms: Mapping[Any, Transform]) -> Iterator[None]:
    before = {module: module.config._attn_implementation for module in transforms}
    _attach(transforms)
    try:
        yield
    finally:
        for module, implementation in before.items():
            delattr(module, _ATTRIBUTE)
            module.config._attn_implementation = implementation


def _attach(transforms: Mapping[Any, Transform]) -> None:
    """Attention modules share their config with the model, whose masks must suit the function: so
    it is registered.
    """
    for module, transform in transforms.items():
        setattr(module, _ATTRIBUTE, transform)
        inner = module.config._attn_implementation
        if not inner.startswith(_PREFIX):
            module.config._attn_implementation = _rounding_attention(inner)


def _rounding_attention(inner: str) -> str:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = _PREFIX + inner
    attend = ALL_ATTENTION_FUNCTIONS[inner]

    def function(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        transform = _transform(module)
        if transform is not None:
            key, value = transform(key, value)
        result: tuple[Tensor, Tensor | None] = attend(module, query, key, value, *args, **kwargs)
        return result

    return registered(name, function, masks=inner)
