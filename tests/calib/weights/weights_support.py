"""Linears with correlated inputs, as real ones have, and the schemes that every algorithm is tried
on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calib.arithmetic.grids import expand_grid, round_to_grid
from calib.schemes import (
    FLOAT8,
    INT4,
    INT8,
    PerBlock,
    PerChannel,
    PerTensor,
    TensorScheme,
    scheme_named,
)
from calib.weights.rounded import Rounded

INTEGER_SCHEMES = {
    "int4-block": TensorScheme(INT4, PerBlock(16)),
    "int4-block-asymmetric": TensorScheme(INT4, PerBlock(16), symmetric=False),
    "int4-channel": TensorScheme(INT4, PerChannel(0)),
    "int4-channel-asymmetric": TensorScheme(INT4, PerChannel(0), symmetric=False),
    "int8-tensor": TensorScheme(INT8, PerTensor()),
}
FLOAT_SCHEMES = {
    "float8-tensor": TensorScheme(FLOAT8, PerTensor()),
    "float8-channel": TensorScheme(FLOAT8, PerChannel(0)),
    "nvfp4": scheme_named("nvfp4").weight,
    "mxfp4": scheme_named("mxfp4").weight,
    "mxfp8": scheme_named("mxfp8").weight,
}
ALL_SCHEMES = INTEGER_SCHEMES | FLOAT_SCHEMES


def correlated_moment(
    channels: int, seed: int = 0, *, tokens: int = 4096, decades: float = 1.5
) -> Tensor:
    """``E[x xᵀ]`` of inputs whose singular values fall by so many powers of ten and whose channels
    differ in size.
    """
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(
        torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    ).Q
    spectrum = torch.logspace(0, -decades, channels, dtype=torch.float64)
    sizes = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
    x = (
        torch.randn(tokens, channels, generator=generator, dtype=torch.float64)
        * spectrum
        @ mix
        * sizes
    )
    return x.T @ x / tokens


def random_weight(rows: int, channels: int, seed: int = 0) -> Tensor:
    """A weight whose blocks and rows differ in size, and are not centred."""
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(rows, channels, generator=generator) + 0.3 * torch.randn(
        rows, 1, generator=generator
    )
    return (
        weight
        * (torch.rand(rows, 1, generator=generator) + 0.5)
        * torch.linspace(0.5, 1.5, channels)
    )


def is_on_grid(rounded: Rounded, scheme: TensorScheme) -> bool:
    """Whether what is stored stands for values of the grid exactly: rounding them again changes
    nothing.
    """
    values = rounded.values(scheme)
    if rounded.order is not None:
        values = values[:, rounded.order]
    scale, zero = expand_grid(rounded.grid, values.shape, scheme.granularity)
    return torch.equal(round_to_grid(values, scale, zero, scheme.format), values)
