"""Which fake-quantizer and which observer inputs and weights get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from calib.errors import QuantizationError
from calib.fake_quant.fake_quantize import FakeQuantize, FakeQuantizer, Role
from calib.fake_quant.learned import LearnedClip, LearnedStep
from calib.observers.observer import ObserverFactory
from calib.observers.registry import observer_named
from calib.schemes import FORMATS, INT8, PerChannel, PerTensor, TensorScheme

METHODS: dict[
    str, Callable[[str, Role, TensorScheme, ObserverFactory, torch.Size], FakeQuantizer]
] = {
    "fake_quant": FakeQuantize,
    "lsq": LearnedStep,
    "pact": LearnedClip,
}
"""The fake-quantizers by name."""


@dataclass(frozen=True)
class TensorQConfig:
    """How one kind of tensor is fake-quantized.

    Attributes:
        method: a key of :data:`METHODS`.
        observer: a name that :func:`calib.observers.observer_named` takes.
        scheme: format, granularity and symmetry.
    """

    method: str
    observer: str
    scheme: TensorScheme

    def __post_init__(self) -> None:
        """Check the names and that they serve the scheme.

        Raises:
            QuantizationError: an unknown method or observer, or an observer that cannot serve the
                scheme.
        """
        if self.method not in METHODS:
            raise QuantizationError(
                f"unknown fake-quantizer '{self.method}'",
                hint=f"the fake-quantizers are: {', '.join(METHODS)}",
            )
        observer_named(self.observer)(self.scheme)

    def make(self, name: str, role: Role, shape: torch.Size) -> FakeQuantizer:
        """The fake-quantizer of the tensor ``name``, whose limits have ``shape``."""
        return METHODS[self.method](name, role, self.scheme, observer_named(self.observer), shape)


@dataclass(frozen=True)
class QConfig:
    """How the linears of a model are fake-quantized.

    Attributes:
        activation: their inputs; ``None`` leaves them in float.
        weight: their weights; ``None`` leaves them in float.
    """

    activation: TensorQConfig | None
    weight: TensorQConfig | None


def get_default_qconfig(
    activation_fake_quant: str | None = "fake_quant",
    weight_fake_quant: str | None = "fake_quant",
    activation_observer: str = "min_max",
    weight_observer: str = "min_max",
    activation_qkwargs: Mapping[str, Any] | None = None,
    weight_qkwargs: Mapping[str, Any] | None = None,
) -> QConfig:
    """INT8: inputs per tensor, weights per output channel, unless the ``qkwargs`` say otherwise.

    Args:
        activation_fake_quant: ``fake_quant``, ``lsq`` or ``pact``; ``None`` for inputs in float.
        weight_fake_quant: the same for weights.
        activation_observer: a name that :func:`calib.observers.observer_named` takes.
        weight_observer: the same for weights; it must serve their granularity.
        activation_qkwargs: fields of :class:`calib.schemes.TensorScheme`; ``format`` may be a name
            such as ``int4``.
        weight_qkwargs: the same for weights.

    Raises:
        QuantizationError: a name or a field that does not exist.

    Source: the function of the same name in Horizon's plugin ("Calibration v2").
    """
    return QConfig(
        _tensor(
            activation_fake_quant,
            activation_observer,
            TensorScheme(INT8, PerTensor()),
            activation_qkwargs,
        ),
        _tensor(
            weight_fake_quant, weight_observer, TensorScheme(INT8, PerChannel(0)), weight_qkwargs
        ),
    )


def get_default_calib_qconfig() -> QConfig:
    """For calibration before training: the default, with the 99.99th percentile of inputs.

    Source: the function of the same name in Horizon's plugin ("Calibration").
    """
    return get_default_qconfig(activation_observer="percentile")


def _tensor(
    method: str | None, observer: str, scheme: TensorScheme, qkwargs: Mapping[str, Any] | None
) -> TensorQConfig | None:
    if method is None:
        return None
    fields = vars(scheme) | dict(qkwargs or {})
    unknown = set(fields) - set(vars(scheme))
    if unknown:
        raise QuantizationError(
            f"unknown qkwargs: {', '.join(sorted(unknown))}", hint=f"use: {', '.join(vars(scheme))}"
        )
    if isinstance(fields["format"], str):
        if fields["format"] not in FORMATS:
            raise QuantizationError(
                f"unknown format '{fields['format']}'", hint=f"use: {', '.join(FORMATS)}"
            )
        fields["format"] = FORMATS[fields["format"]]
    return TensorQConfig(method, observer, TensorScheme(**fields))
