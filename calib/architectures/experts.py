"""What the experts of a 3-D parameter are called, one by one, and what of a decoder may be
quantized. Imports no torch.

Expert ``e`` of the parameter ``model.layers.0.mlp.experts.down_proj`` is called
``{parameter}.{e}``: the name of the module that :mod:`calib.network.experts` makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from calib.architectures.wiring import Wiring
from calib.schemes import LinearScheme


def with_parameters(schemes: Mapping[str, LinearScheme], wiring: Wiring) -> dict[str, LinearScheme]:
    """``schemes`` by linear, and of each 3-D parameter whose experts are among them by its own name
    as well.
    """
    return {
        **schemes,
        **{
            spec.name: schemes[name] for name, spec in wiring.quantizable.items() if name in schemes
        },
    }


def expert_index(name: str) -> int:
    """Which expert of its 3-D parameter the linear ``name`` is."""
    return int(name.rpartition(".")[2])
