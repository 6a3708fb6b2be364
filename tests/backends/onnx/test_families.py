"""Every family of the architecture table becomes a graph that computes the torch reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.onnx.backend import OnnxBackend
from backends.onnx.experts import ACTIVATIONS
from backends.onnx.refusals import graph_refusal
from calib.architectures import architecture_for
from calib.experts.names import quantizable_linears
from calib.skeleton import portable_config
from tests.backends.onnx.whole import compare, quantized
from tests.tiny import CONFIGS
from tests.tolerances import WEIGHT_ONLY


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_decoding_are_the_reference(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]()
    linears = list(quantizable_linears(architecture_for(config), config))
    assert OnnxBackend().model_refusal(portable_config(config), linears, "ort") is None
    assert compare(quantized(config), tmp_path).error <= WEIGHT_ONLY


def test_experts_with_an_unknown_activation_are_refused_with_what_is_known() -> None:
    config = portable_config(CONFIGS["mixtral"]())
    assert graph_refusal(config, []) is None
    reason, hint = graph_refusal(config | {"hidden_act": "mish"}, []) or ("", "")
    assert "'mish'" in reason
    assert all(name in hint for name in ACTIVATIONS)
    assert graph_refusal(portable_config(CONFIGS["llama"]()) | {"hidden_act": "mish"}, []) is None
