"""Observer parameters from a calibrated model to another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_quant_support import Net, batches
from torch import nn

from calib.errors import CheckpointError, QuantizationError
from calib.fake_quant import (
    FakeQuantState,
    get_default_calib_qconfig,
    get_default_qconfig,
    load_observer_params,
    observer_params,
    prepare,
    save_observer_params,
    set_fake_quantize,
)
from calib.fake_quant.qconfig import METHODS
from calib.schemes import PerTensor, PerToken


def calibrated(qconfig: Any = None) -> nn.Module:
    model = prepare(Net(), qconfig or get_default_calib_qconfig())
    for batch in batches():
        model(batch)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_the_loaded_model_rounds_as_the_calibrated_one(method: str, tmp_path: Path) -> None:
    source = calibrated()
    path = tmp_path / "observers.safetensors"
    save_observer_params(source, path)
    x = batches(1, seed=9)[0]
    set_fake_quantize(source, FakeQuantState.VALIDATION)
    for given in (source, observer_params(source), path):
        target = prepare(Net(), get_default_qconfig(method, method))
        assert load_observer_params(given, target) == []
        set_fake_quantize(target, FakeQuantState.VALIDATION)
        # LSQ and PACT keep a float32 number: limits, and so scales, are off by its eps. Half a
        # level would show.
        torch.testing.assert_close(target(x), source(x), rtol=1e-5, atol=1e-5)


def test_an_observer_of_the_same_kind_goes_on() -> None:
    """Calibrating on everything is calibrating on a part, and on the rest elsewhere."""
    first, second, third = batches()
    target: Any = prepare(Net(), get_default_calib_qconfig())
    source = prepare(Net(), get_default_calib_qconfig())
    for batch in (first, second):
        source(batch)
    load_observer_params(source, target)
    target(third)
    expected = observer_params(calibrated())
    assert all(
        torch.equal(value, expected[name]) for name, value in observer_params(target).items()
    )


def test_an_observer_of_another_kind_starts_from_the_limits() -> None:
    source: Any = calibrated()
    limits = [float(limit) for limit in source.first.input_fake_quant.limits()]
    target: Any = prepare(Net(), get_default_qconfig(activation_observer="moving_average:0.75"))
    load_observer_params(source, target)
    set_fake_quantize(target, FakeQuantState.QAT)
    target(torch.tensor([[-10.0, 30.0, 0.0, 0.0, 0.0, 0.0]]))
    low, high = target.first.input_fake_quant.limits()
    assert float(low) == pytest.approx(0.75 * limits[0] - 2.5)
    assert float(high) == pytest.approx(0.75 * limits[1] + 7.5)


def test_what_does_not_match_is_listed_from_both_sides_and_the_rest_is_loaded() -> None:
    source: Any = prepare(
        Net(), get_default_qconfig(weight_qkwargs={"granularity": PerTensor()}), ["first"]
    )
    for batch in batches():
        source(batch)
    target: Any = prepare(Net(), get_default_qconfig())
    unmatched = {item.name: item.reason for item in load_observer_params(source, target)}
    assert unmatched == {
        "first.weight_fake_quant": "limits of shape [] do not fit [10]",
        "second.input_fake_quant": "not in the loaded parameters",
        "second.weight_fake_quant": "not in the loaded parameters",
    }
    assert target.first.input_fake_quant.limits() == source.first.input_fake_quant.limits()
    assert not target.first.weight_fake_quant.has_limits
    back = load_observer_params(calibrated(), prepare(Net(), get_default_qconfig(), ["second"]))
    assert [(item.name, item.reason) for item in back] == [
        ("first.input_fake_quant", "not in the model"),
        ("first.weight_fake_quant", "not in the model"),
    ]


def test_foreign_and_damaged_entries() -> None:
    target = prepare(Net(), get_default_qconfig(), ["first"])
    params = observer_params(calibrated(get_default_qconfig()))
    del params["first.input_fake_quant.low"]
    unmatched = load_observer_params({**params, "embedding": torch.ones(3)}, target)
    assert {item.name for item in unmatched} >= {"first.input_fake_quant", "embedding"}
    for bad in (torch.nan, torch.inf):
        damaged = observer_params(calibrated(get_default_qconfig()))
        damaged["first.input_fake_quant.high"] = torch.tensor(bad, dtype=torch.float64)
        with pytest.raises(QuantizationError, match=r"'first \(input\)' are no range"):
            load_observer_params(damaged, target)


def test_dynamic_inputs_have_nothing_to_save() -> None:
    dynamic = get_default_qconfig(activation_qkwargs={"granularity": PerToken(), "dynamic": True})
    source = calibrated(dynamic)
    assert all(".weight_fake_quant." in name for name in observer_params(source))
    assert load_observer_params(source, prepare(Net(), dynamic)) == []


def test_an_uncalibrated_model_has_nothing_to_save() -> None:
    with pytest.raises(QuantizationError, match=r"'first \(input\)' was never calibrated"):
        observer_params(prepare(Net(), get_default_qconfig()))
    with pytest.raises(QuantizationError, match="no fake-quantizers"):
        observer_params(Net())


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    target = prepare(Net(), get_default_qconfig())
    with pytest.raises(CheckpointError, match="cannot read observer parameters"):
        load_observer_params(tmp_path / "none.safetensors", target)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors"):
        load_observer_params(damaged, target)
