"""Linears of Tripy modules.

``tp.Linear`` quantizes its weight ``[out, in]`` per channel or per tensor. Blocks lie along axis 0
in Tripy, so scales in blocks of *input* features need the transpose:

    y = x dq(q(W^T)) + b,    W^T [in, out],    scale [in / block, out]
"""

from __future__ import annotations

from typing import Any

import nvtripy as tp
from nvtripy.frontend.module.parameter import DefaultParameter

from backends.safetensors.tripy.modules.plan import LinearPlan


class Hadamard(tp.Module):  # type: ignore[misc]
    """An online rotation ``x R`` of the last dimension, factor by factor; see
    :mod:`backends.safetensors.source`.
    """

    def __init__(self, width: int, orders: tuple[int, ...], dtype: tp.dtype) -> None:
        super().__init__()
        self.width = width
        self.orders = orders
        self.signs = DefaultParameter((width,), dtype)
        self.factors = [DefaultParameter((order, order), dtype) for order in orders]

    def forward(self, x: tp.Tensor) -> tp.Tensor:
        """``[..., width]`` to the same shape."""
        shape = x.shape
        x = x * self.signs
        rest = 1
        for order in self.orders:
            rest *= order
        done = self.width // rest

        for order, factor in zip(self.orders, self.factors, strict=True):
            rest //= order
            if rest == 1:
                x = tp.reshape(x, (-1, done, order)) @ factor
            else:
                x = factor @ tp.reshape(x, (-1, done, order, rest))
            done *= order

        return tp.reshape(x, shape)


class BlockLinear(tp.Module):  # type: ignore[misc]
    """A linear whose int4 weight has scales in blocks of input features."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_size: int,
        *,
        bias: bool = True,
        dtype: tp.dtype = tp.float32,
        input_dtype: tp.dtype | None = None,
        reordered: bool = False,
    ) -> None:
        """
        Args:
            in_features: a multiple of ``block_size``.
            out_features: of the result.
            block_size: input features that share a scale.
            bias: whether there is one.
            dtype: of weight, scales and bias; what it computes in.
            input_dtype: ``tp.int8`` where the input is quantized with one scale, else ``None``.
            reordered: row ``p`` of the weight is input feature ``input_order[p]``.
        """
        super().__init__()
        self.dtype = dtype
        self.quant_dtype = tp.int4
        self.input_dtype = input_dtype
        self.block_size = block_size
        self.weight = DefaultParameter((in_features, out_features), dtype)
        self.weight_scale = DefaultParameter((in_features // block_size, out_features), dtype)
        self.bias = DefaultParameter((out_features,), dtype) if bias else None
        self.input_scale = None if input_dtype is None else DefaultParameter((), dtype)
        self.input_order = DefaultParameter((in_features,), tp.int32) if reordered else None

    def forward(self, x: tp.Tensor) -> tp.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if self.input_order is not None:
            x = tp.gather(x, -1, self.input_order)
        if self.input_dtype is not None:
            x = tp.dequantize(
                tp.quantize(x, self.input_scale, self.input_dtype), self.input_scale, self.dtype
            )
        quantized = tp.quantize(self.weight, self.weight_scale, self.quant_dtype)
        out = x @ tp.dequantize(quantized, self.weight_scale, self.dtype)
        return out if self.bias is None else out + self.bias


class _Linear(tp.Linear):  # type: ignore[misc]
    """``tp.Linear`` that insists on a scale of the input where the plan has one: Tripy takes it as
    optional.
    """

    def __init__(self, plan: LinearPlan, dtype: tp.dtype) -> None:
        super().__init__(
            plan.in_features,
            plan.out_features,
            bias=plan.bias,
            dtype=dtype,
            quant_dtype=None if plan.quant_dtype is None else getattr(tp, plan.quant_dtype),
            weight_quant_dim=0 if plan.per_channel else None,
        )
        if plan.quant_dtype is not None:
            self.input_scale = None if plan.input_dtype is None else DefaultParameter((), dtype)


class _Rotated(tp.Module):  # type: ignore[misc]
    """A mixin: rotates the input first."""

    rotation: Hadamard

    def forward(self, x: tp.Tensor) -> tp.Tensor:
        """Rotate, then the linear."""
        return super().forward(self.rotation(x))


class _RotatedLinear(_Rotated, _Linear):
    pass


class _RotatedBlockLinear(_Rotated, BlockLinear):
    pass


def make_linear(plan: LinearPlan, dtype: tp.dtype) -> Any:
    """The module of ``plan``; ``dtype`` is Tripy's."""
    if plan.block_size is None:
        linear = (_RotatedLinear if plan.rotation else _Linear)(plan, dtype)
    else:
        linear = (_RotatedBlockLinear if plan.rotation else BlockLinear)(
            plan.in_features,
            plan.out_features,
            plan.block_size,
            bias=plan.bias,
            dtype=dtype,
            input_dtype=None if plan.input_dtype is None else getattr(tp, plan.input_dtype),
            reordered=plan.reordered,
        )
    if plan.rotation:
        linear.rotation = Hadamard(plan.in_features, plan.rotation, dtype)
    return linear
