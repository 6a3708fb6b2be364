"""What a bundle's config says of its source model, and the parts that layouts without a place for them must spell out.

Online rotations are Hadamard matrices given by order and seed. Where a target has no notion of them, a bundle holds

    {linear}.rotation.signs          [n]       multiplied with the input first
    {linear}.rotation.factors.{k}    [m, m]    scaled factors, in the order of use

With channels indexed by a tuple of factor indices, factor ``k`` of order ``m`` acts on ``x`` reshaped to
``[..., done, m, rest]``: from the left where ``rest > 1``, on ``[..., done, m]`` from the right for the last one. Each
is stored as it is multiplied. ``done`` starts at ``n`` over the product of the orders, which is 1 unless the matrix is
block-diagonal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from backends.safetensors.layout import Entry
from calib.architectures import Architecture, architecture_for
from calib.artifact import QuantizedModel
from calib.errors import BackendError
from calib.rotations.hadamard import block_order, hadamard_factors, random_signs
from calib.rotations.rotation_set import Rotation

_ROTATION_KEY = re.compile(r"(.+)\.rotation\.(signs|factors\.\d+)")
_SMALLEST_BLOCK = 8
"""TensorRT-RTX 1.7.1 was seen to build blocks of 8 to 256."""


def source_model(config: Mapping[str, Any]) -> tuple[Any, Architecture]:
    """The transformers config that ``config`` was made from, and its table entry."""
    from transformers import AutoConfig  # here, because it takes seconds to import

    found = AutoConfig.for_model(**config)
    return found, architecture_for(found)


def transposed_weights(config: Mapping[str, Any]) -> frozenset[str]:
    """Keys of the weights that transformers stores ``[in, out]`` (Conv1D)."""
    found, architecture = source_model(config)
    return frozenset(spec.weight for spec in architecture.all_linears(found) if spec.layout == "conv1d")


def norm_keys(config: Mapping[str, Any]) -> frozenset[str]:
    """Keys of the gains and biases of the norms."""
    found, architecture = source_model(config)
    return frozenset(f"{name}.{part}" for name in architecture.norm_names(found) for part in ("weight", "bias"))


def input_rotations(model: QuantizedModel) -> dict[str, Rotation]:
    """The online rotation that acts on the input of a linear, quantized or not, by the linear's name."""
    found, architecture = source_model(model.config)
    rotations = {}
    for layer in range(architecture.dimensions(found).layers):
        for spec in architecture.ffn_readers(found, layer):
            rotation = model.rotations.r4(layer, spec.branch)
            if rotation is not None:
                rotations[spec.name] = rotation
    return rotations


def rotation_entries(model: QuantizedModel) -> Iterator[Entry]:
    """The online rotations of ``model`` as tensors; see the module's docstring."""
    for name, rotation in input_rotations(model).items():
        for key, tensor in _rotation_tensors(rotation).items():
            values = tensor.to(model.dtype)
            yield Entry(f"{name}.rotation.{key}", "other", model.dtype, tuple(values.shape), values.contiguous)


def is_rotation_key(key: str) -> bool:
    """Whether ``key`` is one of :func:`rotation_entries`."""
    return _ROTATION_KEY.fullmatch(key) is not None


def rotated_linears(keys: Mapping[str, Any]) -> dict[str, int]:
    """The linears with an online rotation and the number of its factors, from the keys of a bundle."""
    counts: dict[str, int] = {}
    for key in keys:
        match = _ROTATION_KEY.fullmatch(key)
        if match is not None:
            counts[match[1]] = counts.get(match[1], 0) + match[2].startswith("factors")
    return counts


def even_block(name: str, width: int, size: int) -> int:
    """The block that a bundle has in place of blocks of ``size``: the last of those may be short, and no runtime's may.

    It is ``g = gcd(width, size)``, and ``size / g`` of them repeat one scale, so that every weight keeps its own.

    Args:
        name: the linear, for errors.
        width: its input features.
        size: input features of a block of the artifact.

    Raises:
        BackendError: ``g`` is too small for a kernel.
    """
    common = math.gcd(width, size)
    if common < _SMALLEST_BLOCK:
        raise BackendError(
            f"TensorRT's blocks must divide the input: blocks of {size} do not divide the {width} input features of "
            f"'{name}', and nothing above {common} divides both",
            hint=f"choose a --block-size of {_SMALLEST_BLOCK} or more that divides {width}, "
            f"or leave the linear in float with --override '{name}=float'",
        )
    return common


def even_scales(scale: Tensor, width: int, size: int) -> Tensor:
    """Scales ``[out, ceil(width / size)]`` as those of the blocks of :func:`even_block`, ``[out, width / g]``."""
    common = math.gcd(width, size)
    return scale.repeat_interleave(size // common, dim=-1)[:, : width // common]


def original_scales(scale: Tensor, width: int, size: int) -> Tensor:
    """The inverse of :func:`even_scales`."""
    return scale[:, :: size // math.gcd(width, size)]


def _rotation_tensors(rotation: Rotation) -> dict[str, Tensor]:
    """Float64 tensors of a Hadamard rotation by the ends of their keys."""
    assert rotation.order is not None  # online rotations are Hadamard matrices
    signs = torch.ones(rotation.order, dtype=torch.float64)
    if rotation.seed is not None:
        signs = random_signs(rotation.order, rotation.seed)
    block = block_order(rotation.order)
    factors = [factor.double() * len(factor) ** -0.5 for factor in hadamard_factors(block)]
    stored = [*(factor.T.contiguous() for factor in factors[:-1]), *factors[-1:]]
    return {"signs": signs, **{f"factors.{k}": factor for k, factor in enumerate(stored)}}
