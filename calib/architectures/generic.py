"""The :class:`Architecture` of a family that is not in the table, derived from its module tree.

What a module tree says for certain is which linears there are, and where. It does not say which of
them reads which norm, so that nothing is folded: no rotation, no smoothing, norms as they are.

* Linears are modules that are ``nn.Linear`` or transformers' ``Conv1D``, within the list of decoder
  layers. A subclass counts where its own forward computes the same, which is tried
  (:mod:`calib.architectures.trials`); else it stays as it is.
* Routers and gates, and whatever lies outside the layers, stay in float.
* Experts that are 3-D parameters are quantized where their module computes what
  :class:`calib.network.experts.Experts` does, which is tried in float64 on random numbers.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from calib.architectures.architecture import Architecture
from calib.architectures.spec import KINDS, Dimensions, EmbeddingSpec, LinearSpec
from calib.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

UNKNOWN_WIRING = "it is not in the architecture table, and which linears read its norms is unknown"
"""Why nothing is folded into a model of such a family."""
GENERIC = "family not in the table: generic (no rotation, no smoothing)"
"""What reports say of it."""
_ROUTER = re.compile(r"(^|\.)router(\.|$)|(^|[._])(gate|wg)$")
_KEPT_GATE = "router or gate"
_KEPT_EXPERTS = "experts in a form that rotq does not know"
_STATES = (
    *("linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid", "hybrid_sliding"),
    *("deepseek_sparse_attention", "heavily_compressed_attention", "compressed_sparse_attention"),
)
"""Kinds of layers that keep something else than keys and values, or more, as configs call them."""
_KINDS = ("layer_types", "layers_block_type", "block_types")
"""Where configs list the kind of every layer."""


def generic_architecture(config: PreTrainedConfig) -> Architecture:
    """The architecture of the model of ``config``, whose family is not in the table.

    Raises:
        UnsupportedModelError: it is no decoder that keeps keys and values.
        CheckpointError: transformers cannot build it.
    """
    import torch  # here: the table and its lookup do without

    from calib.architectures.trials import is_fused
    from calib.modules.tree import template

    _refuse_by_config(config)
    model: PreTrainedModel = template(config, torch.float32)
    _refuse_by_class(config, model)
    path, layers = _decoder_layers(config, model)
    embedding, head = _ends(config, model)
    linears, kept, experts = _linears(config, path, layers)

    known = {f"{embedding}.weight", f"{head}.weight", f"{head}.bias"}
    for spec in linears:
        indices = spec.layers if isinstance(spec.layers, frozenset) else range(len(layers))
        for own in map(spec.at, indices):
            known |= {own.weight, own.bias or own.weight}
    width = int(model.get_input_embeddings().weight.shape[1])
    sizes = Dimensions(hidden=width, layers=len(layers), heads=0, kv_heads=0, head_dim=0)
    return Architecture(
        name=str(config.model_type),
        model_types=(str(config.model_type),),
        linears=linears,
        norms=(),
        final_norm=None,
        embeddings=(EmbeddingSpec(embedding),),
        head=LinearSpec(head, reads=None, quantizable=False),
        attention=f"{path}.{{i}}",
        base_prefix=str(model.base_model_prefix),
        untouched=tuple(name for name in model.state_dict() if name not in known),
        rotations_refused=dict.fromkeys(KINDS, UNKNOWN_WIRING),
        rope=lambda config, layer: False,
        experts=path if any(map(is_fused, model.modules())) else None,
        expert_count=lambda config: experts,
        dimensions=lambda config: sizes,
        how="generic",
        kept=kept,
    )


def refused(config: PreTrainedConfig, reason: str, hint: str) -> UnsupportedModelError:
    """The error of a family that is neither in the table nor derived."""
    return UnsupportedModelError(
        f"model_type {config.model_type!r} is not supported: {reason}", hint=hint
    )


_DECODERS = "rotq takes decoders of text that keep keys and values; no option changes that"


def _refuse_by_config(config: PreTrainedConfig) -> None:
    """Refuse what the config alone shows to be no decoder of text with keys and values."""
    from transformers.models.auto import modeling_auto

    kind = str(config.model_type)
    inner = config.get_text_config()
    if inner is not config:
        raise refused(
            config,
            f"it holds a text model of type {inner.model_type!r} among others, and rotq takes a"
            " text model by itself",
            f"save its text model as a checkpoint of type {inner.model_type!r}, and export that:"
            f" {_what_works(str(inner.model_type))}",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise refused(config, "it is an encoder with a decoder", _DECODERS)
    if kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise refused(config, "transformers has no causal LM of it", _DECODERS)
    encodes = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if encodes and not getattr(config, "is_decoder", False):
        raise refused(config, "it is an encoder, whose tokens see those behind them", _DECODERS)
    found = {kind for name in _KINDS for kind in getattr(config, name, None) or ()}
    states = sorted(found.intersection(_STATES))
    if states:
        raise refused(
            config,
            f"its layers of type {states[0]} keep more than keys and values, and the graph has"
            " inputs for these only",
            _DECODERS,
        )


def _what_works(model_type: str) -> str:
    from calib.architectures.table import ARCHITECTURES

    if any(model_type in entry.model_types for entry in ARCHITECTURES):
        return "that type is in the table, with rotations"
    return "that type is not in the table, and would be quantized without rotation"


def _refuse_by_class(config: PreTrainedConfig, model: PreTrainedModel) -> None:
    """Refuse a model that takes no cache of keys and values."""
    import inspect

    taken = inspect.signature(type(model).forward).parameters
    if "past_key_values" not in taken or "input_ids" not in taken:
        raise refused(config, "it keeps no keys and values", _DECODERS)


def _decoder_layers(config: PreTrainedConfig, model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its path: of the lists that are in no other, the largest of
    those beside the token embedding, or of all.
    """
    from torch import nn

    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists[name] = module
    if not lists:
        raise refused(config, "its modules hold no list of decoder layers", _DECODERS)

    def size(name: str) -> int:
        return sum(parameter.numel() for parameter in lists[name].parameters())

    table = model.get_input_embeddings()
    beside = next(name for name, module in model.named_modules() if module is table)
    near = [name for name in lists if name.rpartition(".")[0] == beside.rpartition(".")[0]]
    path = max(near or lists, key=size)
    return path, lists[path]


