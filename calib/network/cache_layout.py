"""What a network keeps of the tokens that it has seen: the shapes of its keys and values, layer by
layer, found by running it once. Configs spell them in too many ways: heads of keys and of values
may differ in width (latent attention), layers from one another, and a layer may read the cache of
another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calib.errors import RotqError, UnsupportedModelError
from calib.files.reading import reason_of
from calib.modules.calling import taken

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LayerCache:
    """Of one layer, ``[batch, heads, tokens, width]``.

    Attributes:
        key: heads and width of its keys.
        value: likewise.
    """

    key: tuple[int, int]
    value: tuple[int, int]


@torch.no_grad()
def cache_layout(network: PreTrainedModel) -> tuple[LayerCache, ...]:
    """The caches of ``network``, in the order in which it keeps them; there may be fewer than
    layers.

    Args:
        network: a causal LM, on the CPU. What its linears compute does not matter.

    Raises:
        UnsupportedModelError: it keeps something else, or nothing.
    """
    from transformers import DynamicCache

    tokens = torch.zeros(2, 3, dtype=torch.long)
    cache: Any = DynamicCache()
    kind = network.config.model_type
    try:
        network(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            use_cache=True,
            **taken(network, {"position_ids": torch.arange(3).expand_as(tokens)}),
        )
    except RotqError:  # a placeholder that cannot stand for what the model does
        raise
    except Exception as error:  # whatever a class makes of a cache, or of modules, not its own
        raise UnsupportedModelError(
            f"model_type {kind!r} is not supported: it does not run with a plain cache of keys and"
            f" values: {reason_of(error)}",
            hint="rotq takes decoders that do",
        ) from error
    if not cache.layers:
        raise UnsupportedModelError(
            f"model_type {kind!r} is not supported: it keeps no keys and values",
            hint="rotq takes decoders that do",
        )
    return tuple(_layer(kind, index, layer) for index, layer in enumerate(cache.layers))


def _layer(kind: str, index: int, layer: object) -> LayerCache:
    key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
    plain = type(layer).__name__ == "DynamicLayer"
    tensors = [part for part in (key, value) if isinstance(part, Tensor)]
    shapes = [tuple(part.shape) for part in tensors if part.dim() == 4]
    if not plain or [shape[::2][:2] for shape in shapes] != [(2, 3)] * 2:
        raise UnsupportedModelError(
            f"model_type {kind!r} is not supported: layer {index} keeps a state of another form"
            f" ({type(layer).__name__}), and the graph has inputs for keys and values only",
            hint="rotq takes decoders that keep keys and values",
        )
    return LayerCache(*((shape[1], shape[3]) for shape in shapes))
