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
    architecture = architecture_named(str(config.get("model_type")))
    called = _templates(architecture, config)
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


def _templates(architecture: Architecture, config: Mapping[str, Any]) -> frozenset[str]:
    """Names of all tensors that a model may have, ``{i}`` for the layer and ``{e}`` for the
    expert.
    """
    called = {*architecture.untouched, *(table.weight for table in architecture.embeddings)}
    for spec in (*architecture.linears, architecture.head):
        called |= {spec.weight, *spec.stacked_from}
        if spec.bias is not None and _biased(spec.name, architecture, config):
            called.add(spec.bias)
    final = () if architecture.final_norm is None else (architecture.final_norm,)
    for norm in (*architecture.norms, *final):
        called.add(norm.weight)
        if architecture.norm_kind == "layer":
            called.add(norm.bias)
    return frozenset(called)


def _biased(name: str, architecture: Architecture, config: Mapping[str, Any]) -> bool:
    """Whether the linear ``name`` has a bias."""
    last = name.rpartition(".")[2]
    for pattern, (key, default) in architecture.biases.items():
        if re.fullmatch(pattern, last):
            return bool(config.get(key, default))
    return False
