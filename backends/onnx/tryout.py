"""Whether a model can be traced at all, found before anything is calibrated: trace a shallow one.

Tracing takes seconds for each layer and nothing for its width, as no weight is in memory. So the
model that is tried has the config's own widths, vocabulary and flags, and few of its layers: one of
every kind, and two at least, which is what a model of two layers is traced with anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from backends.base import Reason
from backends.onnx.trace import TraceRequest
from backends.onnx.trace_cache import cached_trace
from calib.architectures import LinearSpec, Wiring, wiring_of
from calib.errors import BackendError, CheckpointError, UnsupportedModelError
from calib.network.skeleton import portable_config
from calib.process.progress import silent

_LEAST = 2
_OPSET = 21
"""Of the targets."""


def untraceable(config: Mapping[str, Any]) -> Reason | None:
    """Why the model of ``config`` cannot be traced, and what to do; ``None`` if it can.

    It is traced in float32: which operators a model has does not depend on the dtype. A success is
    kept among the cached traces, and found again in no time.

    Args:
        config: Hugging Face config as a dictionary.
    """
    try:
        cached_trace(TraceRequest(shallow(config), torch.float32, _OPSET), silent)
    except (BackendError, UnsupportedModelError) as error:
        hint = error.hint or ""
        if wiring_of(config).generic:
            hint = "no other backend takes a family that is not in the architecture table"
        return Reason(error.message, hint)
    return None


def shallow(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the first layer of every kind, in their order, and two layers at least.

    Where a kind follows from a layer's place, and not from a list of the config, all layers up to
    the first of the last kind are kept.
    """
    wiring = wiring_of(config)
    kinds = _kinds(wiring)
    firsts = [layer for layer, kind in enumerate(kinds) if kinds.index(kind) == layer]
    depth = max(_LEAST, len(firsts))
    if depth >= len(kinds):
        return portable_config(wiring.config)

    others = [layer for layer in wiring.layers if layer not in firsts]
    chosen = sorted([*firsts, *others[: depth - len(firsts)]])
    if wiring.generic:  # what else its config counts by layer is not known
        first = _with_layers(wiring, range(max(_LEAST, firsts[-1] + 1)))
        return first if _is_like(first, kinds) else portable_config(wiring.config)
    found = _with_layers(wiring, chosen)
    if _kinds(wiring_of(found)) == [kinds[layer] for layer in chosen]:
        return found
    return _with_layers(wiring, range(max(_LEAST, firsts[-1] + 1)))


def _is_like(config: Mapping[str, Any], kinds: Sequence[tuple[Any, ...]]) -> bool:
    """Whether the layers of ``config`` are of the first of ``kinds``."""
    try:
        found = _kinds(wiring_of(config))
    except (CheckpointError, UnsupportedModelError):  # a config that its class does not take
        return False
    return found == list(kinds[: len(found)])


def _with_layers(wiring: Wiring, layers: Sequence[int]) -> dict[str, Any]:
    """The config with the entries of ``layers`` in every list that has one for each layer."""
    found = portable_config(wiring.config)
    for name, values in _lists(wiring).items():
        found[name] = [values[layer] for layer in layers]
    depth = wiring.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return found | {depth: len(layers)}


def _lists(wiring: Wiring) -> dict[str, list[Any]]:
    """What the config says of each layer, by name."""
    values = portable_config(wiring.config)
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, list) and len(value) == len(wiring.layers) and name != "architectures"
    }


def _kinds(wiring: Wiring) -> list[tuple[Any, ...]]:
    """What a trace can tell of each layer: its linears, its position embedding, its window."""
    lists = _lists(wiring)
    return [
        (
            [
                (spec.reads, spec.layout, _within(spec, layer) if wiring.generic else spec.layers)
                for spec in wiring.layer_linears(layer)
            ],
            wiring.uses_rope(layer),
            [values[layer] for values in lists.values()],
        )
        for layer in wiring.layers
    ]


def _within(spec: LinearSpec, layer: int) -> str:
    """What a linear is called within its layer."""
    return spec.name.partition(f".{layer}.")[2]
