"""How much a static scale costs the tokens that did not set it.

A static scale has to hold the largest magnitude that calibration saw, ``amax``. The tokens of a
text are rounded in steps of ``amax / qmax``, whatever their own size, which is noise of the
variance of a uniform step:

    noise / signal = (amax / qmax)^2 / 12  /  median_t(mean_c x_tc^2)

of a token of median power. A normal distribution cut at 4 sigma in int8 has 8e-5. Where one token
is a thousand times the others, all others drown; a scale of their own for each token does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from calib.modules.watch import watching
from calib.schemes import TensorScheme


def static_noise(
    model: nn.Module, schemes: Mapping[str, TensorScheme], rows: Sequence[Tensor]
) -> dict[str, float]:
    """Noise over signal of a typical token at the input of every linear with a static integer
    scale.

    Args:
        model: a causal LM in eval mode, its online rotations attached.
        schemes: how inputs are quantized, by linear; those without a static scale, or in a float
            format, are left out.
        rows: token rows, int64 ``[tokens]``.

    Returns:
        The noise by linear. Those that no token reached (experts) are left out.
    """
    static = {name: scheme for name, scheme in schemes.items() if scheme.static_integer}
    amax = dict.fromkeys(static, 0.0)
    powers: dict[str, list[Tensor]] = {name: [] for name in static}

    def look(name: str, x: Tensor) -> None:
        x = x.detach().float()
        if x.numel():
            amax[name] = max(amax[name], float(x.abs().amax()))
            powers[name].append(x.square().mean(-1).flatten().cpu())

    device = next(model.parameters()).device
    watched = {name: partial(look, name) for name in static}
    with watching(model, inputs=watched, optional=True):
        for row in rows:
            model(input_ids=row.unsqueeze(0).to(device), use_cache=False)

    noise: dict[str, float] = {}
    for name, scheme in static.items():
        if powers[name]:
            step = amax[name] / scheme.format.maxbound
            typical = float(torch.cat(powers[name]).median())
            noise[name] = step**2 / 12 / max(typical, torch.finfo(torch.float32).tiny)
    return noise
