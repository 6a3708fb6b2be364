"""What each linear of a Tripy module must be, from a bundle or from a config and a scheme. Imports
no Tripy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backends.safetensors.manifest import Manifest
from backends.safetensors.source import rotated_modules
from backends.safetensors.tripy.dtypes import tripy_dtype
from calib.architectures import Wiring, wiring_of
from calib.network.skeleton import oriented_shapes
from calib.schemes import LinearScheme, PerBlock, PerChannel, TensorScheme, tensor_scheme_from_dict

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class LinearPlan:
    """One linear. Dtypes are Tripy's names."""

    in_features: int
    out_features: int
    bias: bool
    quant_dtype: str | None = None
    """Of the weight; ``None``: a float linear."""
    per_channel: bool = False
    """One scale for each output feature."""
    block_size: int | None = None
    """Input features that share a scale."""
    input_dtype: str | None = None
    """Of the quantized input; ``None``: it stays in float."""
    reordered: bool = False
    """Whether scales follow another order of the input features."""
    rotation: tuple[int, ...] = ()
    """Orders of the factors of the online rotation of the input; empty: none."""


@dataclass(frozen=True)
class ModulePlan:
    """A whole module."""

    config: Any
    """The transformers config."""
    dtype: str
    """Tripy's name of the dtype of weights and scales."""
    linears: Mapping[str, LinearPlan]
    """Every linear, the head included, by name in the source model."""
    prefix: int = 0
    """Tokens whose keys and values stand before every sequence."""


def plan_of_bundle(manifest: Manifest, prefix: int = 0) -> ModulePlan:
    """The module that the bundle with ``manifest``, and a prefix of that many tokens, fills."""
    wiring = wiring_of(manifest.config)
    shapes = {key: entry.shape for key, entry in manifest.tensors.items()}
    schemes = {
        name: LinearScheme(
            tensor_scheme_from_dict(described["weight"]),
            None if described["input"] is None else tensor_scheme_from_dict(described["input"]),
        )
        for name, described in manifest.linears.items()
    }
    # blocked weights are stored [in, out]
    upright = {
        key: shape[::-1] if key.endswith(".weight") and _blocked(schemes.get(key[:-7])) else shape
        for key, shape in shapes.items()
    }
    return ModulePlan(wiring.config, manifest.dtype, _linears(wiring, upright, schemes), prefix)


def plan_of_config(
    config: Mapping[str, Any], dtype: str, scheme: LinearScheme | None, prefix: int = 0
) -> ModulePlan:
    """The module of ``config`` whose decoder's linears are quantized by ``scheme``, without
    rotations, behind a prefix of that many tokens.
    """
    wiring = wiring_of(config)
    shapes = oriented_shapes(wiring)
    schemes = {} if scheme is None else dict.fromkeys(wiring.linear_names, scheme)
    return ModulePlan(wiring.config, dtype, _linears(wiring, shapes, schemes), prefix)


def _linears(
    wiring: Wiring, shapes: Shapes, schemes: Mapping[str, LinearScheme]
) -> dict[str, LinearPlan]:
    rotated = rotated_modules(shapes)

    plans = {}
    for spec in wiring.linears:
        name = spec.name
        out, width = shapes[f"{name}.weight"]
        factors = [shapes[f"{name}.rotation.factors.{k}"][0] for k in range(rotated.get(name, 0))]
        scheme = schemes.get(name)
        plans[name] = LinearPlan(
            width,
            out,
            bias=f"{name}.bias" in shapes,
            reordered=f"{name}.input_order" in shapes,
            rotation=tuple(factors),
            **({} if scheme is None else _quantization(width, scheme.weight, scheme.input)),
        )

    return plans


def _quantization(
    width: int, weight: TensorScheme, entering: TensorScheme | None
) -> dict[str, Any]:
    granularity = weight.granularity
    return {
        "quant_dtype": tripy_dtype(weight),
        "per_channel": isinstance(granularity, PerChannel),
        "block_size": math.gcd(width, granularity.size)
        if isinstance(granularity, PerBlock)
        else None,
        "input_dtype": None if entering is None else tripy_dtype(entering),
    }


def _blocked(scheme: LinearScheme | None) -> bool:
    return scheme is not None and isinstance(scheme.weight.granularity, PerBlock)
