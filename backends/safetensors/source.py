"""What a bundle's config says of its source model, and the parts that layouts without a place for
them must spell out.

Online rotations are Hadamard matrices given by order and seed. Where a target has no notion of
them, a bundle holds

    {module}.rotation.signs          [n]       multiplied with the input first
    {module}.rotation.factors.{k}    [m, m]    scaled factors, in the order of use

With channels indexed by a tuple of factor indices, factor ``k`` of order ``m`` acts on ``x``
reshaped to ``[..., done, m, rest]``: from the left where ``rest > 1``, on ``[..., done, m]`` from
the right for the last one. Each is stored as it is multiplied. ``done`` starts at ``n`` over the
product of the orders, which is 1 unless the matrix is block-diagonal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backends.base import Reason
from backends.safetensors.layout import Entry
from calib.architectures import wiring_of
from calib.artifact import QuantizedModel
from calib.errors import BackendError
from calib.network.skeleton import oriented_shapes
from calib.rotations.hadamard import hadamard_factors, random_signs
from calib.rotations.rotation_set import Rotation
from calib.schemes import LinearScheme, PerBlock, TensorScheme

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ROTATION_KEY = re.compile(r"(.+)\.rotation\.(signs|factors\.\d+)")
_SMALLEST_BLOCK = 8
"""TensorRT-RTX 1.7.1 was seen to build blocks of 8 to 256."""


def norm_keys(config: Mapping[str, Any]) -> frozenset[str]:
    """Keys of the gains and biases of the norms."""
    return frozenset(
        f"{name}.{part}" for name in wiring_of(config).norm_names for part in ("weight", "bias")
    )


def sliding_window(config: PretrainedConfig, layer: int) -> int | None:
    """How many tokens a layer of a transformers ``config`` sees back, itself included; ``None``:
    all.

    Mistral's layers all have the window, Qwen2 says which.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def online_rotations(model: QuantizedModel) -> dict[str, Rotation]:
    """The online rotations that a bundle spells out, by the module that they belong to.

    R4 acts on the input of a linear, quantized or not; that of experts has the name of their 3-D
    parameter. R3 acts on the queries and keys of an attention, after RoPE. It is there with a
    quantized cache alone, whose scales are those of rotated keys: else ``(q R3) (k R3)^T = q k^T``.
    """
    wiring = wiring_of(model.config)

    rotations = {}
    for layer in wiring.layers:
        cached = model.rotations.r3(layer) if model.cache is not None else None
        if cached is not None:
            rotations[wiring.attention(layer)] = cached
        for spec in wiring.ffn_readers(layer):
            rotation = model.rotations.r4(layer, spec.branch)
            if rotation is not None:
                rotations[spec.name] = rotation

    return rotations


def rotation_entries(model: QuantizedModel) -> Iterator[Entry]:
    """The online rotations of ``model`` as tensors; see the module's docstring."""
    for name, rotation in online_rotations(model).items():
        for key, tensor in _rotation_tensors(rotation).items():
            values = tensor.to(model.dtype)
            yield Entry(
                f"{name}.rotation.{key}",
                "other",
                model.dtype,
                tuple(values.shape),
                values.contiguous,
            )


def is_rotation_key(key: str) -> bool:
    """Whether ``key`` is one of :func:`rotation_entries`."""
    return _ROTATION_KEY.fullmatch(key) is not None


def rotated_modules(keys: Mapping[str, Any]) -> dict[str, int]:
    """The modules with an online rotation and the number of its factors, from the keys of a
    bundle.
    """
    counts: dict[str, int] = {}
    for key in keys:
        match = _ROTATION_KEY.fullmatch(key)
        if match is not None:
            counts[match[1]] = counts.get(match[1], 0) + match[2].startswith("factors")
    return counts


def input_widths(config: Mapping[str, Any]) -> dict[str, int]:
    """Input features of whatever may be quantized, by name: linears, experts one by one, the head,
    embeddings.
    """
    wiring = wiring_of(config)
    shapes = oriented_shapes(wiring)
    widths = {name: shapes[spec.weight][-1] for name, spec in wiring.by_name.items()}
    return widths | {table.name: shapes[table.weight][-1] for table in wiring.embeddings}


def block_refusal(
    config: Mapping[str, Any],
    linears: Mapping[str, LinearScheme],
    reason: Callable[[str, int, TensorScheme], Reason | None],
) -> Reason | None:
    """Why blocks of weights do not fit a model, and what to do; ``None`` if they do.

    Args:
        config: Hugging Face config of the source model.
        linears: how what is quantized is, by name.
        reason: the same for one linear, by its name, input features and scheme in blocks.
    """
    blocked = {
        name: scheme.weight
        for name, scheme in linears.items()
        if block_size(scheme.weight) is not None
    }
    if not blocked:
        return None

    widths = input_widths(config)
    return next(
        filter(
            None, (reason(name, widths[name], blocked[name]) for name in blocked if name in widths)
        ),
        None,
    )


def block_size(scheme: TensorScheme) -> int | None:
    """Input features of a block; ``None`` where there are no blocks."""
    return scheme.granularity.size if isinstance(scheme.granularity, PerBlock) else None


def uneven(name: str, width: int, scheme: TensorScheme) -> Reason | None:
    """Why the linear ``name`` of ``width`` input features has no :func:`even_block`, and what to
    do; or ``None``.
    """
    size = block_size(scheme)
    assert size is not None
    common = math.gcd(width, size)

    if common == size or (scheme.scale_format == "compute" and common >= _SMALLEST_BLOCK):
        return None

    reason = f"blocks of {size} do not divide the {width} input features of '{name}'"
    leave = f"leave the linear in float with --override '{name}=float'"
    if scheme.scale_format != "compute":
        return Reason(f"{reason}, and this format has blocks of no other size", leave)

    return Reason(
        (
            f"{reason}, and nothing above {common} divides both: a runtime's blocks must divide the"
            " input"
        ),
        f"choose a --block-size of {_SMALLEST_BLOCK} or more that divides {width}, or {leave}",
    )


def even_block(name: str, width: int, scheme: TensorScheme) -> int:
    """The block that a bundle has in place of one of the artifact, whose last may be short, as no
    runtime's may.

    It is ``g = gcd(width, size)``, and ``size / g`` of them repeat one scale, so that every weight
    keeps its own.

    Args:
        name: the linear, for errors.
        width: its input features.
        scheme: of its weight, in blocks.

    Raises:
        BackendError: there is none; see :func:`uneven`.
    """
    refusal, size = uneven(name, width, scheme), block_size(scheme)
    if refusal is not None:
        raise BackendError(refusal.reason, hint=refusal.hint)
    assert size is not None

    return math.gcd(width, size)


def even_scales(scale: Tensor, width: int, size: int) -> Tensor:
    """Scales ``[out, ceil(width / size)]`` as those of the blocks of :func:`even_block`, ``[out,
    width / g]``.
    """
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
    made_of = hadamard_factors(rotation.factored)
    factors = [factor.double() * len(factor) ** -0.5 for factor in made_of]
    stored = [*(factor.T.contiguous() for factor in factors[:-1]), *factors[-1:]]
    return {"signs": signs, **{f"factors.{k}": factor for k, factor in enumerate(stored)}}
