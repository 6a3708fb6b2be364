"""How much of a large tensor an elementwise formula takes at once.

Every intermediate result of such a formula is memory of its own. Where it is larger than the cache
it goes through memory, and where it is larger than what the allocator keeps, the kernel also clears
every page of it anew (``python -m benchmarks.scoring``).
"""

from __future__ import annotations

import torch
from torch import Tensor

_ON_CPU = 2**19
"""Numbers in a tile on a CPU: 4 MB in float64."""
_PIECE = 2**14
"""Numbers that torch adds in one thread, whatever there are."""
_ELSEWHERE = 2**25
"""On a device, where it is launches that cost."""


def rows_at_once(x: Tensor) -> int:
    """How many rows of ``x [rows, n]`` make a tile, at least one."""
    numbers = _ON_CPU if x.device.type == "cpu" else _ELSEWHERE
    return max(1, numbers // max(1, x.shape[-1]))


def ordered_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension in float64, in an order that does not depend on the number of
    threads.
    """
    pieces = [
        x[..., begin : begin + _PIECE].sum(-1, dtype=torch.float64)
        for begin in range(0, x.shape[-1], _PIECE)
    ]
    return torch.stack(pieces).sum(0)
