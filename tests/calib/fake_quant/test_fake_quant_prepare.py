"""Preparing models: names, keys, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from fake_quant_support import Net, batches
from torch import Tensor, nn

from calib.errors import CheckpointError, QuantizationError, UnsupportedModelError
from calib.fake_quant import (
    FakeQuantState,
    get_default_calib_qconfig,
    get_default_qconfig,
    prepare,
    set_fake_quantize,
)
from calib.schemes import PerChannel
from tests.tiny import CONFIGS, make_tiny, relative_l2, token_rows


class Doubled(nn.Linear):
    """A linear that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_language_model_keeps_names_keys_and_every_bit(family: str) -> None:
    model = make_tiny(CONFIGS[family]()).model(torch.float32)
    ids = token_rows()[0].unsqueeze(0)
    with warnings.catch_warnings():
        # OPT and GPT-2 have dropout; the model is in eval()
        warnings.simplefilter("ignore", UserWarning)
        keys, names = set(model.state_dict()), {name for name, _ in model.named_modules()}
        with torch.no_grad():
            before = model(ids, use_cache=False).logits
            prepare(model, get_default_qconfig())
            assert torch.equal(model(ids, use_cache=False).logits, before)
            set_fake_quantize(model, FakeQuantState.VALIDATION)
            after = model(ids, use_cache=False).logits
    assert 1e-4 < relative_l2(after, before) < 0.2  # INT8 changes logits, and not by much
    assert keys <= set(model.state_dict())
    assert all("_fake_quant." in key for key in set(model.state_dict()) - keys)
    assert names <= {name for name, _ in model.named_modules()}
    assert not hasattr(model.get_output_embeddings(), "weight_fake_quant")


def test_a_float_checkpoint_still_loads() -> None:
    model = prepare(Net(), get_default_qconfig())
    missing, unexpected = model.load_state_dict(Net().state_dict(), strict=False)
    assert all("_fake_quant." in key for key in missing)
    assert not unexpected


def test_hooks_stay_and_only_the_named_modules_change() -> None:
    model = Net()
    seen: list[Tensor] = []
    model.second.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    prepare(model, get_default_qconfig(), ["second"])
    assert type(model.first) is nn.Linear
    assert isinstance(model.second, nn.Linear)
    model(batches()[0])
    assert len(seen) == 1


def test_inputs_or_weights_alone() -> None:
    x = batches()[0]
    for qconfig in (get_default_qconfig(None), get_default_qconfig(weight_fake_quant=None)):
        model: Any = prepare(Net(), qconfig)
        before = model(x)
        set_fake_quantize(model, FakeQuantState.VALIDATION)
        assert not torch.equal(model(x), before)
        assert isinstance(model.first.input_fake_quant, nn.Identity) == (qconfig.activation is None)
        assert isinstance(model.first.weight_fake_quant, nn.Identity) == (qconfig.weight is None)


def test_unknown_names_list_what_exists() -> None:
    with pytest.raises(QuantizationError, match="unknown fake-quantizer 'fake'") as caught:
        get_default_qconfig("fake")
    assert caught.value.hint == "the fake-quantizers are: fake_quant, lsq, pact"
    with pytest.raises(QuantizationError, match="unknown observer 'max'"):
        get_default_qconfig(weight_observer="max")
    with pytest.raises(QuantizationError, match="unknown qkwargs: dtype"):
        get_default_qconfig(activation_qkwargs={"dtype": "qint8"})
    with pytest.raises(QuantizationError, match="unknown format 'int3'"):
        get_default_qconfig(weight_qkwargs={"format": "int3"})
    with pytest.raises(QuantizationError, match="observer 'percentile' needs one scale"):
        get_default_qconfig(weight_observer="percentile")


def test_what_cannot_be_prepared_is_named() -> None:
    qconfig = get_default_qconfig()
    with pytest.raises(QuantizationError, match="no linear"):
        prepare(nn.Sequential(nn.ReLU()), qconfig)
    with pytest.raises(QuantizationError, match="'1' is a ReLU"):
        prepare(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), qconfig, ["1"])
    with pytest.raises(CheckpointError, match="no submodule 'third'"):
        prepare(Net(), qconfig, ["third"])
    with pytest.raises(QuantizationError, match="'0' is a Doubled with a forward of its own"):
        prepare(nn.Sequential(Doubled(2, 2)), qconfig)
    with pytest.raises(QuantizationError, match="'first' is prepared already"):
        prepare(prepare(Net(), qconfig), qconfig)
    with pytest.raises(
        QuantizationError, match=r"first \(input\) cannot have static scales PerChannel"
    ):
        prepare(Net(), get_default_qconfig(activation_qkwargs={"granularity": PerChannel(0)}))
    with pytest.raises(QuantizationError, match="no fake-quantizers"):
        set_fake_quantize(Net(), FakeQuantState.QAT)


def test_a_model_that_differs_in_training_is_refused_there_and_warned_of_elsewhere() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.BatchNorm1d(4))

    with pytest.raises(UnsupportedModelError, match=r"'1' \(dropout, p = 0.1\); '2' \(BatchNorm1d"):
        prepare(model(), get_default_calib_qconfig())
    with pytest.warns(UserWarning, match=r"'1' \(dropout, p = 0.1\).*keep the model in eval"):
        prepare(model().eval(), get_default_calib_qconfig())
    prepare(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0)), get_default_calib_qconfig())
