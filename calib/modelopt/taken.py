"""Taking a model that ModelOpt has quantized and calibrated as it stands: nothing is calibrated
again, and nothing is folded.

ModelOpt simulates: weights stay floats, and each quantizer ``Q`` rounds what passes it by its amax
``a``. With ``b`` the largest integer of its format (127, 7, 448)

    Q(x) = clamp(round(x b / a)) a / b,    so that the scale of rotq is    s = a / b,

with ``a`` for the tensor, for an output channel, or for a block of input features. The integers of
a weight are read off what its own quantizer makes of it, ``q = Q(w) / s``, which is a whole number
but for the rounding of floats; what does not give back ``Q(w)`` is refused by the name of its layer
(:data:`_SAME`), whatever format it claims to be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.arithmetic.grids import Grid, dequantize, quantize
from calib.artifact import QuantizedCache, QuantizedLinear
from calib.errors import QuantizationError
from calib.modelopt.config import num_bits
from calib.network.skeleton import build_on_meta, fill_buffers
from calib.schemes import (
    FLOAT4,
    FLOAT8,
    INT4,
    INT8,
    Granularity,
    PerBlock,
    PerChannel,
    PerTensor,
    PerToken,
    TensorScheme,
)

_FORMATS = (INT8, INT4, FLOAT8, FLOAT4)
_SAME = 1e-6
"""Relative to the largest value: how far a weight may be from what ModelOpt's quantizer makes of
it. Both multiply and divide by one float32 scale, which rounds three times; half a step of int8 is
4e-3.
"""
_OURS = ("weight_quantizer", "input_quantizer", "k_bmm_quantizer", "v_bmm_quantizer")
"""Quantizers that are looked for, by the name that they have in their module."""
_FOLD = (
    "rotq smooths by itself: quantize with --smoothing awq or smoothquant:0.5 instead, or give"
    " ModelOpt a configuration without it"
)
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Taken:
    """What was calibrated, beside the float model that it was calibrated on."""

    model: Any
    """The float model, a transformers class; it shares its tensors with the one given."""
    linears: Mapping[str, QuantizedLinear]
    """By module name; scales in float32."""
    cache: QuantizedCache | None


@torch.no_grad()
def take(model: nn.Module) -> Taken:
    """Everything that a model quantized by ``mtq.quantize`` has to say.

    Args:
        model: a Hugging Face causal LM, calibrated.

    Raises:
        QuantizationError: a quantizer that rotq has nothing for, or that was never calibrated, by
            the name of its layer.
    """
    enabled = dict(_enabled(model))
    linears = {}
    for name, quantizers in enabled.items():
        if "weight_quantizer" in quantizers:
            linears[name] = _linear(name, model.get_submodule(name), quantizers)
        elif "input_quantizer" in quantizers:
            raise QuantizationError(
                f"ModelOpt quantizes the input of '{name}', and not its weight",
                hint="rotq has no such linear; quantize both, or the weight alone",
            )
    if not linears:
        raise QuantizationError(
            "ModelOpt's quantizers are all off: nothing is quantized",
            hint="calibrate with mtq.quantize first, or give the float model",
        )
    return Taken(_floats(model), linears, _cache(enabled))


def _enabled(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """The quantizers that are on, by their module and their name in it."""
    found: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        parent, _, own = path.rpartition(".")
        if not own.endswith("_quantizer"):
            continue
        if getattr(module, "pre_quant_scale", None) is not None:  # multiplies when it is off, too
            raise QuantizationError(
                f"ModelOpt's '{path}' multiplies by a pre_quant_scale (SmoothQuant, AWQ)",
                hint=_FOLD,
            )
        if not _is_on(module):
            continue
        if own not in _OURS:
            raise QuantizationError(
                f"ModelOpt's '{path}' is on, and rotq has nothing that rounds there",
                hint="turn it off in the configuration: {'quantizer_name': '*"
                + own
                + "', 'enable': False}",
            )
        found.setdefault(parent, {})[own] = module
    yield from found.items()


def _is_on(quantizer: Any) -> bool:
    """A sequence of several is on if one of them is."""
    if isinstance(quantizer, nn.Sequential):
        return any(_is_on(each) for each in quantizer)
    return bool(quantizer.is_enabled)


def _linear(name: str, module: Any, quantizers: Mapping[str, Any]) -> QuantizedLinear:
    scheme = _scheme(f"{name}.weight", quantizers["weight_quantizer"])
    entering = quantizers.get("input_quantizer")
    input_scheme = None if entering is None else _scheme(f"{name}'s input", entering)
    weight = module.weight.detach()
    if getattr(module, "nf", None) is not None:  # transformers' Conv1D is [in, out]
        raise QuantizationError(
            f"'{name}' is a Conv1D, whose scales ModelOpt has along the other axis",
            hint="quantize GPT-2 from its float model",
        )

    rounded = quantizers["weight_quantizer"](weight).detach().float()
    grid = Grid(_scale(f"{name}.weight", quantizers["weight_quantizer"], scheme, weight.shape))
    stored = quantize(rounded, grid, scheme)
    apart = (dequantize(stored, grid, scheme) - rounded).abs().max()
    if apart > _tolerance(weight.dtype) * rounded.abs().max():
        raise QuantizationError(
            f"ModelOpt rounds the weight of '{name}' otherwise than its numbers of bits, axis and"
            " blocks say",
            hint="rotq takes symmetric integers and float8 by tensor, output channel or block",
        )
    bias = module.bias
    return QuantizedLinear(
        name=name,
        weight=stored,
        weight_scale=grid.scale,
        weight_scheme=scheme,
        bias=None if bias is None else bias.detach().float(),
        input_scheme=input_scheme,
        input_scale=None
        if input_scheme is None or input_scheme.dynamic
        else _scale(f"{name}'s input", entering, input_scheme, torch.Size()),
        online_rotation=None,
    )


def _tolerance(dtype: torch.dtype) -> float:
    """ModelOpt gives back what it rounds in the dtype of the model."""
    return max(_SAME, torch.finfo(dtype).eps)


def _scheme(what: str, quantizer: Any) -> TensorScheme:
    """What ``quantizer`` does, in the words of rotq."""
    if isinstance(quantizer, nn.Sequential):
        raise QuantizationError(
            f"ModelOpt rounds {what} several times over",
            hint="rotq rounds once; choose a configuration with one format for weights",
        )
    fmt = next((each for each in _FORMATS if num_bits(each) == quantizer.num_bits), None)
    granularity = _granularity(quantizer)
    odd = [key for key in ("_unsigned", "_narrow_range") if getattr(quantizer, key, False)]
    if fmt is None or granularity is None or odd or getattr(quantizer, "bias", None) is not None:
        raise QuantizationError(
            f"ModelOpt rounds {what} in a way that rotq has no word for: num_bits"
            f" {quantizer.num_bits}, axis {quantizer.axis}, block_sizes {quantizer.block_sizes}"
            + "".join(f", {key.lstrip('_')}" for key in odd),
            hint="rotq takes symmetric integers and float8 by tensor, output channel, token or"
            " block of input features",
        )
    return TensorScheme(fmt, granularity, dynamic=isinstance(granularity, PerToken))


def _granularity(quantizer: Any) -> Granularity | None:
    """What shares a scale; ``None``: rotq has nothing like it."""
    blocks = quantizer.block_sizes
    if blocks:
        size = blocks.get(-1)
        static = blocks.get("type", "static") == "static" and "scale_bits" not in blocks
        others = [key for key in blocks if key not in (-1, "type")]
        return PerBlock(size) if size and static and not others else None
    dynamic = bool(getattr(quantizer, "_dynamic", False))
    match quantizer.axis:
        case None:
            return None if dynamic else PerTensor()
        case 0 | (0,):
            return None if dynamic else PerChannel(0)
        case (0, 1):
            return PerToken() if dynamic else None
    return None


def _scale(what: str, quantizer: Any, scheme: TensorScheme, shape: torch.Size) -> Tensor:
    """amax over the largest integer, float32 on the CPU, in the shape that ``scheme`` has for a
    weight of ``shape``.
    """
    collected: Tensor | None = getattr(quantizer, "amax", None)
    if collected is None:
        raise QuantizationError(
            f"ModelOpt has no amax for {what}: it was never calibrated",
            hint="give mtq.quantize a forward_loop that reaches every layer",
        )
    amax = collected.detach().float().cpu()
    if not bool(torch.isfinite(amax).all()) or not bool((amax > 0).all()):
        raise QuantizationError(
            f"ModelOpt's amax of {what} is not finite and above zero",
            hint="look at the calibration data, and calibrate again",
        )
    scale = amax / scheme.format.maxbound
    match scheme.granularity:
        case PerChannel():
            return scale.reshape(shape[0])
        case PerBlock(size):
            return scale.reshape(shape[0], -(-shape[1] // size))
    return scale.reshape(())


def _cache(enabled: Mapping[str, Mapping[str, Any]]) -> QuantizedCache | None:
    """Keys and values, where ModelOpt rounds them in attention."""
    layers = {name: own for name, own in enabled.items() if "weight_quantizer" not in own}
    scales: dict[str, dict[int, Tensor]] = {"k_bmm_quantizer": {}, "v_bmm_quantizer": {}}
    schemes = set[TensorScheme]()
    for name, own in layers.items():
        found = _LAYER.search(name)
        if own.keys() != scales.keys() or found is None:
            raise QuantizationError(
                f"ModelOpt rounds in '{name}' keys or values, and not both",
                hint="rotq quantizes the whole cache, or nothing of it",
            )
        for part, quantizer in own.items():
            scheme = _scheme(f"{name}.{part}", quantizer)
            schemes.add(scheme)
            scales[part][int(found[1])] = _scale(f"{name}.{part}", quantizer, scheme, torch.Size())
    if not schemes:
        return None
    if len(schemes) > 1 or not isinstance(next(iter(schemes)).granularity, PerTensor):
        raise QuantizationError(
            "ModelOpt rounds the caches of layers in different ways, or not per tensor",
            hint="rotq has one format for all, with one scale for keys and one for values",
        )
    return QuantizedCache(schemes.pop(), scales["k_bmm_quantizer"], scales["v_bmm_quantizer"])


def _floats(model: Any) -> Any:
    """A model of the config's own class that shares the tensors of ``model``."""
    plain = build_on_meta(model.config, model.dtype)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = [name for name, _ in plain.named_parameters()]
    names += [name for name in plain.state_dict() if name not in names and name in tensors]
    plain.load_state_dict({name: tensors[name] for name in names}, strict=False, assign=True)
    plain.tie_weights()
    fill_buffers(plain)
    plain.name_or_path = getattr(model, "name_or_path", "")
    plain.generation_config = getattr(model, "generation_config", None)
    return plain.eval().requires_grad_(False)
