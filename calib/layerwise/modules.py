"""Lending a module tree on the meta device its tensors, and its modules another forward function,
for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calib.layerwise.memory import release_memory


@contextmanager
def loaded(model: nn.Module, state: Mapping[str, Tensor], names: Sequence[str]) -> Iterator[None]:
    """The tensors ``names`` of ``state`` are in ``model`` inside, and the memory they took is free
    afterwards.
    """
    own = model.state_dict()
    unloaded = {name: own[name] for name in names}
    del own
    try:
        model.load_state_dict({name: state[name] for name in names}, strict=False, assign=True)
        yield
    finally:
        model.load_state_dict(unloaded, strict=False, assign=True)
        release_memory(sum(tensor.nbytes for tensor in unloaded.values()))


@contextmanager
def computing(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """``module`` computes ``function`` inside; its hooks, online rotations among them, stay in
    effect around it.
    """
    module.forward = function
    try:
        yield
    finally:
        del module.forward


def on_device(value: Any, device: torch.device | str) -> Any:
    """``value`` with every tensor in its tuples, lists and dictionaries on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(on_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: on_device(item, device) for key, item in value.items()}
    return value
