"""The files: ``model.npz`` holds every tensor, int4 packed two to a byte; ``model.json`` holds the
rest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from backends.base import ContentKind, StoredTensor
from calib.artifact import LINEAR_PARTS, Provenance, QuantizedLinear, QuantizedModel
from calib.errors import BackendError, RotqError
from calib.rotations.files import load_rotations, save_rotations
from calib.schemes import scheme_named, tensor_scheme_from_dict

_KINDS: dict[str, ContentKind] = {
    "weight": "quantized weight",
    "weight_scale": "scale",
    "input_scale": "scale",
    "weight_order": "other",
    "bias": "float weight",
}


def write(model: QuantizedModel, folder: Path) -> None:
    arrays = {f"float/{key}": tensor.numpy() for key, tensor in model.floats.items()}
    for name, linear in model.linears.items():
        parts = {
            part: tensor for part in LINEAR_PARTS if (tensor := getattr(linear, part)) is not None
        }
        if linear.weight_scheme.format.bits == 4:
            parts["weight"] = _pack(linear.weight)
        arrays |= {f"linear/{name}/{part}": tensor.numpy() for part, tensor in parts.items()}
    np.savez(folder / "model.npz", **arrays)
    described = {
        "config": model.config,
        "scheme": model.scheme.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kept": dict(model.kept),
        "linears": {
            name: {**linear.description(), "shape": list(linear.weight.shape)}
            for name, linear in model.linears.items()
        },
    }
    (folder / "model.json").write_text(json.dumps(described))
    save_rotations(model.rotations, folder)


def read(folder: Path) -> QuantizedModel:
    """
    Raises:
        BackendError: the folder is damaged.
    """
    described, arrays = _open(folder)
    try:
        return QuantizedModel(
            config=described["config"],
            scheme=scheme_named(described["scheme"]),
            dtype=getattr(torch, described["dtype"]),
            linears={
                name: _linear(name, entry, arrays) for name, entry in described["linears"].items()
            },
            floats={
                key.removeprefix("float/"): arrays[key]
                for key in arrays
                if key.startswith("float/")
            },
            kept=described["kept"],
            rotations=load_rotations(folder),
            provenance=Provenance(str(folder), "", {}, 0, 0, 0, 0, "", {}),
        )
    except (KeyError, TypeError, ValueError, RotqError) as error:
        raise _damaged(folder, error) from error


def contents(folder: Path) -> list[StoredTensor]:
    _, arrays = _open(folder)
    return [
        StoredTensor(
            name=key,
            kind="float weight" if key.startswith("float/") else _KINDS[key.rpartition("/")[2]],
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            nbytes=tensor.nbytes,
        )
        for key, tensor in arrays.items()
    ]


def _open(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        described = json.loads((folder / "model.json").read_text())
        with (folder / "model.npz").open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            return described, {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    except (OSError, ValueError, BadZipFile, EOFError) as error:
        raise _damaged(folder, error) from error


def _linear(name: str, entry: dict[str, Any], arrays: dict[str, Tensor]) -> QuantizedLinear:
    parts = {part: arrays.get(f"linear/{name}/{part}") for part in LINEAR_PARTS}
    scheme = tensor_scheme_from_dict(entry["weight"])
    if scheme.format.bits == 4:
        parts["weight"] = _unpack(arrays[f"linear/{name}/weight"], entry["shape"])
    return QuantizedLinear(
        name=name,
        weight_scheme=scheme,
        input_scheme=None if entry["input"] is None else tensor_scheme_from_dict(entry["input"]),
        online_rotation=entry["online_rotation"],
        **parts,  # type: ignore[arg-type]
    )


def _pack(weight: Tensor) -> Tensor:
    """Two int4 to a byte, the first in the low bits; rows that end in the middle of a byte run
    on.
    """
    flat = (
        torch.nn.functional.pad(weight.flatten(), (0, weight.numel() % 2)).view(torch.uint8) & 0xF
    )
    return flat[::2] | flat[1::2] << 4


def _unpack(packed: Tensor, shape: list[int]) -> Tensor:
    pairs = (
        torch.stack([packed & 0xF, packed >> 4], dim=1)
        .flatten()[: shape[0] * shape[1]]
        .to(torch.int8)
    )
    return torch.where(pairs > 7, pairs - 16, pairs).reshape(shape)


def _damaged(folder: Path, error: Exception) -> BackendError:
    return BackendError(
        f"'{folder}' is damaged: {' '.join(str(error).split())}", hint="export the model again"
    )
