"""A float prefix: a few tokens whose keys and values stand before every sequence, as constants.

Some models turn the first token of *every* row into a massive one, whatever it is: it is where
attention heads that have nothing to say look to (an attention sink), and at a few layers its
activations are a thousand times their median. A static scale has to hold it, and leaves little of
its range to all the others. With a prefix in place the sink is there already, no token of a text
becomes one, and what is calibrated is what the texts are made of. PrefixQuant (arXiv:2410.05265)
found this; its prefix lies in the runtime's cache, ours in the graph.

    q_t of position p + t attends to [K_prefix, K_0 .. K_t], [V_prefix, V_0 .. V_t]

for a prefix of p tokens, whose K (after RoPE, and R3 where there is one) and V (after R2) were
computed once, in float. It is exact for the float model *with that prefix*: the same logits as
running the p tokens in front of the text. It is always seen, also where a sliding window has left
it behind, and it is never rounded: not by a quantizer of an input, nor by that of a cache.

transformers calls attention through a registry of functions. An attention module with a prefix is
switched to one that puts the prefix before keys and values, and a hook on the model moves the
positions by p.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calib.architectures import Wiring
from calib.artifact.prefix import Prefix
from calib.errors import QuantizationError
from calib.modules.attention import registered
from calib.modules.watch import watching

_NAME = "rotq_prefix_"
_ATTRIBUTE = "_rotq_prefix"


def compute_prefix(
    model: nn.Module, wiring: Wiring, tokens: Sequence[int], reason: str = ""
) -> Prefix:
    """Keys and values of ``tokens`` as the float ``model`` computes them, at positions 0 .. p - 1.

    Args:
        model: a causal LM without a prefix, its online rotations attached.
        wiring: of ``model``.
        tokens: ids, at least one.
        reason: recorded in the result.

    Raises:
        QuantizationError: there is no token, one is outside the vocabulary, or the attention of a
            layer cannot be reached.
    """
    check_tokens(wiring, tokens)
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def look(layer: int, key: Tensor, value: Tensor) -> None:
        found[layer] = key[0].detach().cpu().clone(), value[0].detach().cpu().clone()

    ids = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    caches = {wiring.attention(layer): partial(look, layer) for layer in wiring.layers}
    with watching(model, caches=caches):
        model(input_ids=ids, use_cache=False)

    keys, values = ({layer: part[index] for layer, part in found.items()} for index in (0, 1))
    return Prefix(tuple(int(token) for token in tokens), keys, values, reason)


def check_tokens(wiring: Wiring, tokens: Sequence[int]) -> None:
    """Refuse ``tokens`` that no prefix of the model of ``wiring`` can have.

    Raises:
        QuantizationError: there is none, or one is outside the vocabulary.
    """
    vocabulary = int(wiring.config.vocab_size)
    if not tokens or not all(0 <= token < vocabulary for token in tokens):
        raise QuantizationError(
            f"a prefix of the tokens {list(tokens)} does not fit a vocabulary of {vocabulary}",
            hint="give ids of the model's own tokenizer, or --prefix auto",
        )


def attach_prefix(model: nn.Module, wiring: Wiring, prefix: Prefix) -> None:
    """Let ``model`` see ``prefix`` before every sequence, for good.

    It may be called like any other: with or without an attention mask, positions and a cache of its
    own, which holds the tokens of the text alone.

    Raises:
        QuantizationError: the model has a prefix already.
    """
    if getattr(model, _ATTRIBUTE, None) is not None:
        raise QuantizationError(
            "the model has a prefix already", hint="materialize the fused model again"
        )
    for layer in wiring.layers:
        module = model.get_submodule(wiring.attention(layer))
        _switch(module, _PutBefore(prefix.keys[layer], prefix.values[layer]))
    setattr(model, _ATTRIBUTE, prefix)
    # The module that holds the layers: without logits the model is run without its head.
    stack = model.get_submodule(wiring.block_prefix.rstrip(".").rpartition(".")[0])
    stack.register_forward_pre_hook(_MovePositions(prefix.length), with_kwargs=True)


_Transform = Callable[[Tensor, Tensor, "Tensor | None"], "tuple[Tensor, Tensor, Tensor | None]"]


@dataclass(frozen=True, eq=False)
class _PutBefore:
    """Keys, values and mask with the prefix before them."""

    key: Tensor
    value: Tensor

    def __call__(
        self, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = key.shape[0]
        keys, values = (
            torch.cat([part.to(x).expand(rows, *part.shape), x], dim=2)
            for part, x in ((self.key, key), (self.value, value))
        )
        return keys, values, _widened(mask, self.key.shape[1])


def _widened(mask: Tensor | None, length: int) -> Tensor | None:
    """``mask [B, 1, S, T]``, true or 0 where a key is seen, with ``length`` keys before it that all
    queries see.
    """
    if mask is None:
        return None
    seen = torch.ones if mask.dtype is torch.bool else torch.zeros
    before = seen((*mask.shape[:-1], length), dtype=mask.dtype, device=mask.device)
    return torch.cat([before, mask], dim=-1)


@dataclass(frozen=True)
class _MovePositions:
    """Forward pre-hook of what holds the layers: the first token of the text is at position p."""

    length: int

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = _positions(args, kwargs)
        return args, {**kwargs, "position_ids": positions + self.length}


def _positions(args: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Positions of the tokens of a text, int64 ``[B, S]``, as transformers takes them: behind the
    cache, padding left out.
    """
    ids = args[0] if args else kwargs.get("input_ids")
    ids = kwargs["inputs_embeds"] if ids is None else ids
    rows, length = ids.shape[:2]
    mask: Tensor | None = kwargs.get("attention_mask")
    cache = kwargs.get("past_key_values")
    if mask is not None and mask.dim() == 2:
        return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
    start = 0 if cache is None else int(cache.get_seq_length())
    return torch.arange(start, start + length, device=ids.device).expand(rows, length)


def _switch(module: Any, transform: _Transform) -> None:
    """Let the attention ``module`` pass keys, values and mask through ``transform``."""
    setattr(module, _ATTRIBUTE, transform)
    inner = module.config._attn_implementation
    if not inner.startswith(_NAME):
        module.config._attn_implementation = _function(inner)


def _function(inner: str) -> str:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS[inner]

    def function(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        transform: _Transform | None = getattr(module, _ATTRIBUTE, None)
        if transform is not None:
            key, value, attention_mask = transform(
                key, value, _explicit(attention_mask, query, key)
            )
        result: tuple[Tensor, Tensor | None] = attend(
            module, query, key, value, attention_mask, **kwargs
        )
        return result

    return registered(_NAME + inner, function, masks=inner)


def _explicit(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """transformers leaves a mask out where it only says that no token sees those behind it."""
    if mask is not None:
        return mask
    sequence, total = query.shape[2], key.shape[2]
    seen = torch.ones((sequence, total), dtype=torch.bool, device=query.device)
    return seen.tril(total - sequence)[None, None]
