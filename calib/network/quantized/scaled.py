"""Weights of eight bits under their own name, with a scale beside them.

    w = q s            FP8 (DeepSeek and Qwen3 in blocks; fbgemm, compressed-tensors, ModelOpt)
    w = (q - z) s      INT8 (compressed-tensors, ModelOpt)

    weight             float8 or int8 [out, in]
    weight_scale       [], [1]; [out] or [out, 1]; [out, in / group];
                       or [ceil(out / b0), ceil(in / b1)], called weight_scale_inv in DeepSeek's
                       layout, a factor all the same; the last blocks may be cut off
    weight_zero_point  like the scale

Scales of one byte without a dtype of their own are exponents: 2^(s - 127) (``ue8m0``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from calib.network.quantized.weight import Header, Weight, malformed, matrix, part, weight_settings

if TYPE_CHECKING:
    from torch import Tensor

_SCALES = (".weight_scale_inv", ".weight_scale")
_QUANTIZED = ("F8_E4M3", "F8_E5M2", "I8")
_EXPONENT_BIAS = 127


def weights(stored: Mapping[str, Header], settings: Mapping[str, object]) -> Iterator[Weight]:
    """See :data:`~calib.network.quantized.weight.Reader`."""
    blocks = _blocks(settings)
    for scale in stored:
        module = next((scale.removesuffix(end) for end in _SCALES if scale.endswith(end)), None)
        name = f"{module}.weight"
        if module is None or f"{module}.weight_packed" in stored:
            continue
        part(stored, name, name)
        if stored[name].dtype == "U8":  # packed
            continue
        if stored[name].dtype not in _QUANTIZED:
            raise malformed(name, f"it has a scale, and is stored in {stored[name].dtype}")
        shape = matrix(stored, name)
        sizes = _sizes(name, shape, stored[scale].shape, blocks)
        parts = {"weight": name, "scale": scale}
        zero = f"{module}.weight_zero_point"
        if zero in stored:
            parts["zero"] = part(stored, zero, name, stored[scale].shape)
        yield Weight(name, shape, parts, partial(_decoded, sizes=sizes))


def _blocks(settings: Mapping[str, object]) -> set[tuple[int, int]]:
    """Rows and columns of the blocks that the config speaks of."""
    stated = [settings.get("weight_block_size")]
    stated += [each.get("block_structure") for each in weight_settings(settings)]
    found = set()
    for block in stated:
        if isinstance(block, str):  # older compressed-tensors: "128x128"
            block = [int(size) if size.isdecimal() else None for size in block.split("x")]
        if isinstance(block, list) and len(block) == 2 and all(_whole(size) for size in block):
            found.add((block[0], block[1]))
    return found


def _whole(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


def _sizes(
    name: str, shape: tuple[int, int], grid: tuple[int, ...], blocks: Collection[tuple[int, int]]
) -> tuple[int, int]:
    """Rows and columns of the weight that share one scale.

    Args:
        name: of the weight, for the message.
        shape: of the weight.
        grid: shape of its scales.
        blocks: those that the config speaks of. Their size does not follow from their number, for
            the last ones may be cut off.

    Raises:
        CheckpointError: they do not fit each other, or more than one of ``blocks`` does.
    """
    rows, columns = shape
    if math.prod(grid) == 1:
        return rows, columns
    if grid in ((rows,), (rows, 1)):
        return 1, columns
    if len(grid) == 2 and all(grid):
        fitting = [each for each in blocks if grid == (-(-rows // each[0]), -(-columns // each[1]))]
        if len(fitting) == 1:
            return fitting[0]
        if not fitting and grid[0] == rows and columns % grid[1] == 0:
            return 1, columns // grid[1]
        if not fitting and grid[1] == columns and rows % grid[0] == 0:
            return rows // grid[0], 1
    sizes = " or ".join(f"{high} x {wide}" for high, wide in sorted(blocks))
    said = f"in blocks of {sizes}" if blocks else "and the config says no size of blocks"
    raise malformed(name, f"scales of shape {list(grid)} do not fit {list(shape)} {said}")


def _decoded(parts: Mapping[str, Tensor], sizes: tuple[int, int]) -> Tensor:
    weight = parts["weight"].float()
    if "zero" in parts:
        weight = weight - spread(parts["zero"].float(), weight, sizes)
    return weight * spread(_factors(parts["scale"]), weight, sizes)


def _factors(scale: Tensor) -> Tensor:
    import torch  # here, because it takes seconds to import

    if scale.dtype is torch.uint8:
        return torch.exp2(scale.float() - _EXPONENT_BIAS)
    return scale.float()


def spread(scale: Tensor, weight: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Each of the scales repeated over its block, ``[out, in]``, or what broadcasts to it.

    Args:
        scale: one for each block of ``sizes``, the last ones cut off.
        weight: what they belong to, ``[out, in]``.
        sizes: rows and columns of a block.
    """
    rows, columns = weight.shape
    if scale.numel() == 1:
        return scale.reshape(())
    grid = scale.reshape(-(-rows // sizes[0]), -(-columns // sizes[1]))
    wide = grid.repeat_interleave(sizes[0], dim=0)[:rows]
    return wide if sizes[1] >= columns else wide.repeat_interleave(sizes[1], dim=1)[:, :columns]
