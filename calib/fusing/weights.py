"""How a rotation changes one weight. All functions are pure and expect float64.

Row-vector convention: ``y = x W^T + b``. With an input that arrives as ``x Q`` and an output that
must leave as ``y P``

    y P = ((x Q) (W Q)^T + b) P = (x Q) (P^T W Q)^T + b P

so a reader becomes ``W Q``, and a writer ``P^T W`` with bias ``b P``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calib.architectures import Dimensions, LinearSpec, Space
from calib.rotations.rotation_set import Rotation, RotationSet


def rotate_weight(
    weight: Tensor, spec: LinearSpec, rotations: RotationSet, sizes: Dimensions
) -> Tensor:
    """The weight ``[out, in]`` of ``spec``, rotated on the side it reads and the side it writes.

    R3 and R4 run online: R4 leaves its inverse in the weights that read the rotated activation, and
    no online rotation reaches a writer.
    """
    source = rotation_of(spec.reads, spec, rotations)
    if source is not None and spec.reads is not Space.QUERY_KEY:
        weight = (
            _rotate_heads_read(weight, source, sizes)
            if spec.reads is Space.VALUE
            else source.apply(weight)
        )
    if spec.writes is Space.RESIDUAL:
        target = rotation_of(Space.RESIDUAL, spec, rotations)
        weight = weight if target is None else target.apply(weight.mT).mT
    values = _value_rows(spec, weight.shape[0], sizes)
    target = rotation_of(Space.VALUE, spec, rotations)
    return (
        _rotate_heads_written(weight, values, target, sizes)
        if values and target is not None
        else weight
    )


def rotate_bias(
    bias: Tensor, spec: LinearSpec, rotations: RotationSet, sizes: Dimensions
) -> Tensor:
    """The bias ``[out]`` of ``spec``, rotated on the side it writes: an output, it follows the rows
    of the weight.
    """
    if spec.writes is Space.RESIDUAL:
        target = rotation_of(Space.RESIDUAL, spec, rotations)
        bias = bias if target is None else target.apply(bias)
    values = _value_rows(spec, bias.shape[0], sizes)
    target = rotation_of(Space.VALUE, spec, rotations)
    if not values or target is None:
        return bias
    return _rotate_heads_written(bias[:, None], values, target, sizes)[:, 0]


def rotation_of(space: Space | None, spec: LinearSpec, rotations: RotationSet) -> Rotation | None:
    """The rotation that acts on ``space`` at the layer and branch of ``spec``."""
    if space is Space.RESIDUAL:
        return rotations.r1()
    if spec.layer is None:
        return None
    if space is Space.VALUE:
        return rotations.r2(spec.layer)
    return rotations.r4(spec.layer, spec.branch) if space is Space.FFN else None


def _value_rows(spec: LinearSpec, outputs: int, sizes: Dimensions) -> list[slice]:
    if spec.writes is Space.VALUE:
        return [slice(0, outputs)]
    if any(part.space is Space.VALUE for part in spec.parts):
        return spec.part("value", sizes)
    return []


def _heads(rotation: Rotation, sizes: Dimensions) -> Tensor:
    """One matrix per KV head, ``[kv_heads, head_dim, head_dim]``; a Hadamard matrix is shared by
    all heads.
    """
    return rotation.dense().expand(sizes.kv_heads, sizes.head_dim, sizes.head_dim)


def _rotate_heads_read(weight: Tensor, rotation: Rotation, sizes: Dimensions) -> Tensor:
    """Columns ``[out, kv_heads * group * head_dim]``: every query head of a group reads its KV
    head's values.
    """
    q = _heads(rotation, sizes).to(weight)
    columns = weight.reshape(weight.shape[0], sizes.kv_heads, sizes.group, sizes.head_dim)
    return torch.einsum("okgd,kde->okge", columns, q).reshape(weight.shape)


def _rotate_heads_written(
    weight: Tensor, rows: list[slice], rotation: Rotation, sizes: Dimensions
) -> Tensor:
    """Rows ``[kv_heads * head_dim, in]``, wherever they lie among the output features."""
    q = _heads(rotation, sizes).to(weight)
    values = torch.cat([weight[part] for part in rows]).reshape(
        sizes.kv_heads, sizes.head_dim, weight.shape[1]
    )
    rotated = torch.einsum("kde,kdi->kei", q, values).reshape(-1, weight.shape[1])
    result = weight.clone()
    for part, block in zip(
        rows, torch.split(rotated, [part.stop - part.start for part in rows]), strict=True
    ):
        result[part] = block
    return result
