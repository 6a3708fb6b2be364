"""What the experts of a 3-D parameter are called, one by one, and what of a decoder may be
quantized. Imports no torch.

Expert ``e`` of the parameter ``model.layers.0.mlp.experts.down_proj`` is called
``{parameter}.{e}``: the name of the module that :mod:`calib.network.experts` makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calib.architectures.architecture import Architecture
from calib.architectures.spec import LinearSpec
from calib.schemes import LinearScheme


def quantizable_linears(architecture: Architecture, config: Any) -> dict[str, LinearSpec]:
    """Every linear of the decoder that may be quantized, by name, in topological order.

    Returns:
        Table entries; those of a 3-D parameter once for every expert.
    """
    found: dict[str, LinearSpec] = {}
    for spec in architecture.all_linears(config):
        if spec.quantizable:
            found |= dict.fromkeys(_names(spec, config), spec)
    return found


def with_parameters(
    schemes: Mapping[str, LinearScheme], architecture: Architecture, config: Any
) -> dict[str, LinearScheme]:
    """``schemes`` by linear, and of each 3-D parameter whose experts are among them by its own name
    as well.
    """
    specs = quantizable_linears(architecture, config)
    return {
        **schemes,
        **{spec.name: schemes[name] for name, spec in specs.items() if name in schemes},
    }


def expert_index(name: str) -> int:
    """Which expert of its 3-D parameter the linear ``name`` is."""
    return int(name.rpartition(".")[2])


def _names(spec: LinearSpec, config: Any) -> list[str]:
    if spec.layout != "experts":
        return [spec.name]
    # Mixtral's num_local_experts has this name as well, through the config's attribute_map.
    return [f"{spec.name}.{expert}" for expert in range(config.num_experts)]
