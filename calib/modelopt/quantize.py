"""Running ModelOpt: put quantizers into a model, let a forward loop fill them, read their amax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import Tensor, nn

from calib.errors import DataError, QuantizationError
from calib.modelopt.config import modelopt_config
from calib.modules import get_submodule
from calib.schemes import Granularity, PerBlock, PerChannel, PerTensor, Scheme, scheme_named

ForwardLoop = Callable[[nn.Module], None]


@dataclass(frozen=True)
class LinearAmax:
    """Largest magnitudes that ModelOpt saw at one linear.

    Attributes:
        weight: float32, shape ``[1]`` (per tensor), ``[out]`` (per channel) or ``[out, ceil(in / size)]`` (per block).
        input: float32 ``[1]``, or ``None`` where the scheme leaves inputs in float.
    """

    weight: Tensor
    input: Tensor | None


def modelopt_quantize(
    model: nn.Module,
    quant_mode: str,
    *,
    forward_loop: ForwardLoop | None = None,
    modules: Sequence[str] | None = None,
) -> nn.Module:
    """Quantize and calibrate ``model`` in place with ModelOpt.

    Args:
        model: any module with ``nn.Linear`` layers (a Hugging Face causal LM, say), in eval mode.
        quant_mode: a scheme of :data:`calib.schemes.SCHEMES`, such as ``int8-weight-only`` or ``float8``.
        forward_loop: feeds calibration batches to the model it is given, as
            :func:`calib.forward_loop.create_forward_loop` makes them. Weight-only modes need none.
        modules: dotted names of the linears to quantize; by default every ``nn.Linear`` but the output head.

    Returns:
        The same model; its linears are ModelOpt's ``QuantLinear`` whose quantizers hold amax.

    Raises:
        QuantizationError: unknown mode, a quantized linear that calibration never reached, or NaN or Inf in the weights
            or inputs of one.
        DataError: the mode quantizes activations and no forward loop was given.
        CheckpointError: one of ``modules`` does not exist.

    Source: ``modelopt_quantize`` of the nanoGPT example in NVIDIA's TensorRT-Incubator.
    """
    scheme = scheme_named(quant_mode)
    if not scheme.weight_only and forward_loop is None:
        raise DataError(
            f"'{quant_mode}' quantizes activations and needs calibration data",
            hint="pass forward_loop=create_forward_loop(...)",
        )
    names = list(modules) if modules is not None else _linears_but_head(model)
    linears: dict[str, Any] = {name: get_submodule(model, name) for name in names}
    damaged = [name for name, linear in linears.items() if not bool(torch.isfinite(linear.weight).all())]
    if damaged:
        raise _not_finite(f"the weights of {', '.join(damaged)}")
    entered: list[str] = []
    watch = [
        linear.register_forward_pre_hook(lambda *_, name=name: entered.append(name)) for name, linear in linears.items()
    ]
    try:
        with torch.no_grad():
            quantized: nn.Module = mtq.quantize(model, modelopt_config(scheme, names), forward_loop)
    except AssertionError as error:  # ModelOpt asserts that what it collects is finite
        raise _not_finite(f"the input of {entered[-1] if entered else 'a linear'}") from error
    finally:
        for handle in watch:
            handle.remove()
    read_amax(quantized, scheme, names)
    return quantized


def read_amax(model: nn.Module, scheme: Scheme, modules: Sequence[str]) -> dict[str, LinearAmax]:
    """The calibrated amax of every linear in ``modules``, by name.

    Raises:
        QuantizationError: a linear holds no amax (it was never run) or one that is NaN or infinite; all are named.
    """
    found: dict[str, LinearAmax] = {}
    unreached: list[str] = []
    for name in modules:
        linear: Any = get_submodule(model, name)
        weight = _amax(linear.weight_quantizer, _amax_shape(linear.weight, scheme.weight.granularity))
        inputs = None if scheme.activation is None else _amax(linear.input_quantizer, (1,))
        if weight is None or (inputs is None and scheme.activation is not None):
            unreached.append(name)
            continue
        found[name] = LinearAmax(weight, inputs)
    if unreached:
        raise QuantizationError(
            f"calibration never reached {len(unreached)} linear(s): {', '.join(unreached)}",
            hint="use more calibration rows (--nsamples), or check that the model runs these layers",
        )
    broken = [name for name, amax in found.items() if not _finite(amax)]
    if broken:
        raise _not_finite(", ".join(broken))
    return found


def _amax(quantizer: Any, shape: tuple[int, ...]) -> Tensor | None:
    """What a quantizer collected. Its ``export_amax`` would put 127 in place of zero, NaN and Inf."""
    collected: Tensor | None = getattr(quantizer, "amax", None)
    return None if collected is None else collected.detach().float().cpu().reshape(shape)


def _amax_shape(weight: Tensor, granularity: Granularity) -> tuple[int, ...]:
    """The shape of :attr:`LinearAmax.weight`; ModelOpt keeps ``[]``, ``[out, 1]`` and ``[out * blocks, 1]``."""
    match granularity:
        case PerTensor():
            return (1,)
        case PerChannel():
            return (-1,)
        case PerBlock():
            return (weight.shape[0], -1)


def _finite(amax: LinearAmax) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in (amax.weight, amax.input) if value is not None)


def _not_finite(where: str) -> QuantizationError:
    return QuantizationError(
        f"calibration found NaN or Inf in {where}",
        hint="check the checkpoint's weights; a model that overflows in its dtype needs --dtype bfloat16 or float32",
    )


def _linears_but_head(model: Any) -> list[str]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
