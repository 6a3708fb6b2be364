"""Running ModelOpt: put quantizers into a model, let a forward loop fill them, read their amax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import modelopt.torch.quantization as mtq
from torch import Tensor, nn

from calib.errors import DataError, QuantizationError
from calib.modelopt.config import config_of, modelopt_calibrates, modelopt_config
from calib.modules.paths import get_submodule, linears_but_head, set_submodule
from calib.modules.watch import Run, not_finite, refuse_unreached, require_finite, watching
from calib.schemes import LinearScheme, TensorScheme, scheme_named

if TYPE_CHECKING:
    from collections.abc import Iterator


def modelopt_quantize(
    model: nn.Module,
    quant_mode: str,
    *,
    forward_loop: Run | None = None,
    modules: Sequence[str] | None = None,
) -> nn.Module:
    """Quantize and calibrate ``model`` in place with ModelOpt.

    Args:
        model: any module with linears (``nn.Linear`` or transformers' ``Conv1D``), in eval mode; a
            Hugging Face causal LM, say.
        quant_mode: a scheme of :data:`calib.schemes.SCHEMES`, such as ``int8-weight-only`` or
            ``float8``.
        forward_loop: feeds calibration batches to the model it is given, as
            :func:`calib.data.forward_loop.create_forward_loop` makes them. Weight-only modes need
            none.
        modules: dotted names of the linears to quantize; by default every one but the output head.

    Returns:
        The same model; its linears are ModelOpt's ``QuantLinear`` whose quantizers hold amax.

    Raises:
        QuantizationError: unknown mode, one that quantizes nothing, a quantized linear that
            calibration never reached, or NaN or Inf in the weights or inputs of one.
        DataError: the mode quantizes activations and no forward loop was given.
        CheckpointError: one of ``modules`` does not exist.

    Source: ``modelopt_quantize`` of the nanoGPT example in NVIDIA's TensorRT-Incubator.
    """
    scheme = scheme_named(quant_mode)
    linear = scheme.linear
    if linear is None:
        raise QuantizationError(
            f"'{quant_mode}' quantizes nothing", hint="choose another mode, such as int8"
        )
    if not scheme.weight_only and forward_loop is None:
        raise DataError(
            f"'{quant_mode}' quantizes activations and needs calibration data",
            hint="pass forward_loop=create_forward_loop(...)",
        )
    names = list(modules) if modules is not None else linears_but_head(model)
    schemes = dict.fromkeys(names, linear)
    with _watched(model, names):
        quantized: nn.Module = mtq.quantize(model, config_of(schemes), forward_loop)
    read_input_amax(quantized, _calibrated_inputs(schemes))
    return quantized


def input_amax(model: nn.Module, inputs: Mapping[str, TensorScheme], run: Run) -> dict[str, Tensor]:
    """The largest magnitude that enters each linear of ``inputs`` while ``run`` runs the model, as
    ModelOpt sees it.

    ModelOpt works on a copy of the module tree that shares every parameter, so ``model`` stays as
    it is.

    Args:
        model: the model, or a block of one.
        inputs: how each input is quantized, by module name;
            :func:`~calib.modelopt.config.modelopt_calibrates` each.
        run: runs the model it is given over all calibration data.

    Returns:
        Float32 ``[]`` on the CPU by name.

    Raises:
        QuantizationError: a linear was never reached, or its weights or inputs hold NaN or Inf.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copy = deepcopy(model, shared)
    for name, module in list(copy.named_modules()):
        if "forward" in vars(module):
            set_submodule(copy, name, _Opaque(module))
    with _watched(copy, list(inputs)):
        quantized = mtq.quantize(copy, modelopt_config({}, inputs), run)
    return read_input_amax(quantized, list(inputs))


class _Opaque(nn.Module):
    """Hides a module whose forward was replaced: ModelOpt would convert it and put the forward of
    its class back.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._hidden = (module,)  # in a tuple, it is no submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._hidden[0](*args, **kwargs)


def read_input_amax(model: nn.Module, modules: Sequence[str]) -> dict[str, Tensor]:
    """The calibrated amax ``[]`` (float32, CPU) of the inputs of ``modules``, by name.

    Raises:
        QuantizationError: a linear holds no amax (it was never run) or one that is NaN or infinite;
            all are named.
    """
    collected = {name: _amax(get_submodule(model, name)) for name in modules}
    refuse_unreached([name for name, amax in collected.items() if amax is None])
    found = {name: amax for name, amax in collected.items() if amax is not None}
    require_finite(found)
    return found


def _amax(linear: Any) -> Tensor | None:
    """What the input quantizer collected. Its ``export_amax`` would put 127 in place of zero, NaN
    and Inf.
    """
    collected: Tensor | None = getattr(linear.input_quantizer, "amax", None)
    return None if collected is None else collected.detach().float().cpu().reshape(())


def _calibrated_inputs(schemes: Mapping[str, LinearScheme]) -> list[str]:
    return [
        name
        for name, scheme in schemes.items()
        if scheme.input is not None and modelopt_calibrates(scheme.input)
    ]


@contextmanager
def _watched(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Name what is not finite, in weights before ModelOpt runs and in inputs where it asserts."""
    weights = {name: cast(Tensor, get_submodule(model, name).weight) for name in names}
    require_finite(weights, of="the weights of ")
    with watching(model, inputs=dict.fromkeys(names, _pass), optional=True) as watch:
        try:
            yield
        except AssertionError as error:  # ModelOpt asserts that what it collects is finite
            raise not_finite(f"the input of {watch.last or 'a linear'}") from error


def _pass(x: Tensor) -> None:
    """ModelOpt's own quantizers look."""
