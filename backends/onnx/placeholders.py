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
_UNTRANSLATED = ("s_aux", "position_bias")
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

    Routers compute a softmax as well and are no plain linears: they are traced as they are.
    """
    from transformers.pytorch_utils import Conv1D  # here, because it takes seconds to import

    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear):
            set_submodule(network, name, _OpenLinear(name, module.out_features))
        elif isinstance(module, Conv1D):
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
    known = attention_mask is not None and attention_mask.dtype is torch.bool
    unknown = [name for name in _UNTRANSLATED if others.get(name) is not None]
    if attention_mask is None or not known or unknown:
        reason = f"takes {unknown[0]}" if unknown else "has no mask of true and false"
        raise BackendError(
            f"the attention of {type(module).__name__} cannot be written as ONNX: it {reason}",
            hint="use the safetensors backend, which does not trace the model",
        )

    attributes: dict[str, Any] = {SCALE_ATTRIBUTE: float(scaling or query.shape[-1] ** -0.5)}
    if softcap is not None:
        attributes[SOFTCAP_ATTRIBUTE] = float(softcap)
    shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])

    return _symbolic(ATTENTION, (query, key, value, attention_mask), attributes, query, shape), None


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
