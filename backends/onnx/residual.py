"""A residual sum and the norm behind it as one operator of ONNX Runtime.

    x = a + b;  y = w x / sqrt(mean(x^2) + eps)   ->   y, x =
    com.microsoft::SkipSimplifiedLayerNormalization(a, b, w)

ONNX Runtime makes one node of the norm by itself, and leaves the sum alone on a CPU. For graphs
that no other runtime is to read.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


def fuse_residual_norms(model: ir.Model) -> None:
    """Replace them in ``model``, in place."""
    pattern.RewriteRuleSet(
        [pattern.RewriteRule(_apart, _fused, _same_shapes)], commute=True
    ).apply_to_model(model)


def _apart(
    op: Any, a: ir.Value, b: ir.Value, weight: ir.Value, epsilon: ir.Value
) -> tuple[ir.Value, ir.Value]:
    x = op.Add(a, b)
    mean = op.ReduceMean(op.Pow(x, 2.0), [-1], _allow_other_attributes=True)
    return op.Mul(weight, op.Div(x, op.Sqrt(op.Add(mean, epsilon)))), x


def _fused(
    op: Any, a: ir.Value, b: ir.Value, weight: ir.Value, epsilon: ir.Value
) -> tuple[ir.Value, ir.Value]:
    y, _, _, x = op.SkipSimplifiedLayerNormalization(
        a, b, weight, epsilon=_number(epsilon), _domain=MICROSOFT, _outputs=4
    )
    return y, x


def _same_shapes(
    context: object,
    a: ir.Value,
    b: ir.Value,
    weight: ir.Value,
    epsilon: ir.Value,
    **others: object,
) -> bool:
    """The operator broadcasts nothing but the weight."""
    known = a.shape is not None and a.shape == b.shape and weight.shape is not None
    return known and len(weight.shape or ()) == 1 and _number(epsilon) is not None


def _number(value: ir.Value) -> float | None:
    constant = ir.convenience.get_const_tensor(value)
    return None if constant is None or constant.size != 1 else float(constant.numpy().item())
