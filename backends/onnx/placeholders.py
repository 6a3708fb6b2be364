"""What stands in a traced model for the parts that are filled in afterwards, per scheme and per
target.

    rotq::Linear(x) module            y = x W^T + b of a linear, a Conv1D or the output head
    rotq::Attention(q, k, v, mask) scale, softcap
                                      softmax(cap(q k^T scale) + mask) v
    rotq::Experts(x, chosen, weights) module, experts
                                      sum over the chosen experts of weight * expert(x)

A placeholder carries names and numbers of the config, never a weight. So no large weight is in
memory during the trace, none is constant-folded or renamed, and the traced graph depends on neither
the scheme nor the target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calib.architectures import Wiring
from calib.errors import BackendError
from calib.modules.attention import registered
from calib.modules.paths import set_submodule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DOMAIN = "rotq"
LINEAR, ATTENTION, EXPERTS = "Linear", "Attention", "Experts"
MODULE_ATTRIBUTE = "module"
SCALE_ATTRIBUTE, SOFTCAP_ATTRIBUTE = "scale", "softcap"
COUNT_ATTRIBUTE = "experts"

_ATTENTION_FUNCTION = "rotq_open"
_UNTRANSLATED = ("position_bias",)
"""Arguments of transformers' attention functions that change what is computed and that the
placeholder cannot hold.
"""


class _OpenLinear(nn.Module):
    """Stands for the linear called ``name``; ``[..., in]`` -> ``[..., out]``."""

    def __init__(self, name: str, out_features: int) -> None:
        super().__init__()
        self.name = name
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        return _symbolic(LINEAR, (x,), {MODULE_ATTRIBUTE: self.name}, x, shape)


class _OpenExperts(nn.Module):
    """Stands for the module called ``name`` that holds the experts of a layer."""

    def __init__(self, name: str, experts: int) -> None:
        super().__init__()
        self.name = name
        self.experts = experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[tokens, h]``; see :func:`calib.network.experts.mix_experts`."""
        attributes = {MODULE_ATTRIBUTE: self.name, COUNT_ATTRIBUTE: self.experts}
        inputs = (hidden_states, top_k_index, top_k_weights)
        return _symbolic(EXPERTS, inputs, attributes, hidden_states, tuple(hidden_states.shape))


def open_up(network: PreTrainedModel, wiring: Wiring) -> None:
    """Put placeholders in the place of every linear, of the experts and of the attention of
    ``network``.

    Routers compute a softmax as well and are no plain linears, though some derive from one: they
    are traced as they are.
    """
    from transformers.pytorch_utils import Conv1D  # here, because it takes seconds to import

    for name, module in list(network.named_modules()):
        if name not in wiring.by_name:  # a router, or what computes by a forward of its own
            continue
        # a class derived from it may compute something else, unless that was tried
        tried = wiring.generic and isinstance(module, nn.Linear)
        if tried or type(module) is nn.Linear:
            set_submodule(network, name, _OpenLinear(name, module.out_features))
        elif type(module) is Conv1D:
            set_submodule(network, name, _OpenLinear(name, module.nf))
    for name in {parameter.rpartition(".")[0] for parameter in wiring.expert_parameters}:
        set_submodule(network, name, _OpenExperts(name, wiring.experts))
    network.set_attn_implementation(registered(_ATTENTION_FUNCTION, _open_attention, _open_mask))


def _open_mask(*, batch_size: int, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
    """transformers' boolean mask; the padding in it broadcast, where transformers looks every key
    of every row up.
    """
    from transformers.masking_utils import sdpa_mask

    visible: Tensor = sdpa_mask(
        batch_size=1, attention_mask=None, **others | {"allow_is_causal_skip": False}
    )
    return visible if attention_mask is None else visible & attention_mask[:, None, None, :].bool()


def _open_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; tensors as in :func:`calib.modules.attention.attend`.

    A sliding window is in the mask.
    """
    unknown = [name for name in _UNTRANSLATED if others.get(name) is not None]
    if attention_mask is None or unknown:
        reason = f"takes {unknown[0]}" if unknown else "has no mask"
        raise BackendError(
            f"the attention of {type(module).__name__} cannot be written as ONNX: it {reason}",
            hint="use the safetensors backend, which does not trace the model",
        )

    scale = float(scaling or query.shape[-1] ** -0.5)
    sinks = others.get("s_aux")
    if sinks is not None and attention_mask.dtype is torch.bool:
        query, key, value, attention_mask = _with_sinks(
            query, key, value, attention_mask, sinks / scale
        )
    if attention_mask.dtype is not torch.bool:  # more than what is seen: a bias of scores
        return _biased(query, key, value, attention_mask, scale, softcap), None
    attributes: dict[str, Any] = {SCALE_ATTRIBUTE: scale}
    if softcap is not None:
        attributes[SOFTCAP_ATTRIBUTE] = float(softcap)
    shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])

    return _symbolic(ATTENTION, (query, key, value, attention_mask), attributes, query, shape), None


def _biased(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """``softmax(cap(q k^T scale) + bias) v``, traced as it is written."""
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    return ((scores + bias).softmax(dim=-1) @ value).transpose(1, 2)


def _with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One key more, which every query sees, whose score is ``sinks [heads]`` (before the scale) and
    whose value is zero: ``q' = [q, s]``, ``k' = [k 0; 0 1]``, ``v' = [v; 0]``.
    """
    rows, heads, queries, _ = query.shape
    query = torch.cat(
        [query, sinks.to(query).reshape(1, heads, 1, 1).expand(rows, heads, queries, 1)], dim=-1
    )
    none, one = torch.zeros_like(key[:, :, :1]), torch.ones_like(key[:, :, :1, :1])
    key = torch.cat(
        [
            torch.cat([none, one], dim=-1),
            torch.cat([key, torch.zeros_like(key[..., :1])], dim=-1),
        ],
        dim=2,
    )
    value = torch.cat([torch.zeros_like(value[:, :, :1]), value], dim=2)
    mask = torch.cat([torch.ones_like(mask[..., :1]), mask], dim=-1)
    return query, key, value, mask


def _symbolic(
    operator: str,
    inputs: tuple[Tensor, ...],
    attributes: dict[str, Any],
    like: Tensor,
    shape: tuple[Any, ...],
) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{operator}", inputs, attributes, dtype=like.dtype, shape=shape, version=1
    )
    return result
