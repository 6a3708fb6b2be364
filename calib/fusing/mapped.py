"""A fused model on the disk: what is read once in a while need not be held."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from calib.fusing.fuser import FusedModel

_FILE = "fused.safetensors"


def mapped(fused: FusedModel, folder: Path) -> FusedModel:
    """``fused`` with its tensors memory-mapped from a file in ``folder``, bit by bit the same. The
    system reads a page of it when that is needed, and may drop it again.

    Args:
        fused: the model; none of its tensors is held on to.
        folder: where the file is written, which has to be there as long as the system needs it to:
            on Linux it may be removed at once.

    Raises:
        SafetensorError: the file cannot be written.
    """
    path, seen = folder / _FILE, set[int]()
    tensors: dict[str, Tensor] = {}
    for name, tensor in fused.state.items():
        own = tensor.contiguous()
        # the format has no tensors that share memory
        tensors[name] = own.clone() if own.data_ptr() in seen else own
        seen.add(own.data_ptr())
    save_file(tensors, path)
    file: Any = safe_open(path, framework="pt")
    return replace(fused, state={name: file.get_tensor(name) for name in tensors})
