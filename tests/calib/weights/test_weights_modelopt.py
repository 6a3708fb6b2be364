"""ModelOpt's MSE and GPTQ calibration of one linear, on the same weight and inputs, as an
oracle.
"""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor, nn
from weights_support import correlated_moment, random_weight

from calib.schemes import INT4, PerBlock, PerChannel, TensorScheme
from calib.weights.clip import mse, rtn
from calib.weights.gptq import gptq
from calib.weights.moments import observe_moments
from calib.weights.rounded import output_error

OUT, IN = 32, 256
QUANTIZERS = {
    "int4-block": (TensorScheme(INT4, PerBlock(128)), {"block_sizes": {-1: 128, "type": "static"}}),
    "int4-channel": (TensorScheme(INT4, PerChannel(0)), {"axis": 0}),
}


def calibrated(
    weight: Tensor, x: Tensor, grouping: dict[str, Any], algorithm: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """What ModelOpt's fake quantization makes of ``weight`` with inputs ``x``, and its amax."""
    model: Any = nn.Sequential(nn.Linear(IN, OUT, bias=False)).eval()
    model[0].weight.data = weight.clone()
    entries = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, **grouping}, "enable": True},
    ]
    mtq.quantize(model, {"quant_cfg": entries, "algorithm": algorithm}, lambda module: module(x))
    return (
        model[0].weight_quantizer(model[0].weight).detach(),
        model[0].weight_quantizer.amax.detach(),
    )


def inputs() -> Tensor:
    """[tokens, IN] with the moment of the support module, by its Cholesky factor."""
    factor = torch.linalg.cholesky(correlated_moment(IN))
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(2000, IN, generator=generator, dtype=torch.float64) @ factor.T).float()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_gptq_is_no_worse_than_modelopts(name: str) -> None:
    """On its own terms (amax grid, columns in order) it is ModelOpt's GPTQ, with our defaults it is
    better.
    """
    scheme, grouping = QUANTIZERS[name]
    weight, x = random_weight(OUT, IN), inputs()
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    moment = observe_moments(model, ["0"], lambda module: module(x))["0"].result()
    theirs, _ = calibrated(weight, x, grouping, {"method": "gptq", "layerwise": {"enable": False}})
    their_error = output_error(weight, theirs, moment)
    assert their_error < 0.7 * output_error(weight, rtn(weight, scheme).values(scheme), moment)
    plain = output_error(
        weight, gptq(weight, moment, scheme, act_order=False, clip=False).values(scheme), moment
    )
    ours = output_error(weight, gptq(weight, moment, scheme).values(scheme), moment)
    # per channel it is the same computation, but for the precision of the factor; per block,
    # ModelOpt keeps the scales of the weight as it was, while ours are those of the weights as they
    # stand when a block is reached
    assert plain == pytest.approx(their_error, rel=1e-4 if name == "int4-channel" else 0.05)
    assert plain <= their_error * (1 + 1e-4)
    assert ours < 0.6 * their_error  # 0.36 and 0.41 were seen


@pytest.mark.parametrize("name", QUANTIZERS)
def test_mse_is_no_worse_than_modelopts(name: str) -> None:
    """Less is lost, and limits agree within ModelOpt's step of 0.1."""
    scheme, grouping = QUANTIZERS[name]
    weight, x = random_weight(OUT, IN), inputs()
    theirs, amax = calibrated(weight, x, grouping, {"method": "mse"})
    found = mse(weight, scheme)
    size = 128 if name == "int4-block" else IN
    their_error, our_error = (
        (values - weight).square().reshape(OUT, -1, size).sum(dim=2)
        for values in (theirs, found.values(scheme))
    )
    # ModelOpt's candidates are 0.1 apart; ours are dense, but may miss a narrow dip next to a
    # coarse one
    assert float(our_error.sum()) < 0.99 * float(their_error.sum())
    assert float((our_error / their_error).max()) < 1.02
    limits = (found.grid.scale * scheme.format.maxbound).flatten() / amax.flatten()
    assert 0.9 < float(limits.min()) <= float(limits.max()) < 1.1
