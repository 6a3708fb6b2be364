"""Putting fake-quantizers into a float model, and switching what they do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

from torch import nn

from calib.errors import QuantizationError, UnsupportedModelError
from calib.fake_quant.fake_quantize import FakeQuantizer
from calib.fake_quant.linears import fake_quantize_linear
from calib.fake_quant.modes import check_modes
from calib.fake_quant.qconfig import QConfig
from calib.fake_quant.states import FakeQuantState
from calib.modules.paths import get_submodule, is_linear, linears_but_head

_NAMED = 5
"""Modules that a message names before it only counts."""


def prepare(model: nn.Module, qconfig: QConfig, modules: Sequence[str] | None = None) -> nn.Module:
    """Put fake-quantizers on the inputs and weights of linears, in place; no module or float weight
    changes its name.

    The model is in the state ``CALIBRATION`` then and computes what it did before.

    A module whose ``train()`` and ``eval()`` differ (dropout, batch norm) shows observers of a
    training something else than what runs later. In training mode such a model is refused; in
    evaluation mode there is a warning, since it must stay there.

    Args:
        model: a float model, on its device and in its dtype.
        qconfig: which fake-quantizers.
        modules: dotted names of linears; by default every one but the output head.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: the model is in training mode and behaves otherwise in evaluation;
            the modules are named.
        QuantizationError: there is no linear, one of ``modules`` is none, or one cannot be
            quantized as asked.
        CheckpointError: one of ``modules`` does not exist.
    """
    names = list(modules) if modules is not None else linears_but_head(model)
    found = {name: get_submodule(model, name) for name in names}
    if not found:
        raise QuantizationError("there is no linear to prepare", hint="Name them with `modules`.")
    for name, module in found.items():
        if not is_linear(module):
            raise QuantizationError(
                f"'{name}' is a {type(module).__name__} and cannot be prepared",
                hint="Only nn.Linear and transformers' Conv1D can be.",
            )
    _refuse_modes(model)
    for name, module in found.items():
        fake_quantize_linear(name, module, qconfig)
    return model


def set_fake_quantize(model: nn.Module, state: FakeQuantState) -> None:
    """Switch every fake-quantizer of ``model``.

    Raises:
        QuantizationError: there is none.

    Source: the function of the same name in Horizon's plugin ("Calibration v2").
    """
    for _, quantizer in fake_quantizers(model):
        quantizer.state = state


def fake_quantizers(model: nn.Module) -> Iterator[tuple[str, FakeQuantizer]]:
    """Every fake-quantizer with its dotted name.

    Raises:
        QuantizationError: there is none.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizer)
    ]
    if not found:
        raise QuantizationError(
            "the model holds no fake-quantizers", hint="Call prepare(model, qconfig) first."
        )
    yield from found


def _refuse_modes(model: nn.Module) -> None:
    differ = check_modes(model)
    if not differ:
        return
    training = [name for name in differ if get_submodule(model, name).training]
    names = training or list(differ)
    listed = "; ".join(f"'{name}' ({differ[name]})" for name in names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if names[_NAMED:] else ""
    message = f"train() and eval() differ in {listed}{more}"
    if training:
        raise UnsupportedModelError(
            message,
            hint=(
                "Set their probability to 0 or freeze their statistics, or call model.eval() and"
                " keep to it."
            ),
        )
    warnings.warn(
        f"{message}: keep the model in eval() while it is observed or trained", stacklevel=3
    )
