"""Lowering: each ``rotq::Linear`` placeholder of a traced graph becomes standard operators and initializers.

A quantized linear with an online rotation R and static input scale, all of it opset-21 standard domain:

    x -> [Reshape, MatMul(H_k)]* -> Reshape -> QuantizeLinear(s_x, 0) -> DequantizeLinear(s_x, 0) -+
    W_q int8 [K, N] -> DequantizeLinear(s_w [N], axis 1) ----------------------------------------- MatMul -> Add(b)

The weight is stored ``[K, N]`` (transposed from ``[out, in]``) so that its DequantizeLinear feeds MatMul directly: the
form that runtimes turn into an integer kernel. Where its columns follow an order of their own (GPTQ's act-order), a
Gather puts x into that order right before the MatMul. A linear in float is rotated as well, and multiplied as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
import torch
from onnx_ir import tape
from torch import Tensor
from transformers import AutoConfig

from backends.onnx.trace import DOMAIN, MODULE_ATTRIBUTE
from calib.architectures import Space, architecture_for
from calib.artifact import QuantizedLinear, QuantizedModel
from calib.errors import BackendError
from calib.rotations.hadamard import block_order, hadamard_factors, random_signs
from calib.rotations.rotation_set import Rotation
from calib.schemes import PerBlock, PerChannel

_STORAGE = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4}


def lower(model: ir.Model, quantized: QuantizedModel) -> None:
    """Replace every placeholder of ``model``, in place, by the linear it stands for.

    Raises:
        BackendError: a placeholder names a linear that the artifact does not hold.
    """
    _Lowering(model, quantized).run()


class _Lowering:
    """One pass over one graph. Holds what the linears of a graph share."""

    def __init__(self, model: ir.Model, quantized: QuantizedModel) -> None:
        self.model = model
        self.graph = model.graph
        self.quantized = quantized
        self.dtype = ir.tensor(torch.zeros((), dtype=quantized.dtype)).dtype
        self._initializers: dict[str, ir.Value] = {}
        self._rotated: dict[tuple[int, str], ir.Value] = {}
        self._before_float = _rotations_before_float(quantized)

    def run(self) -> None:
        for node in list(self.graph):
            if node.domain == DOMAIN:
                self._replace(node)
        self.model.opset_imports.pop(DOMAIN, None)
        self.graph.opset_imports.pop(DOMAIN, None)

    def _replace(self, node: ir.Node) -> None:
        name = node.attributes[MODULE_ATTRIBUTE].as_string()
        x = node.inputs[0]
        assert x is not None  # a placeholder has exactly one input
        builder = tape.Tape()
        linear = self.quantized.linears.get(name)
        if linear is not None:
            output = self._batched(builder, x, linear)
        elif f"{name}.weight" in self.quantized.floats:
            output = self._float_linear(builder, x, name)
        else:
            raise BackendError(
                f"the artifact holds no weights for the linear '{name}'", hint="run `rotq calibrate` again"
            )
        old = node.outputs[0]
        output.shape, output.type, output.name = old.shape, old.type, old.name
        self.graph.insert_before(node, list(builder.nodes))
        ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def _batched(self, builder: tape.Tape, x: ir.Value, linear: QuantizedLinear) -> ir.Value:
        """The linear over a value of three dimensions at least; OPT flattens batch and sequence before its MLP.

        ONNX Runtime makes a float Gemm of a two-dimensional MatMul and its bias before it looks for integer kernels.
        """
        if x.shape is None or len(x.shape) != 2:
            return self._quantized_linear(builder, x, linear)
        first = self._initializer("axes.0", (1,), ir.DataType.INT64, lambda: torch.tensor([0]))
        batched = builder.op("Unsqueeze", [x, first], name=f"{linear.name}/Unsqueeze")
        batched.shape, batched.type = ir.Shape([1, *x.shape]), x.type
        output = self._quantized_linear(builder, batched, linear)
        return builder.op("Squeeze", [output, first], name=f"{linear.name}/Squeeze")

    def _quantized_linear(self, builder: tape.Tape, x: ir.Value, linear: QuantizedLinear) -> ir.Value:
        if linear.input_scale is not None:
            x = self._quantized_input(builder, x, linear)
        elif linear.online_rotation is not None:
            x = self._rotate(builder, x, self.quantized.rotations[linear.online_rotation])
        storage = _STORAGE[linear.weight_scheme.format.name]
        weight = self._transposed(f"{linear.name}.weight", linear.weight, storage)
        scale = self._float(f"{linear.name}.weight_scale", _scale_for_kn(linear))
        attributes = _dequantize_attributes(linear)
        dequantized = builder.op(
            "DequantizeLinear", [weight, scale], attributes, name=f"{linear.name}/DequantizeWeight"
        )
        if linear.weight_order is not None:
            order = linear.weight_order
            value = self._initializer(
                f"{linear.name}.weight_order", tuple(order.shape), ir.DataType.INT64, lambda: order.contiguous()
            )
            x = builder.op("Gather", [x, value], {"axis": -1}, name=f"{linear.name}/Order")
        return self._matmul(builder, x, dequantized, linear.name, linear.bias)

    def _float_linear(self, builder: tape.Tape, x: ir.Value, name: str) -> ir.Value:
        if name in self._before_float:
            x = self._rotate(builder, x, self._before_float[name])
        weight = self._transposed(f"{name}.weight", self.quantized.floats[f"{name}.weight"], self.dtype)
        return self._matmul(builder, x, weight, name, self.quantized.floats.get(f"{name}.bias"))

    def _matmul(self, builder: tape.Tape, x: ir.Value, weight: ir.Value, name: str, bias: Tensor | None) -> ir.Value:
        product = builder.op("MatMul", [x, weight], name=f"{name}/MatMul")
        if bias is None:
            return product
        return builder.op("Add", [product, self._float(f"{name}.bias", bias)], name=f"{name}/Add")

    def _quantized_input(self, builder: tape.Tape, x: ir.Value, linear: QuantizedLinear) -> ir.Value:
        """``x`` rotated, quantized and dequantized for one linear.

        The rotation is shared by linears that read the same value; the Q/DQ pair is not, and the pairs that read one
        value differ in ``axis``, which means nothing to a scalar scale. ONNX Runtime on x86 makes an integer kernel
        only of a MatMul whose Q and DQ serve nothing else, and would merge pairs that are equal.
        """
        assert linear.input_scale is not None
        if linear.online_rotation is not None:
            key = (id(x), linear.online_rotation)
            if key not in self._rotated:
                self._rotated[key] = self._rotate(builder, x, self.quantized.rotations[linear.online_rotation])
            x = self._rotated[key]
        zero = self._initializer("zero_point.int8", (), ir.DataType.INT8, lambda: torch.zeros((), dtype=torch.int8))
        scale = self._float(f"{linear.name}.input_scale", linear.input_scale)
        axis = {"axis": sum(user.op_type == "QuantizeLinear" for user in x.consumers())}
        stored = builder.op("QuantizeLinear", [x, scale, zero], axis, name=f"{linear.name}/QuantizeInput")
        return builder.op("DequantizeLinear", [stored, scale, zero], axis, name=f"{linear.name}/DequantizeInput")

    def _rotate(self, builder: tape.Tape, x: ir.Value, rotation: Rotation) -> ir.Value:
        """x (H_1 ⊗ … ⊗ H_m) / √n over the last axis, factor by factor.

        With the last axis seen as [before, f, after], the factor H_f of order f acts as H_fᵀ X over the middle axis;
        the last factor, where ``after`` is 1, as X H_f. Each step is one Reshape and one MatMul with an f × f constant.
        """
        order = rotation.order
        if order is None or x.shape is None:
            raise BackendError(f"{rotation.name} is not a Hadamard rotation of a value of known rank")
        rank = len(x.shape)
        if rotation.seed is not None:
            signs = self._float(f"{rotation.name}.signs", random_signs(order, rotation.seed))
            x = builder.op("Mul", [x, signs], name=f"{rotation.name}/Signs")
        leading = [0] * (rank - 1)
        after = block_order(order)
        for index, factor in enumerate(hadamard_factors(after)):
            f = factor.shape[0]
            after //= f
            last = after == 1
            matrix = factor.double() / f**0.5
            constant = self._float(f"hadamard.{f}{'' if last else '.transposed'}", matrix if last else matrix.T)
            label = f"{rotation.name}/Factor{index}"
            dims = [*leading, -1, f] if last else [*leading, -1, f, after]
            x = builder.op("Reshape", [x, self._shape(dims)], name=f"{label}/Reshape")
            x = builder.op("MatMul", [x, constant] if last else [constant, x], name=f"{label}/MatMul")
        return builder.op("Reshape", [x, self._shape([*leading, order])], name=f"{rotation.name}/Reshape")

    def _shape(self, dims: list[int]) -> ir.Value:
        name = "shape." + "x".join(str(dim) for dim in dims)
        return self._initializer(name, (len(dims),), ir.DataType.INT64, lambda: torch.tensor(dims))

    def _float(self, name: str, tensor: Tensor) -> ir.Value:
        return self._initializer(
            name, tuple(tensor.shape), self.dtype, lambda: tensor.to(self.quantized.dtype).contiguous()
        )

    def _transposed(self, name: str, weight: Tensor, dtype: ir.DataType) -> ir.Value:
        """A weight ``[out, in]`` as the initializer ``[in, out]``."""
        return self._initializer(name, (weight.shape[1], weight.shape[0]), dtype, lambda: weight.T.contiguous())

    def _initializer(
        self, name: str, shape: tuple[int, ...], dtype: ir.DataType, read: Callable[[], Tensor]
    ) -> ir.Value:
        """The initializer called ``name``, made on first use. Its bytes are read when they are written, not kept."""
        if name not in self._initializers:
            tensor = ir.LazyTensor(lambda: _tensor(read(), dtype, name), dtype=dtype, shape=ir.Shape(shape), name=name)
            value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
            self.graph.register_initializer(value)
            self._initializers[name] = value
        return self._initializers[name]


def _rotations_before_float(quantized: QuantizedModel) -> dict[str, Rotation]:
    """The R4 whose inverse is folded into a linear that stays in float, by the linear's name."""
    config = AutoConfig.for_model(**quantized.config)
    found = {}
    for spec in architecture_for(config).all_linears(config):
        if spec.reads is Space.FFN and spec.layer is not None and spec.name not in quantized.linears:
            rotation = quantized.rotations.r4(spec.layer, spec.branch)
            if rotation is not None:
                found[spec.name] = rotation
    return found


def _tensor(values: Tensor, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """``values`` as they are stored. torch has no 4-bit dtype, so int4 goes through numpy's, which onnx_ir packs."""
    if dtype == ir.DataType.INT4:
        return ir.tensor(values.numpy().astype(dtype.numpy()), dtype=dtype, name=name)
    return ir.tensor(values, dtype=dtype, name=name)


def _scale_for_kn(linear: QuantizedLinear) -> Tensor:
    """Scales of a ``[K, N]`` weight: ``[]``, ``[N]`` or, blocked along K, ``[ceil(K / size), N]``."""
    return linear.weight_scale.T if isinstance(linear.weight_scheme.granularity, PerBlock) else linear.weight_scale


def _dequantize_attributes(linear: QuantizedLinear) -> Mapping[str, int]:
    match linear.weight_scheme.granularity:
        case PerChannel():
            return {"axis": 1}
        case PerBlock(size):
            return {"axis": 0, "block_size": size}
        case _:
            return {}
