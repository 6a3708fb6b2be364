"""Lending a module tree on the meta device its tensors for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calib.process.memory import give_back


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
        give_back(sum(tensor.nbytes for tensor in unloaded.values()))


def on_device(value: object, device: torch.device | str) -> Any:
    """``value`` with every tensor in its tuples, lists and dictionaries on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(on_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: on_device(item, device) for key, item in value.items()}
    return value