def _ends(config: PreTrainedConfig, model: PreTrainedModel) -> tuple[str, str]:
    """Names of the token embedding and of the output head."""
    from torch import nn

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if id(embedding) not in names or not isinstance(embedding, nn.Embedding):
        raise refused(config, "its token embedding is no table", _DECODERS)
    if id(head) not in names or not isinstance(head, nn.Linear):
        raise refused(config, "its output head is no linear", _DECODERS)
    return names[id(embedding)], names[id(head)]


def _linears(
    config: PreTrainedConfig, path: str, layers: nn.ModuleList
) -> tuple[tuple[LinearSpec, ...], dict[str, str], int]:
    """What may be quantized of every layer, why the rest may not, and how many experts there
    are.
    """
    from calib.architectures.trials import is_fused, is_known

    found: dict[LinearSpec, set[int]] = {}
    kept: dict[str, str] = {}
    counts: set[int] = set()
    known: dict[type, bool] = {}
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            here = f"{path}.{index}.{name}"
            template = f"{path}.{{i}}.{name}"
            layout = _layout(module)
            if layout is not None and _ROUTER.search(name):
                kept[here] = _KEPT_GATE
            elif layout is not None:
                spec = LinearSpec(template, reads=None, layout=layout)
                found.setdefault(spec, set()).add(index)
            elif is_fused(module):
                if type(module) not in known:
                    known[type(module)] = is_known(module, getattr(config, "hidden_act", None))
                if not known[type(module)]:
                    kept[here] = _KEPT_EXPERTS
                    continue
                counts.add(int(module.gate_up_proj.shape[0]))
                for part in ("gate_up_proj", "down_proj"):
                    spec = LinearSpec(f"{template}.{part}", reads=None, layout="experts")
                    found.setdefault(spec, set()).add(index)
            elif _is_stacked(module):
                kept[here] = _KEPT_EXPERTS
    if len(counts) > 1:
        raise refused(config, f"its layers have {sorted(counts)} experts", _DECODERS)
    linears = tuple(_at(spec, indices) for spec, indices in found.items())
    if not linears:
        raise refused(config, "its decoder layers hold no linear", _DECODERS)
    return linears, kept, next(iter(counts), 0)


def _at(spec: LinearSpec, indices: set[int]) -> LinearSpec:
    return replace(spec, layers=frozenset(indices))


def _is_stacked(module: nn.Module) -> bool:
    """Whether ``module`` has matrices of several experts in one parameter."""
    from torch.nn.modules.conv import _ConvNd

    own = module.named_parameters(recurse=False)
    return not isinstance(module, _ConvNd) and any(each.dim() == 3 for _, each in own)


def _layout(module: nn.Module) -> Literal["linear", "conv1d"] | None:
    """How a linear stores its weight; ``None`` for any other module."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from calib.architectures.trials import is_linear_map

    if isinstance(module, nn.Linear) and is_linear_map(module):
        return "linear"
    return "conv1d" if type(module) is Conv1D else None
