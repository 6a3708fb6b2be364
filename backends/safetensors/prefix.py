"""The prefix of a bundle, for whoever builds a network from it.

A bundle's ``prefix.safetensors`` is the artifact's: keys after RoPE and R3. A network of the
bundle's tensors has R3 only where the bundle spells it out, next to a quantized cache
(:func:`~backends.safetensors.source.online_rotations`); elsewhere its keys are ``k``, not ``k R3``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from backends.safetensors.read import Bundle, read_prefix, read_rotations
from backends.safetensors.source import rotated_modules
from calib.architectures import wiring_of
from calib.artifact import Prefix


def network_prefix(bundle: Bundle) -> Prefix | None:
    """The prefix of ``bundle``, if it has one, in the bundle's dtype: what stands before the keys
    and values of every sequence, in a cache or as constants. Positions move by its length, and all
    queries see it, whatever their window.

    Returns:
        Keys and values ``[kv_heads, p, head_dim]`` by layer; keys after RoPE, and after R3 where
        the bundle has ``rotation.*`` keys for the layer's attention.

    Raises:
        BackendError: prefix or rotations are not sound.
    """
    prefix = read_prefix(bundle)
    if prefix is None:
        return None
    wiring, rotations = wiring_of(bundle.manifest.config), read_rotations(bundle)
    spelled_out = rotated_modules(bundle.manifest.tensors)

    keys = {}
    for layer, key in prefix.keys.items():
        rotation = rotations.r3(layer)
        if rotation is not None and wiring.attention(layer) not in spelled_out:
            key = rotation.undo(key.double())
        keys[layer] = key

    return replace(prefix, keys=keys).to(getattr(torch, bundle.manifest.dtype))


def prefix_tensors(bundle: Bundle, prefix: Prefix | None) -> dict[str, Tensor]:
    """``prefix`` by the keys that constants for it have in modules and networks:
    ``{attention}.prefix.key`` and ``.value``, ``[kv_heads, p, head_dim]``; none without one.
    """
    if prefix is None:
        return {}
    wiring = wiring_of(bundle.manifest.config)
    return {
        f"{wiring.attention(layer)}.prefix.{part}": by_layer[layer].contiguous()
        for layer in prefix.keys
        for part, by_layer in (("key", prefix.keys), ("value", prefix.values))
    }
