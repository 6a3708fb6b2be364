"""Online rotations as standard operators: a Reshape and a small MatMul for each Kronecker
factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from torch import Tensor

from backends.onnx.linear_nodes import LinearNodes
from backends.onnx.names import ROTATION_FACTOR
from calib.architectures import Space, wiring_of
from calib.artifact import QuantizedModel
from calib.errors import BackendError
from calib.rotations.hadamard import hadamard_factors, random_signs
from calib.rotations.rotation_set import Rotation


def rotate(nodes: LinearNodes, x: ir.Value, rotation: Rotation) -> ir.Value:
    """x (H_1 ⊗ … ⊗ H_m) / √n over the last axis, factor by factor.

    With the last axis seen as [before, f, after], the factor H_f of order f acts as H_fᵀ X over the
    middle axis; the last factor, where ``after`` is 1, as X H_f. Each step is one Reshape and one
    MatMul with an f × f constant.

    The tokens of an expert, whose number has no name, may be none. ONNX Runtime multiplies such a
    value from the right and by a matrix only, so there it is (Xᵀ H_f)ᵀ, with two Transposes that it
    must not fuse with the product.
    """
    order, shape = rotation.order, x.shape
    if order is None or shape is None:
        raise BackendError(f"{rotation.name} is not a Hadamard rotation of a value of known rank")

    may_be_empty = any(isinstance(dim, ir.SymbolicDim) and dim.value is None for dim in shape)

    def op(
        operator: str, inputs: list[ir.Value], label: str, **attributes: Sequence[int]
    ) -> ir.Value:
        return nodes.tape.op(operator, inputs, attributes, name=f"{rotation.name}/{label}")

    def constant(name: str, tensor: Tensor) -> ir.Value:
        return nodes.lazy(
            name, tensor.shape, nodes.dtype, lambda: tensor.to(nodes.torch_dtype).contiguous()
        )

    def transposed_product(x: ir.Value, right: ir.Value, dims: list[int], label: str) -> ir.Value:
        *outer, middle, last = dims
        swap = [*range(len(outer)), len(outer) + 1, len(outer)]
        rows = [*outer[:-1], outer[-1] * last, middle]
        x = op(
            "Reshape",
            [op("Transpose", [x], f"{label}/Swap", perm=swap), nodes.integers(rows)],
            f"{label}/Rows",
        )
        x = op("MatMul", [x, right], f"{label}/MatMul")
        x = op("Reshape", [x, nodes.integers([*outer, last, middle])], f"{label}/Apart")
        return op("Transpose", [x], f"{label}/SwapBack", perm=swap)

    if rotation.seed is not None:
        x = op(
            "Mul",
            [x, constant(f"{rotation.name}.signs", random_signs(order, rotation.seed))],
            "Signs",
        )
    leading = [0] * (len(shape) - 1)
    after = rotation.factored
    for index, factor in enumerate(hadamard_factors(after)):
        f = factor.shape[0]
        after //= f
        last, label = after == 1, f"{ROTATION_FACTOR}{index}"
        matrix = factor.double() / f**0.5
        dims = [*leading, order // (f * after), f, *([] if last else [after])]
        x = op("Reshape", [x, nodes.integers(dims)], f"{label}/Reshape")
        if last or may_be_empty:
            right = constant(f"hadamard.{f}", matrix)
            x = (
                op("MatMul", [x, right], f"{label}/MatMul")
                if last
                else transposed_product(x, right, dims, label)
            )
        else:
            x = op("MatMul", [constant(f"hadamard.{f}.transposed", matrix.T), x], f"{label}/MatMul")
    rotated = op("Reshape", [x, nodes.integers([*leading, order])], "Reshape")
    rotated.shape, rotated.type = ir.Shape(shape), ir.TensorType(nodes.dtype)
    return rotated


def rotations_before_float(quantized: QuantizedModel) -> dict[str, Rotation]:
    """The R4 whose inverse is folded into a linear that stays in float, by the linear's name."""
    rotations = {}
    for name, spec in wiring_of(quantized.config).quantizable.items():
        if spec.reads is Space.FFN and spec.layer is not None and name not in quantized.linears:
            rotation = quantized.rotations.r4(spec.layer, spec.branch)
            if rotation is not None:
                rotations[name] = rotation
    return rotations
