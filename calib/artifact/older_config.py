"""``config.json`` for readers of transformers 4 as well: runtimes bundle it. Imports no torch.

transformers 5 keeps all of RoPE under ``rope_parameters``, and the dtype under ``dtype``. Where
version 4 finds neither ``rope_theta`` nor ``rope_scaling``, it takes its defaults without a word:
another model. Both spellings side by side say the same to both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FULL, _SLIDING = "full_attention", "sliding_attention"
_NOT_SCALING = ("rope_theta", "partial_rotary_factor", "rope_type")


def with_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the keys of transformers 4 beside those of 5.

    Args:
        config: a Hugging Face config as a dictionary, in either spelling.
    """
    older: dict[str, Any] = {}
    if config.get("dtype") is not None:
        older["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping):
        older |= _rope(rope, str(config.get("model_type")))
    pattern = config.get("_sliding_window_pattern")
    if isinstance(pattern, int) and config.get("layer_types") == _layer_types(config, pattern):
        older["sliding_window_pattern"] = pattern
    return {**config, **older}


def _rope(rope: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """What ``rope_parameters`` is in version 4, where it is one for all layers, or one for those
    with a window and one for those without.
    """
    if isinstance(rope.get(_FULL), Mapping):
        older = _rope(rope[_FULL], model_type)
        sliding = rope.get(_SLIDING)
        if isinstance(sliding, Mapping):
            older["rope_local_base_freq"] = sliding.get("rope_theta")
        return older

    older = {"rope_theta": rope.get("rope_theta"), "rope_scaling": _scaling(rope, model_type)}
    partial = rope.get("partial_rotary_factor")
    if partial is not None:
        older["partial_rotary_factor"] = partial
    if model_type == "gpt_neox":
        older |= {"rotary_emb_base": rope.get("rope_theta"), "rotary_pct": partial or 1.0}
    return older


def _scaling(rope: Mapping[str, Any], model_type: str) -> dict[str, Any] | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if model_type == "phi3":  # whose config takes these three and no other
        return {"type": kind, **{key: rope[key] for key in ("short_factor", "long_factor")}}
    return {
        "rope_type": kind,
        **{key: value for key, value in rope.items() if key not in _NOT_SCALING},
    }


def _layer_types(config: Mapping[str, Any], pattern: int) -> list[str]:
    """What version 4 makes of ``sliding_window_pattern``."""
    layers = int(config.get("num_hidden_layers", 0))
    return [_SLIDING if (layer + 1) % pattern else _FULL for layer in range(layers)]
