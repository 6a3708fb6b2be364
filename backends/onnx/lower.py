"""Lowering: each ``rotq::Linear`` placeholder of a traced graph becomes standard operators and
initializers.

A quantized linear with an online rotation R, an act-order and a short last block, all of them rare
together:

    x -> [Reshape, MatMul(H_k)]* -> QuantizeLinear -> DequantizeLinear -> Gather(order) -> Pad ->
    Add(0) -+ W_q [K, N] -> DequantizeLinear
    -------------------------------------------------------------------- MatMul -> Add(b)

:mod:`backends.onnx.rotate`, :mod:`backends.onnx.inputs` and :mod:`backends.onnx.weights` make the
parts. What follows the DequantizeLinear of the input is there where it has to be:

* a Gather, where the columns of the weight follow an order of their own (GPTQ's act-order);
* a Pad, where the target takes whole blocks only. TensorRT takes the size of a block to be K over
  the number of scales, and so would put the scales of a short last block on other rows;
* an addition of a vector of zeros, the *barrier*, where the target has no kernel for the two
  formats. Without it ONNX Runtime dequantizes the weight on every run, or makes a kernel that
  fails, and TensorRT fails to build. Behind it the weight is that of a weight-only linear. ONNX
  Runtime drops a scalar zero, and so would merge the two again.

An int8 input is stored as q or as q + 128, whichever the target multiplies
(:mod:`backends.onnx.inputs`), and so is an int8 weight (:mod:`backends.onnx.weights`). Linears that
read one value become one MatMul where the target gains by it (:mod:`backends.onnx.packing`). A
linear in float is rotated as well, and multiplied as it is. An output head that holds the numbers
of the embedding reads the embedding's initializer, turned, which runtimes do once, when they load
the graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import tape
from torch import Tensor

from backends.base import Int8Weights
from backends.onnx.inputs import TRT, pad_features, quantized_input
from backends.onnx.linear_nodes import LinearNodes
from backends.onnx.names import SHARED_BARRIER, Label, Part, initializer_name, node_name
from backends.onnx.nodes import replace
from backends.onnx.packing import packed, packs
from backends.onnx.placeholders import DOMAIN, LINEAR, MODULE_ATTRIBUTE
from backends.onnx.rotate import rotate, rotations_before_float
from backends.onnx.target import Target
from backends.onnx.weights import dequantized_weight, padded_width
from calib.architectures import wiring_of
from calib.artifact import QuantizedLinear, QuantizedModel
from calib.errors import BackendError
from calib.schemes import FLOAT4, LinearScheme

LEAST_OPSET = 21
"""The first with INT4, float8 and blocks in DequantizeLinear."""
FLOAT4_OPSET = 23
"""The first with FLOAT4E2M1. What a trace at opset 21 uses means the same there: only types were
added.
"""
_FLOAT4_IR_VERSION = 11


def lower(
    model: ir.Model,
    quantized: QuantizedModel,
    target: Target,
    *,
    int8_weights: Int8Weights = "auto",
) -> None:
    """Replace every linear's placeholder of ``model``, in place, by the linear it stands for.

    Args:
        model: a traced graph.
        quantized: what its placeholders name.
        target: what it is for.
        int8_weights: how those are stored that it multiplies as integers; see
            :class:`~backends.base.WriteOptions`.

    Raises:
        BackendError: a placeholder names a linear that the artifact does not hold, a scale vanishes
            in the dtype of the graph, or the graph's opset is too old for quantized weights.
    """
    opset = model.graph.opset_imports[""]
    if quantized.linears and opset < LEAST_OPSET:
        raise BackendError(
            f"opset {opset} cannot express quantized weights",
            hint=f"use opset {LEAST_OPSET} or a newer one",
        )

    _Lowering(model.graph, quantized, target, int8_weights).run()
    if any(linear.weight_scheme.format == FLOAT4 for linear in quantized.linears.values()):
        model.graph.opset_imports[""] = max(opset, FLOAT4_OPSET)
        model.ir_version = max(model.ir_version, _FLOAT4_IR_VERSION)
    if any(node.domain == TRT for node in model.graph):
        model.graph.opset_imports[TRT] = 1


class _Lowering:
    """One pass over one graph. Holds what the linears of a graph share."""

    def __init__(
        self,
        graph: ir.Graph,
        quantized: QuantizedModel,
        target: Target,
        int8_weights: Int8Weights,
    ) -> None:
        self.graph = graph
        self.quantized = quantized
        self.target = target
        self.int8_weights = int8_weights
        self._rotated: dict[tuple[int, str], ir.Value] = {}
        self._before_float = rotations_before_float(quantized)

    def run(self) -> None:
        open_nodes = [
            node for node in self.graph if (node.domain, node.op_type) == (DOMAIN, LINEAR)
        ]
        for together in (
            self._packs(open_nodes) if self.target.packs else [[node] for node in open_nodes]
        ):
            if len(together) > 1:
                self._replace_pack(together)
            else:
                self._replace(together[0])

    def _packs(self, placeholders: Sequence[ir.Node]) -> list[list[ir.Node]]:
        """Placeholders by the MatMul that they become, in the order of the first of each."""
        readers: dict[int, list[ir.Node]] = {}
        for node in placeholders:
            readers.setdefault(id(_input(node)), []).append(node)

        groups: list[list[ir.Node]] = []
        for together in readers.values():
            by_name = {_module(node): node for node in together}
            linears = [
                self.quantized.linears[name] for name in by_name if name in self.quantized.linears
            ]
            groups += [[by_name[linear.name] for linear in pack] for pack in packs(linears)]
            groups += [
                [node] for name, node in by_name.items() if name not in self.quantized.linears
            ]

        return groups

    def _replace_pack(self, together: Sequence[ir.Node]) -> None:
        """The linears as one, in place of the first; the others take their part of its outputs."""
        linears = [self.quantized.linears[_module(node)] for node in together]
        pack = packed(linears)
        nodes = LinearNodes(self.graph, pack.name, self.quantized.dtype)
        product = self._batched(
            nodes, _input(together[0]), pack, [linear.weight for linear in linears]
        )
        sizes = nodes.integers([len(linear.weight) for linear in linears])
        parts = nodes.split(product, sizes, len(linears))
        for node, part in zip(together, parts, strict=True):
            replace(self.graph, node, nodes.tape if node is together[0] else tape.Tape(), part)

    def _replace(self, node: ir.Node) -> None:
        name, x = _module(node), _input(node)
        nodes = LinearNodes(self.graph, name, self.quantized.dtype)
        linear = self.quantized.linears.get(name)
        if linear is not None:
            output = self._batched(nodes, x, linear, [linear.weight])
        elif f"{name}.weight" in self.quantized.floats:
            output = self._float_linear(nodes, x)
        else:
            raise BackendError(
                f"the artifact holds no weights for the linear '{name}'",
                hint="run `rotq calibrate` again",
            )
        replace(self.graph, node, nodes.tape, output)

    def _batched(
        self, nodes: LinearNodes, x: ir.Value, linear: QuantizedLinear, weights: Sequence[Tensor]
    ) -> ir.Value:
        """The linear over a value of three dimensions at least; OPT flattens batch and sequence
        before its MLP.

        ONNX Runtime makes a float Gemm of a two-dimensional MatMul and its bias before it looks for
        integer kernels.
        """
        if x.shape is None or len(x.shape) != 2:
            return self._quantized_linear(nodes, x, linear, weights)

        first = nodes.integers([0])
        batched = nodes.op("Unsqueeze", [x, first], Label.UNSQUEEZE)
        batched.shape, batched.type = ir.Shape([1, *x.shape]), x.type

        return nodes.op(
            "Squeeze",
            [self._quantized_linear(nodes, batched, linear, weights), first],
            Label.SQUEEZE,
        )

    def _quantized_linear(
        self, nodes: LinearNodes, x: ir.Value, linear: QuantizedLinear, weights: Sequence[Tensor]
    ) -> ir.Value:
        rows = padded_width(linear, whole_blocks=self.target.whole_blocks)
        scheme = LinearScheme(linear.weight_scheme, linear.input_scheme)
        form = self.target.form(scheme, self.int8_weights)
        if linear.online_rotation is not None:
            x = self._rotated_once(nodes, x, linear.online_rotation)
        if linear.input_scheme is not None:
            x = quantized_input(nodes, x, linear, unsigned=form.unsigned_inputs)
        if linear.weight_order is not None:
            x = self._ordered(nodes, x, linear.weight_order)
        x = pad_features(nodes, x, rows - linear.weight.shape[1])

        if form.barrier:
            x = nodes.op(
                "Add", [x, nodes.filled(SHARED_BARRIER, (rows,), nodes.dtype)], Label.BARRIER
            )

        weight = dequantized_weight(nodes, linear, weights, rows, unsigned=form.unsigned_weights)
        return _product(nodes, x, weight, linear.bias)

    def _rotated_once(self, nodes: LinearNodes, x: ir.Value, rotation: str) -> ir.Value:
        """Linears that read one value behind one rotation share its nodes."""
        key = (id(x), rotation)
        if key not in self._rotated:
            self._rotated[key] = rotate(nodes, x, self.quantized.rotations[rotation])
        return self._rotated[key]

    def _ordered(self, nodes: LinearNodes, x: ir.Value, order: Tensor) -> ir.Value:
        places = nodes.lazy(
            initializer_name(nodes.name, Part.WEIGHT_ORDER),
            order.shape,
            ir.DataType.INT64,
            order.contiguous,
        )
        ordered = nodes.op("Gather", [x, places], Label.ORDER, axis=-1)
        ordered.shape, ordered.type = x.shape, x.type
        return ordered

    def _float_linear(self, nodes: LinearNodes, x: ir.Value) -> ir.Value:
        if nodes.name in self._before_float:
            x = rotate(nodes, x, self._before_float[nodes.name])
        floats = self.quantized.floats
        weight = floats[initializer_name(nodes.name, Part.WEIGHT)]
        stored = self._shared_with_embedding(nodes, weight)
        return _product(
            nodes, x, stored or nodes.weight([weight]), floats.get(f"{nodes.name}.bias")
        )

    def _shared_with_embedding(self, nodes: LinearNodes, weight: Tensor) -> ir.Value | None:
        """The embedding's table as the weight ``[in, out]`` of the output head, where the two hold
        the same numbers; else ``None``.
        """
        wiring = wiring_of(self.quantized.config)
        if nodes.name != wiring.head.name or not self.quantized.repeats_embedding():
            return None
        turned = nodes.tape.op(
            "Transpose",
            [self.graph.initializers[wiring.embeddings[0].weight]],
            {"perm": (1, 0)},
            name=node_name(nodes.name, Label.TURN_WEIGHT),
        )
        turned.shape, turned.type = (
            ir.Shape((weight.shape[1], len(weight))),
            ir.TensorType(nodes.dtype),
        )
        return turned


def _module(placeholder: ir.Node) -> str:
    return placeholder.attributes[MODULE_ATTRIBUTE].as_string()


def _input(placeholder: ir.Node) -> ir.Value:
    x = placeholder.inputs[0]
    assert x is not None  # a placeholder has exactly one input
    return x


def _product(nodes: LinearNodes, x: ir.Value, weight: ir.Value, bias: Tensor | None) -> ir.Value:
    product = nodes.op("MatMul", [x, weight], Label.MATMUL)
    return (
        product
        if bias is None
        else nodes.op("Add", [product, nodes.floats(Part.BIAS, bias)], Label.ADD)
    )
