"""Which tensors a checkpoint may hold, by their names and its config.json alone. Imports no torch.

The run compares a checkpoint with the module tree, which is exact. A plan builds none, and asks
here: every name that this allows is one that some model with these layers and biases has.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from calib.architectures.architecture import Architecture
from calib.architectures.lookup import architecture_named

_QKV, _QKVO, _MLP = "[qkv]_proj", "[qkvo]_proj", "(gate|up|down)_proj"
_ATTENTION = {_QKVO: ("attention_bias", False)}
_LLAMA = {**_ATTENTION, _MLP: ("mlp_bias", False)}
_ALWAYS = ("", True)

_BIASES: dict[str, dict[str, tuple[str, bool]]] = {
    "llama": _LLAMA,
    "granite": _LLAMA,
    "smollm3": _LLAMA,
    "mistral": {},
    "mixtral": {},
    "phi3": {},
    "qwen2": {_QKV: _ALWAYS},
    "qwen2_moe": {_QKV: ("qkv_bias", True)},
    "qwen3": _ATTENTION,
    "qwen3_moe": _ATTENTION,
    "gemma": _ATTENTION,
    "gemma2": _ATTENTION,
    "gemma3_text": _ATTENTION,
    "olmo2": _ATTENTION,
    "gpt_neox": {
        "query_key_value|dense": ("attention_bias", True),
        "dense_h_to_4h|dense_4h_to_h": _ALWAYS,
    },
    "gpt2": {".*": _ALWAYS},
    "opt": {"[qkv]_proj|out_proj|fc[12]": ("enable_bias", True)},
}
"""By ``model_type``: which linears have a bias, as a pattern of their last names, and the key of
the config that says so with its default."""

_BUFFER = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(bias|masked_bias)"
    r"|position_ids)$"
)
_EXPERT = re.compile(r"\.experts\.\d+\.")
LISTED = 3
"""Names that a message lists."""


def canonical_name(name: str, architecture: Architecture, known: Container[str]) -> str:
    """The name in the module tree of what a checkpoint calls ``name``.

    Args:
        name: as stored.
        architecture: the family.
        known: names that are in the module tree, among them all that lack its base prefix.
    """
    for pattern, replacement in architecture.renames:
        name = re.sub(pattern, replacement, name)
    if name not in known and not name.startswith(f"{architecture.base_prefix}."):
        name = f"{architecture.base_prefix}.{name}"
    return name


def is_buffer(name: str) -> bool:
    """Whether a stored tensor is what older versions of transformers saved beside the weights:
    rotary frequencies, causal masks, positions. It follows from the config.
    """
    return _BUFFER.search(name) is not None


def uncalled_names(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Those of ``names`` that no model of ``config`` has a use for, sorted; buffers aside.

    Args:
        names: of the stored tensors.
        config: the content of config.json.

    Raises:
        UnsupportedModelError: the ``model_type`` is not in the table.
    """
    model_type = str(config.get("model_type"))
    architecture = architecture_named(model_type)
    called = _templates(architecture, model_type, config)
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    prefix = re.escape(architecture.attention.partition("{i}")[0])
    layer = re.compile(rf"^{prefix}(\d+)\.")

    uncalled = []
    for name in names:
        canonical = canonical_name(name, architecture, called)
        found = layer.match(canonical)
        template = layer.sub(lambda match: f"{match[0][: -len(match[1]) - 1]}{{i}}.", canonical)
        beyond = found is not None and isinstance(layers, int) and int(found[1]) >= layers
        known = template in called or _EXPERT.sub(".experts.{e}.", template) in called
        if (beyond or not known) and not is_buffer(name):
            uncalled.append(name)
    return sorted(uncalled)


def listed(names: list[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _templates(
    architecture: Architecture, model_type: str, config: Mapping[str, Any]
) -> frozenset[str]:
    """Names of all tensors that a model may have, ``{i}`` for the layer and ``{e}`` for the
    expert.
    """
    called = {*architecture.untouched, *(table.weight for table in architecture.embeddings)}
    for spec in (*architecture.linears, architecture.head):
        called |= {spec.weight, *spec.stacked_from}
        if spec.bias is not None and _biased(spec.name, model_type, config):
            called.add(spec.bias)
    for norm in (*architecture.norms, architecture.final_norm):
        called.add(norm.weight)
        if architecture.norm_kind == "layer":
            called.add(norm.bias)
    return frozenset(called)


def _biased(name: str, model_type: str, config: Mapping[str, Any]) -> bool:
    """Whether the linear ``name`` has a bias; of the output head none has."""
    last = name.rpartition(".")[2]
    if "." not in name:
        return False
    for pattern, (key, default) in _BIASES[model_type].items():
        if re.fullmatch(pattern, last):
            return bool(config.get(key, default))
    return False
