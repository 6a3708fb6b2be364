"""The state of torch that a caller may have set for the whole process, and that no result of rotq
may depend on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_CPU = torch.device("cpu")


@contextmanager
def plain_torch() -> Iterator[None]:
    """Run a block, or as a decorator a function, with torch as it is when it has just been
    imported; afterwards everything is as it was.

    That is: gradients are recorded, outside ``inference_mode`` and ``autocast``; tensors are
    float32 and on the CPU where nobody says otherwise; products of float32 are computed in float32.
    """
    with ExitStack() as undo:
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        undo.enter_context(_exact_products())
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                undo.enter_context(torch.autocast(kind, enabled=False))
        # a device as context slows every call down
        if torch.get_default_device() != _CPU:
            undo.enter_context(_CPU)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Run a block with one thread for each operator: what LAPACK gives in its last bits depends on
    how many there are.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Compute products of float32 in float32, by both of torch's ways to say so.

    The older, ``set_float32_matmul_precision``, sets the newer, ``fp32_precision``, along; but it
    can only be read where the newer says nothing else.
    """
    kinds: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)
    backends = [kind.matmul for kind in kinds]
    newer = [backend.fp32_precision for backend in backends]
    try:
        _set_precisions(backends, ["ieee", "ieee"])
        older = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(older)
    finally:
        _set_precisions(backends, newer)


def _set_precisions(backends: Sequence[Any], precisions: Sequence[str]) -> None:
    for backend, precision in zip(backends, precisions, strict=True):
        backend.fp32_precision = precision
