"""NVFP4 and MX formats against ModelOpt: its tensor classes on the CPU, its fake quantization where
there is a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from torch import Tensor, nn

from calib.arithmetic.grids import dequantize, quantize, weight_grid
from calib.arithmetic.inputs import fake_quantize_input, input_grid
from calib.modelopt.quantize import modelopt_quantize, read_input_amax
from calib.schemes import SCHEMES


def weight(seed: int = 0) -> Tensor:
    """Rows over three orders of magnitude; no block is dead: ModelOpt gives such a block of NVFP4
    another scale.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, 256, generator=generator) * 10.0 ** torch.randn(
        64, 1, generator=generator
    ).clamp(-1.5, 1.5)


def ours(w: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    scheme = SCHEMES[name].weight
    grid = weight_grid(w, scheme)
    stored = quantize(w, grid, scheme)
    return stored, grid.scale, dequantize(stored, grid, scheme)


def test_nvfp4_is_modelopts() -> None:
    w = weight()
    stored, scale, values = ours(w, "nvfp4")
    theirs, their_scale, their_second = NVFP4QTensor.quantize(w.clone(), 16)
    assert torch.equal(scale, their_scale.float())
    packed = stored[:, 0::2] | stored[:, 1::2] << 4  # the first of two in the low nibble
    # They multiply by the reciprocal of a product of scales, we divide: ties of single values may
    # fall the other way.
    assert float((packed != theirs._quantized_data).float().mean()) < 1e-3
    their_values = theirs.dequantize(
        torch.float32, scale=their_scale, double_scale=their_second, block_sizes={-1: 16}
    )
    different = values != their_values
    assert float(different.float().mean()) < 1e-3
    torch.testing.assert_close(values[~different], their_values[~different], rtol=0, atol=0)


def test_mxfp4_is_modelopts() -> None:
    w = weight(1)
    stored, scale, values = ours(w, "mxfp4")
    theirs, their_scale = MXFP4QTensor.quantize(w.clone(), 32)
    assert torch.equal(torch.log2(scale).int() + 127, their_scale.reshape(scale.shape).int())
    their_values = theirs.dequantize(
        torch.float32, scale=their_scale, block_sizes={-1: 32}
    ).reshape(w.shape)
    # Dividing by a power of two is exact, so only ties can differ: ours go to the even code.
    assert float((values != their_values).float().mean()) < 1e-4
    assert stored.dtype == torch.uint8


def test_mxfp8_is_modelopts() -> None:
    w = weight(2)
    _, scale, values = ours(w, "mxfp8")
    theirs, their_scale = MXFP8QTensor.quantize(w.clone())
    assert torch.equal(torch.log2(scale).int() + 127, their_scale.reshape(scale.shape).int())
    assert torch.equal(values, theirs.dequantize(torch.float32, scale=their_scale).reshape(w.shape))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="ModelOpt runs these formats on CUDA devices only"
)
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
def test_a_linear_computes_what_modelopts_does(name: str) -> None:
    scheme = SCHEMES[name]
    linear = nn.Linear(256, 64, bias=False)
    linear.weight.data = weight(3)
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(4))
    values = ours(linear.weight.data, name)[2]
    model: Any = nn.Sequential(linear).cuda()
    modelopt_quantize(model, name, modules=["0"], forward_loop=lambda module: module(x.cuda()))
    second = None
    assert scheme.activation is not None
    if scheme.activation.needs_calibration:
        amax = read_input_amax(model, ["0"])["0"]
        second = input_grid(-amax, amax, scheme.activation, torch.float32).scale
    expected = fake_quantize_input(x, scheme.activation, second) @ values.T
    found = model(x.cuda()).cpu()
    # Single values may round to the neighbour; TF32 and another order of summation add 1e-3.
    assert float((found - expected).norm() / expected.norm()) < 5e-3
