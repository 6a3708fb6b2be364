"""Quantization-aware training: fake-quantizers in a float model, in three states."""

from calib.fake_quant.modes import check_modes
from calib.fake_quant.params import (
    Unmatched,
    load_observer_params,
    observer_params,
    save_observer_params,
)
from calib.fake_quant.prepare import prepare, set_fake_quantize
from calib.fake_quant.qconfig import (
    QConfig,
    TensorQConfig,
    get_default_calib_qconfig,
    get_default_qconfig,
)
from calib.fake_quant.states import FakeQuantState

__all__ = [
    "FakeQuantState",
    "QConfig",
    "TensorQConfig",
    "Unmatched",
    "check_modes",
    "get_default_calib_qconfig",
    "get_default_qconfig",
    "load_observer_params",
    "observer_params",
    "prepare",
    "save_observer_params",
    "set_fake_quantize",
]
