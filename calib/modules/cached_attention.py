"""Keys and values on their way from the cache into attention: the point where they can be looked
at, and rounded.

transformers calls attention through a registry of functions. An attention module that something is
attached to is switched to a function that passes keys and values through it and then on to the
attention that the model had. Keys are met after RoPE and R3, values after R2: what a runtime
stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from calib.modules.attention import registered

_PREFIX = "rotq_cache_"
_ATTRIBUTE = "_rotq_cache"
Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes keys and values ``[B, kv_heads, T, head_dim]``, and gives what attention reads."""


def attach(transforms: Mapping[Any, Transform]) -> None:
    """Let attention modules pass keys and values through ``transforms``, for good.

    They share their config with the model, whose masks must suit the function: so it is registered.
    """
    for module, transform in transforms.items():
        setattr(module, _ATTRIBUTE, transform)
        inner = module.config._attn_implementation
        if not inner.startswith(_PREFIX):
            module.config._attn_implementation = _passing_through(inner)


@contextmanager
def intercepted(transforms: Mapping[Any, Transform]) -> Iterator[None]:
    """Inside, attention modules pass keys and values through ``transforms``, and then through what
    was attached before.
    """
    attached = {module: attached_to(module) for module in transforms}
    implementations = {module: module.config._attn_implementation for module in transforms}
    attach(
        {
            module: transform if (inner := attached[module]) is None else _chain(transform, inner)
            for module, transform in transforms.items()
        }
    )
    try:
        yield
    finally:
        for module, inner in attached.items():
            if inner is None:
                delattr(module, _ATTRIBUTE)
            else:
                setattr(module, _ATTRIBUTE, inner)
            module.config._attn_implementation = implementations[module]


def attached_to(module: nn.Module) -> Transform | None:
    """What keys and values of an attention module pass through, if anything is attached."""
    transform: Transform | None = getattr(module, _ATTRIBUTE, None)
    return transform


def _chain(first: Transform, second: Transform) -> Transform:
    return lambda key, value: second(*first(key, value))


def _passing_through(inner: str) -> str:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = _PREFIX + inner
    attend = ALL_ATTENTION_FUNCTIONS[inner]

    def function(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        transform = attached_to(module)
        if transform is not None:
            key, value = transform(key, value)
        result: tuple[Tensor, Tensor | None] = attend(module, query, key, value, *args, **kwargs)
        return result

    return registered(name, function, masks=inner)
