"""The state of torch that a caller may have set for the whole process, and that no result of rotq
may depend on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_CPU = torch.device("cpu")


@contextmanager
def plain_torch() -> Iterator[None]:
    """Run a block, or as a decorator a function, with torch as it is when it has just been
    imported; afterwards everything is as it was.

    That is: gradients are recorded, outside ``inference_mode`` and ``autocast``; tensors are
    float32 and on the CPU where nobody says otherwise; products of float32 are computed in float32.
    """
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    with ExitStack() as undo:
        undo.callback(torch.set_default_dtype, dtype)
        undo.callback(torch.set_float32_matmul_precision, precision)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                undo.enter_context(torch.autocast(kind, enabled=False))
        # a device as context slows every call down
        if torch.get_default_device() != _CPU:
            undo.enter_context(_CPU)
        yield
