"""Runs what Tripy traced, op by op, in torch on the CPU: the numbers that its compiler would have
to give.

Dtypes are the trace's own. ``quantize`` divides in float32, rounds ties to even and saturates;
``dequantize`` multiplies in float32 and rounds to its dtype: TensorRT's definition of both layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
_RANGES = {"int8": (-128, 127), "int4": (-8, 7)}


def run(output: Any) -> Tensor:
    """The value of a ``tp.Tensor``."""
    from nvtripy.trace.trace import Trace

    values: dict[str, Any] = {}
    for op in Trace([output.trace_tensor]).ops:
        given = [values[tensor.name] for tensor in op.inputs]
        values[op.outputs[0].name] = _OPS[type(op).__name__](op, *given)
    result: Tensor = values[output.trace_tensor.name]
    return result


def _scale_for(x: Tensor, scale: Tensor, dim: int | None) -> Tensor:
    if dim is not None:
        return scale.float().reshape([-1 if axis == dim else 1 for axis in range(x.dim())])
    if scale.dim() == 2:
        assert x.shape[0] % scale.shape[0] == 0
        assert x.shape[1] == scale.shape[1]
        return scale.float().repeat_interleave(x.shape[0] // scale.shape[0], dim=0)
    assert scale.dim() == 0
    return scale.float()


def quantize(op: Any, x: Tensor, scale: Tensor) -> Tensor:
    ratio = x.float() / _scale_for(x, scale, op.dim)
    if op.dtype.name == "float8":
        return ratio.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return ratio.round().clamp(*_RANGES[op.dtype.name])


def dequantize(op: Any, x: Tensor, scale: Tensor) -> Tensor:
    return (x * _scale_for(x, scale, op.dim)).to(_DTYPES[op.dtype.name])


def _constant(op: Any) -> Tensor:
    data: Tensor = op.data.data
    return data


def _linspace(op: Any, shape: Tensor, start: Tensor, step: Tensor) -> Tensor:
    sizes = shape.tolist()
    assert len(sizes) == 1
    return (start + step * torch.arange(sizes[0])).to(_DTYPES[op.dtype.name])


def _slice(op: Any, x: Tensor, start: Tensor, size: Tensor, step: Tensor) -> Tensor:
    triples = zip(start.tolist(), size.tolist(), step.tolist(), strict=True)
    return x[tuple(slice(first, first + count * by, by) for first, count, by in triples)]


def _gather(op: Any, x: Tensor, index: Tensor) -> Tensor:
    picked = x.index_select(op.dim, index.reshape(-1).long())
    return picked.reshape(x.shape[: op.dim] + index.shape + x.shape[op.dim + 1 :])


_OPS: dict[str, Callable[..., Tensor]] = {
    "Constant": _constant,
    "Quantize": quantize,
    "Dequantize": dequantize,
    "Linspace": _linspace,
    "Slice": _slice,
    "Gather": _gather,
    "Permute": lambda op, x: x.permute(*op.permutation),
    "Reshape": lambda op, x, shape: x.reshape(shape.tolist()),
    "Broadcast": lambda op, x, shape: x.expand(shape.tolist()),
    "Shape": lambda op, x: torch.tensor(x.shape, dtype=torch.int32),
    "GetDimensionSize": lambda op, x: x[op.dim],
    "Concatenate": lambda op, *parts: torch.cat(parts, dim=op.dim),
    "MatrixMultiply": lambda op, a, b: a @ b,
    "Cast": lambda op, x: x.to(_DTYPES[op.dtype.name]),
    "Softmax": lambda op, x: x.softmax(op.dim),
    "LayerNorm": lambda op, x, weight, bias: (
        functional.layer_norm(x, list(op.normalized_shape), eps=op.eps) * weight + bias
    ),
    "Avg": lambda op, x: x.mean(list(op.dim), keepdim=op.keepdim),
    "Where": lambda op, condition, a, b: torch.where(condition, a, b),
    "Add": lambda op, a, b: a + b,
    "Sub": lambda op, a, b: a - b,
    "Mul": lambda op, a, b: a * b,
    "Div": lambda op, a, b: a / b,
    "FloorDiv": lambda op, a, b: a // b,
    "Pow": lambda op, a, b: a**b,
    "Max": lambda op, a, b: torch.maximum(a, b),
    "Min": lambda op, a, b: torch.minimum(a, b),
    "Less": lambda op, a, b: a < b,
    "Greater": lambda op, a, b: a > b,
    "Equal": lambda op, a, b: a == b,
    "LogicalOr": lambda op, a, b: a | b,
    "Neg": lambda op, x: -x,
    "Not": lambda op, x: ~x,
    "Cos": lambda op, x: x.cos(),
    "Sin": lambda op, x: x.sin(),
    "Exp": lambda op, x: x.exp(),
    "Sqrt": lambda op, x: x.sqrt(),
    "Recip": lambda op, x: 1 / x,
    "Tanh": lambda op, x: x.tanh(),
    "Sigmoid": lambda op, x: x.sigmoid(),
    "GeluErf": lambda op, x: functional.gelu(x),
    "Relu": lambda op, x: x.relu(),
}
