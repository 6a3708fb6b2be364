"""From a fused float model to the :class:`~calib.artifact.QuantizedModel`: calibrate, turn amax into scales, round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from calib.architectures import LinearSpec, Space
from calib.artifact import Provenance, QuantizedLinear, QuantizedModel
from calib.errors import QuantizationError
from calib.fusing import FusedModel, materialize
from calib.kept import kept_reasons
from calib.modelopt.quantize import ForwardLoop, LinearAmax, modelopt_quantize, read_amax
from calib.scales import convert_to_scale, quantize
from calib.schemes import Granularity, PerBlock, PerChannel, Scheme
from calib.skeleton import portable_config


def quantize_model(
    fused: FusedModel,
    scheme: Scheme,
    forward_loop: ForwardLoop,
    provenance: Provenance,
    *,
    files: Mapping[str, Path] | None = None,
    device: torch.device | str = "cpu",
) -> QuantizedModel:
    """Calibrate ``fused`` with ModelOpt and quantize its decoder linears.

    Args:
        fused: the folded and rotated model in the compute dtype.
        scheme: what to quantize to.
        forward_loop: feeds calibration batches to the model it is given.
        provenance: recorded in the result.
        files: side files of the checkpoint, recorded in the result.
        device: where calibration runs.

    Raises:
        QuantizationError: a linear was never reached, or its statistics yield no finite scale.
    """
    specs = {spec.name: spec for spec in fused.architecture.all_linears(fused.config)}
    names = fused.architecture.linear_names(fused.config)
    amax = _calibrate(fused, scheme, forward_loop, names, device)
    linears = {name: _quantize_linear(fused, specs[name], scheme, amax[name]) for name in names}
    parts = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    return QuantizedModel(
        config=portable_config(fused.config),
        scheme=scheme,
        dtype=fused.dtype,
        linears=linears,
        floats={key: tensor for key, tensor in fused.state.items() if key not in parts},
        kept=kept_reasons(fused, linears),
        rotations=fused.rotations,
        provenance=provenance,
        files=dict(files or {}),
    )


def _calibrate(
    fused: FusedModel, scheme: Scheme, forward_loop: ForwardLoop, names: list[str], device: torch.device | str
) -> dict[str, LinearAmax]:
    """amax by linear. The calibrated module is dropped here: nothing of ModelOpt outlives this call."""
    network: nn.Module = materialize(fused, device=device)
    modelopt_quantize(network, scheme.name, forward_loop=forward_loop, modules=names)
    return read_amax(network, scheme, names)


def _quantize_linear(fused: FusedModel, spec: LinearSpec, scheme: Scheme, amax: LinearAmax) -> QuantizedLinear:
    stored = fused.state[f"{spec.name}.weight"]
    weight = stored.T if spec.layout == "conv1d" else stored
    scale = _scale(spec.name, "weight", amax.weight, scheme.weight.format.maxbound, fused.dtype)
    scale = scale.reshape(_scale_shape(weight, scheme.weight.granularity))
    input_scale = None
    if scheme.activation is not None and amax.input is not None:
        input_scale = _scale(spec.name, "input", amax.input, scheme.activation.format.maxbound, fused.dtype)
    online = None
    if spec.reads is Space.FFN and spec.layer is not None:
        rotation = fused.rotations.r4(spec.layer, spec.branch)
        online = rotation.name if rotation is not None else None
    return QuantizedLinear(
        name=spec.name,
        weight=quantize(weight, scale, scheme.weight),
        weight_scale=scale,
        weight_scheme=scheme.weight,
        bias=fused.state.get(f"{spec.name}.bias"),
        input_scheme=scheme.activation,
        input_scale=input_scale,
        online_rotation=online,
    )


def _scale(name: str, what: str, amax: Tensor, maxbound: float, dtype: torch.dtype) -> Tensor:
    try:
        return convert_to_scale(amax, maxbound, dtype=dtype)
    except QuantizationError as error:
        raise QuantizationError(f"no valid {what} scale for '{name}': {error.message}", hint=error.hint) from error


def _scale_shape(weight: Tensor, granularity: Granularity) -> tuple[int, ...]:
    out_features, in_features = weight.shape
    match granularity:
        case PerChannel(axis):
            return (weight.shape[axis],)
        case PerBlock(size):
            return (out_features, -(-in_features // size))
        case _:
            return ()
