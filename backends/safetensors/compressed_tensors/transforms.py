"""Online rotations in the words of compressed-tensors, for vLLM: ``transform_config`` and the
matrices that it speaks of.

R4 is a transform at the input of the down projections, ``x -> x M / sqrt(n)``. The down projections
hold the inverse already, so no transform of weights is listed. ``M = sqrt(n) R4`` is stored with
the first of the modules that share it, under ``{module}.{group}_input.weight``; of a rotation in
blocks it is one block, whose size is ``head_dim``.

The type is ``hadamard``, Sylvester's matrix, where vLLM 0.33 has a fast kernel for it (blocks of 16
to 128). Any other is ``random-hadamard``: the type whose matrix a reader takes from the checkpoint,
and multiplies by it. An R4 of full order is that, from an artifact that was made for another
target.

R3 has no place: vLLM 0.33 passes over transforms of queries and keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from backends.safetensors.compressed_tensors.library import require
from backends.safetensors.layout import Entry
from backends.safetensors.names import Names
from calib.artifact import QuantizedModel
from calib.errors import BackendError
from calib.rotations.rotation_set import Rotation

_LOCATION = "input"
_FAST_BLOCKS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Transform:
    """One matrix, and the modules that multiply their input by it."""

    name: str
    """Of its config group."""
    rotation: Rotation
    modules: tuple[str, ...]

    @property
    def order(self) -> int:
        """Of the stored matrix."""
        assert self.rotation.order is not None  # online rotations are Hadamard matrices
        return self.rotation.block or self.rotation.order

    @property
    def kind(self) -> str:
        """Its type in the words of the format."""
        fast = self.rotation.block in _FAST_BLOCKS and self.rotation.seed is None
        return "hadamard" if fast else "random-hadamard"

    @property
    def key(self) -> str:
        """Where the matrix is stored."""
        return f"{self.modules[0]}.{self.name}_{_LOCATION}.weight"

    def entry(self, model: QuantizedModel) -> Entry:
        """The matrix ``[n, n]``, in the dtype of the model."""
        order = self.order

        def read() -> Tensor:
            block = self.rotation.dense()[:order, :order]
            return (block * math.sqrt(order)).to(model.dtype).contiguous()

        return Entry(self.key, "other", model.dtype, (order, order), read)


def transforms_of(model: QuantizedModel, names: Names) -> list[Transform]:
    """The transforms of ``model``; R4 of the same order and signs is one of them.

    Raises:
        BackendError: an online rotation that vLLM would not apply.
    """
    if "r3" in model.rotations.kinds():
        raise BackendError(
            "R3: vLLM 0.33 applies no rotation of queries and keys",
            hint="leave r3 out of --rotate",
        )

    shared: dict[tuple[int | None, ...], list[tuple[Rotation, str]]] = {}
    for rotation, module in _down_projections(model, names):
        if rotation.block is not None and rotation.seed is not None:
            raise BackendError(f"{rotation.name} has signs, which differ from block to block")
        same = (rotation.order, rotation.seed, rotation.block)
        shared.setdefault(same, []).append((rotation, module))

    return [
        Transform(
            "R4" if index == 0 else f"R4_{index}",
            sharing[0][0],
            tuple(module for _, module in sharing),
        )
        for index, sharing in enumerate(shared.values())
    ]


def transform_config(transforms: list[Transform]) -> dict[str, Any]:
    """``transform_config`` as JSON values; empty where there is nothing to transform."""
    if not transforms:
        return {}
    library = require("compressed_tensors.transform")
    groups = {
        transform.name: library.TransformScheme(
            type=transform.kind,
            apply=[library.TransformArgs(targets=list(transform.modules), location=_LOCATION)],
            head_dim=transform.rotation.block,
        )
        for transform in transforms
    }
    written: dict[str, Any] = library.TransformConfig(config_groups=groups).model_dump(mode="json")
    return written


def _down_projections(model: QuantizedModel, names: Names) -> Iterator[tuple[Rotation, str]]:
    """Every R4 with the module whose input it multiplies."""
    for layer in range(names.wiring.sizes.layers):
        for spec in names.wiring.ffn_readers(layer):
            rotation = model.rotations.r4(layer, spec.branch)
            if rotation is None:
                continue
            if spec.layout == "experts":
                raise BackendError(
                    f"R4 before the experts of '{spec.name}': vLLM 0.33 applies transforms to"
                    " linears alone",
                    hint="leave r4 out of --rotate",
                )
            if _has_bias(model, spec.name):
                raise BackendError(
                    f"R4 before '{spec.name}', which has a bias: vLLM 0.33 refuses a transform of"
                    " such a linear",
                    hint="leave r4 out of --rotate",
                )
            yield rotation, names.published(spec.name)


def _has_bias(model: QuantizedModel, name: str) -> bool:
    linear = model.linears.get(name)
    return f"{name}.bias" in model.floats if linear is None else linear.bias is not None


def transform_keys(tensors: Mapping[str, Tensor]) -> set[str]:
    """Keys of stored matrices."""
    return {key for key in tensors if key.endswith(f"_{_LOCATION}.weight") and ".R4" in key}
