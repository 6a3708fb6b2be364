"""Which attention a model computes here, and attention in plain torch.

transformers' scaled dot product leaves out, without a word, what its arguments do not name. Gemma-2
caps its scores, ``c tanh(s / c)``: a model that does gets a function of its own, so that what is
calibrated and what an export is compared with is the model that its makers published.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_CAPPED = "rotq_capped"


def attention_implementation(config: PreTrainedConfig) -> str:
    """The name, in transformers' registry, of the attention function that computes all that
    ``config`` asks for.
    """
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return registered(_CAPPED, _capped)
    return "sdpa" if _has_fused(config) else "eager"


def _has_fused(config: PreTrainedConfig) -> bool:
    """Whether the model of ``config`` computes all of its attention by the scaled dot product."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING  # here: it takes seconds to import

    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return bool(getattr(model, "_supports_sdpa", True))


def registered(
    name: str, function: Callable[..., Any], masks: str | Callable[..., Any] = "sdpa"
) -> str:
    """Put an attention function into transformers' registry.

    Args:
        name: what it shall be called.
        function: called as transformers' own are.
        masks: what makes its masks, called as transformers' own are; or the implementation whose
            masks it takes, such as ``sdpa``, which has boolean ones.

    Returns:
        ``name``.
    """
    # here, because they take seconds to import
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(
        name, ALL_MASK_ATTENTION_FUNCTIONS[masks] if isinstance(masks, str) else masks
    )
    return name


def attend(
    matmul: Callable[[Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None = None,
) -> Tensor:
    """``softmax(cap(q k^T s) + mask) v``, written out.

    Args:
        matmul: multiplies ``[..., m, n]`` and ``[..., n, o]``.
        query: ``[B, heads, S, d]``.
        key: ``[B, kv_heads, T, d]``.
        value: like ``key``.
        mask: bool ``[B, 1, S, T]``, true where a key is seen; ``None``: every key up to the query's
            own.
        scaling: factor of the scores; ``None``: ``1 / sqrt(d)``.
        softcap: bound of the scores, if they are capped.

    Returns:
        ``[B, S, heads, d]``.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = matmul(query, key.transpose(2, 3)) * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if mask is None:
        lengths = scores.shape[-2:]
        mask = torch.ones(lengths, dtype=torch.bool, device=scores.device).tril(
            lengths[1] - lengths[0]
        )
    # The smallest number, not -inf: a padded query sees no key at all, and NaN would spread from
    # it.
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return matmul(weights, value).transpose(1, 2).contiguous()


def _capped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; tensors as in :func:`attend`."""
    return attend(torch.matmul, query, key, value, attention_mask, scaling, softcap), None
