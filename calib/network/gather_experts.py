"""From the linears of single experts to the modules that hold and route to them."""

from __future__ import annotations

from collections.abc import MutableMapping

from torch import Tensor, nn

from calib.architectures import LinearSpec, Wiring
from calib.network.experts import Experts
from calib.rotations.rotation_set import RotationSet


def gather_experts(
    modules: MutableMapping[str, nn.Module],
    floats: MutableMapping[str, Tensor],
    wiring: Wiring,
    rotations: RotationSet,
) -> None:
    """Move the experts among ``modules`` into :class:`Experts`, one for each layer, which take
    their place.

    Args:
        modules: linears by name, those of experts named as :mod:`calib.architectures.experts` says.
        floats: parameters by name. Where only one of a layer's two 3-D parameters is in
            ``modules``, the other one is taken out of here.
        wiring: that of the model.
        rotations: an R4 before down projections that are float; others are expected to apply it
            themselves.
    """
    from transformers.activations import ACT2FN  # here, because it takes seconds to import

    def matrices(spec: LinearSpec) -> list[nn.Module]:
        if spec.name in floats:
            return [_linear(weight) for weight in floats.pop(spec.name)]
        return [modules.pop(f"{spec.name}.{expert}") for expert in range(wiring.experts)]

    for layer in range(wiring.sizes.layers):
        specs = [spec for spec in wiring.layer_linears(layer) if spec.layout == "experts"]
        if all(spec.name in floats for spec in specs):  # no experts, or none quantized
            continue
        gate_up, down = specs
        rotation = rotations.r4(layer, down.branch) if down.name in floats else None
        path = down.name.rpartition(".")[0]
        modules[path] = Experts(
            matrices(gate_up), matrices(down), ACT2FN[wiring.config.hidden_act], rotation
        )


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
