"""``rotq::Attention`` as standard operators.

    q [B, heads, S, d], k and v [B, kv_heads, T, d], mask bool [B, 1, S, T], heads = kv_heads * G

    q -> Reshape [B, kv_heads, G S, d] -> MatMul (scale * k^T) -> Reshape [B, heads, S, T] -> (cap)
      -> Add bias -> Max with the row's largest - 70 -> Softmax -> Reshape [B, kv_heads, G S, T] ->
      MatMul v -> Reshape [B, heads, S, d] -> Transpose [B, S, heads, d]

The G query heads that share a key head are rows of one product, so keys and values are never
expanded to all heads, and the Reshapes move no data. On a CPU this was faster than every attention
operator that returns a longer cache, fused or standard, and every runtime takes it.

The Max changes no weight by more than e^-70 = 4e-31, which is far below what float32 resolves.
Without it the weights of keys that are not seen, or hardly, come out of a CPU's exponential as
denormal numbers, on which the product with v is up to 100 times slower.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from backends.onnx.nodes import Attribute, constant, integers, replace, size
from backends.onnx.placeholders import ATTENTION, DOMAIN, SCALE_ATTRIBUTE, SOFTCAP_ATTRIBUTE
from backends.onnx.prefix import Constants, constants
from calib.artifact import Prefix

_DEPTH = 70.0


def lower_attention(
    model: ir.Model, prefix: Prefix | None = None, *, branches: bool = False
) -> None:
    """Replace every attention placeholder of ``model``, in place.

    Args:
        model: a traced graph.
        prefix: keys and values that stand before those of every layer.
        branches: whether the graph may choose how to join them, by the number of its queries
            (:mod:`backends.onnx.prefix`).
    """
    graph = model.graph
    masks = Masks(graph, 0 if prefix is None else prefix.length)
    for layer, placeholder in enumerate(attention_placeholders(graph)):
        nodes, mask = tape.Tape(), masks.of(placeholder)
        if prefix is None:
            mixed = attention(graph, nodes, placeholder, placeholder.inputs, mask)
        else:
            before = constants(graph, prefix, layer, placeholder.dtype, placeholder.scale)
            mixed = _behind_prefix(graph, nodes, placeholder, mask, before, branches)
        replace(graph, placeholder.node, nodes, mixed)


def _behind_prefix(
    graph: ir.Graph,
    builder: tape.Tape,
    placeholder: AttentionPlaceholder,
    mask: Mask,
    before: Constants,
    branches: bool,
) -> ir.Value:
    """Keys and values joined; scores joined in their place where there is one query."""
    query, key, value = placeholder.inputs
    many = tape.Tape() if branches else builder
    cached = before.in_front(many, placeholder.name, mask.rows, key, value)
    mixed = attention(graph, many, placeholder, (query, *cached), mask)
    if not branches:
        return mixed

    one = tape.Tape()
    alone = _attention_of_one(graph, one, placeholder, mask, before)
    return builder.op(
        "If",
        [mask.single],
        {
            "then_branch": ir.Graph([], [alone], nodes=one.nodes, name=f"{placeholder.name}/One"),
            "else_branch": ir.Graph([], [mixed], nodes=many.nodes, name=f"{placeholder.name}/More"),
        },
        name=f"{placeholder.name}/If",
    )


@dataclass(frozen=True)
class AttentionPlaceholder:
    """One placeholder.

    Attributes:
        name: of its nodes.
        node: the placeholder.
        inputs: queries, keys and values.
        mask: see :mod:`backends.onnx.placeholders`.
        scale: of the scores.
        softcap: of the scores, ``c tanh(s / c)``; ``None``: as they are.
    """

    name: str
    node: ir.Node
    inputs: tuple[ir.Value, ir.Value, ir.Value]
    mask: ir.Value
    scale: float
    softcap: float | None

    @property
    def dtype(self) -> ir.DataType:
        """Of queries, keys and values."""
        dtype = self.inputs[0].dtype
        assert dtype is not None
        return dtype

    @property
    def heads(self) -> int:
        """Heads of the queries."""
        return size(self.inputs[0], 1)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return size(self.inputs[1], 1)


def attention_placeholders(graph: ir.Graph) -> list[AttentionPlaceholder]:
    """The attention placeholders of ``graph``, in order."""
    placeholders = []
    for index, node in enumerate(
        [n for n in graph if (n.domain, n.op_type) == (DOMAIN, ATTENTION)]
    ):
        query, key, value, mask = (_given(node, place) for place in range(4))
        cap = node.attributes.get(SOFTCAP_ATTRIBUTE)
        scale = node.attributes[SCALE_ATTRIBUTE].as_float()
        softcap = None if cap is None else cap.as_float()
        placeholders.append(
            AttentionPlaceholder(
                f"attention.{index}", node, (query, key, value), mask, scale, softcap
            )
        )
    return placeholders


@dataclass(frozen=True)
class Mask:
    """What the layers that share a mask share.

    Attributes:
        bias: ``[B, 1, S, p + T]``, added to scores; p keys of a prefix are seen by all.
        single: bool, whether S is 1.
        rows: ``[4]``, B and three ones.
        parts: ``[2]``, p and T.
    """

    bias: ir.Value
    single: ir.Value
    rows: ir.Value
    parts: ir.Value


class Masks:
    """The masks of a graph, each made where the first layer needs it.

    Args:
        graph: gets them.
        prefix: p, the number of keys before those of the text.
    """

    def __init__(self, graph: ir.Graph, prefix: int = 0) -> None:
        self._graph = graph
        self._prefix = prefix
        self._made: dict[str | None, Mask] = {}

    def of(self, placeholder: AttentionPlaceholder) -> Mask:
        """The mask of ``placeholder``."""
        name = placeholder.mask.name
        if name not in self._made:
            builder = tape.Tape()
            self._made[name] = self._make(builder, placeholder.mask, placeholder.dtype)
            self._graph.insert_before(placeholder.node, list(builder.nodes))
        return self._made[name]

    def _make(self, builder: tape.Tape, mask: ir.Value, dtype: ir.DataType) -> Mask:
        # Half of the smallest number: added to a score it stays finite. With -inf, the row of a
        # padded query, which sees no key, would become NaN and spread through its values.
        lowest = float(np.finfo(dtype.numpy()).min) / 2
        hidden = constant(
            self._graph, f"attention.hidden.{dtype.name}", np.array(lowest, dtype.numpy())
        )
        visible = constant(self._graph, f"attention.seen.{dtype.name}", np.array(0, dtype.numpy()))

        bias = builder.op("Where", [mask, visible, hidden], name=f"{mask.name}/Bias")
        batch, sequence, text = (
            builder.op(
                "Shape", [mask], {"start": axis, "end": axis + 1}, name=f"{mask.name}/{name}"
            )
            for axis, name in ((0, "Batch"), (2, "Sequence"), (3, "Total"))
        )
        is_one = builder.op(
            "Equal", [sequence, integers(self._graph, (1,))], name=f"{mask.name}/IsOne"
        )
        if self._prefix:
            pads = integers(self._graph, (0, 0, 0, self._prefix, 0, 0, 0, 0))
            bias = builder.op("Pad", [bias, pads], name=f"{mask.name}/WithPrefix")

        def joined(parts: list[ir.Value], label: str) -> ir.Value:
            return builder.op("Concat", parts, {"axis": 0}, name=f"{mask.name}/{label}")

        return Mask(
            bias=bias,
            single=builder.op("Squeeze", [is_one], name=f"{mask.name}/Single"),
            rows=joined([batch, integers(self._graph, (1, 1, 1))], "Rows"),
            parts=joined([integers(self._graph, (self._prefix,)), text], "Parts"),
        )


def attention(
    graph: ir.Graph,
    builder: tape.Tape,
    placeholder: AttentionPlaceholder,
    inputs: tuple[ir.Value, ir.Value, ir.Value],
    mask: Mask,
) -> ir.Value:
    """The nodes of ``placeholder``, appended to ``builder``.

    Args:
        graph: gets the constants.
        builder: gets the nodes.
        placeholder: says how.
        inputs: queries, keys and values.
        mask: of the placeholder.

    Returns:
        ``[B, S, heads, d]``.
    """
    nodes = _Nodes(graph, builder, placeholder)
    query, key, value = inputs

    scores = nodes.products(nodes.grouped_queries(query), key)
    if nodes.is_grouped:
        dims = integers(graph, (0, placeholder.heads, -1, 0))
        scores = nodes.op("Reshape", [scores, dims], "Ungroup")

    weights = nodes.weights(nodes.op("Add", [nodes.capped(scores), mask.bias], "Mask"))
    if nodes.is_grouped:
        dims = integers(graph, (0, placeholder.kv_heads, -1, 0))
        weights = nodes.op("Reshape", [weights, dims], "Regroup")

    return nodes.output(nodes.op("MatMul", [weights, value], "Values"))


def _attention_of_one(
    graph: ir.Graph,
    builder: tape.Tape,
    placeholder: AttentionPlaceholder,
    mask: Mask,
    before: Constants,
) -> ir.Value:
    """The same for one query, S = 1, its scores joined with those of a prefix.

    Heads of a group stay rows of one product: a mask of one row fits them all.
    """
    nodes = _Nodes(graph, builder, placeholder)
    query, key, value = placeholder.inputs
    query = nodes.grouped_queries(query)

    parts = [nodes.op("MatMul", [query, before.scaled], "PrefixScores"), nodes.products(query, key)]
    scores = nodes.op("Concat", parts, "Together", axis=-1)
    weights = nodes.weights(nodes.op("Add", [nodes.capped(scores), mask.bias], "Mask"))

    first, rest = builder.op_multi_out(
        "Split",
        [weights, mask.parts],
        {"axis": -1},
        num_outputs=2,
        name=f"{placeholder.name}/Parted",
    )
    mixed = nodes.op(
        "Add",
        [
            nodes.op("MatMul", [rest, value], "Values"),
            nodes.op("MatMul", [first, before.values], "PrefixValues"),
        ],
        "Sum",
    )
    dims = integers(graph, (0, 1, placeholder.heads, size(placeholder.inputs[2], 3)))
    return nodes.op("Reshape", [mixed, dims], "Output")


@dataclass(frozen=True)
class _Nodes:
    """The steps of one attention. Where query heads share a key head, they are its rows."""

    graph: ir.Graph
    builder: tape.Tape
    placeholder: AttentionPlaceholder

    def op(
        self, kind: str, inputs: list[ir.Value], label: str, **attributes: Attribute
    ) -> ir.Value:
        """A node, named after the placeholder and ``label``."""
        return self.builder.op(kind, inputs, attributes, name=f"{self.placeholder.name}/{label}")

    def scalar(self, label: str, number: float) -> ir.Value:
        """A constant in the dtype of the scores, held once."""
        dtype = self.placeholder.dtype
        name = f"attention.{label}.{number!r}.{dtype.name}"
        return constant(self.graph, name, np.array(number, dtype.numpy()))

    @property
    def is_grouped(self) -> bool:
        """Whether query heads share key heads."""
        return self.placeholder.heads != self.placeholder.kv_heads

    def grouped_queries(self, query: ir.Value) -> ir.Value:
        """``[B, heads, S, d]`` to ``[B, kv_heads, G S, d]``."""
        if not self.is_grouped:
            return query
        dims = (0, self.placeholder.kv_heads, -1, size(self.placeholder.inputs[0], 3))
        return self.op("Reshape", [query, integers(self.graph, dims)], "Group")

    def products(self, query: ir.Value, key: ir.Value) -> ir.Value:
        """``q (s k)^T``, ``[B, kv_heads, G S, T]``."""
        scale = self.scalar("scale", self.placeholder.scale)
        scaled = self.op("Mul", [key, scale], "Scale")
        keys = self.op("Transpose", [scaled], "Keys", perm=[0, 1, 3, 2])
        return self.op("MatMul", [query, keys], "Scores")

    def capped(self, scores: ir.Value) -> ir.Value:
        """``cap(s)``."""
        if self.placeholder.softcap is None:
            return scores
        cap = self.scalar("cap", self.placeholder.softcap)
        quotient = self.op("Div", [scores, cap], "Divide")
        return self.op("Mul", [self.op("Tanh", [quotient], "Tanh"), cap], "Cap")

    def weights(self, scores: ir.Value) -> ir.Value:
        """Their softmax, without denormal numbers on a CPU."""
        # what computes in fewer bits is no CPU, and fuses attention without the Max
        if self.placeholder.dtype == ir.DataType.FLOAT:
            axis = integers(self.graph, (-1,))
            largest = self.op("ReduceMax", [scores, axis], "Largest", keepdims=1)
            least = self.op("Sub", [largest, self.scalar("depth", _DEPTH)], "Least")
            scores = self.op("Max", [scores, least], "Clamp")
        return self.op("Softmax", [scores], "Softmax", axis=-1)

    def output(self, mixed: ir.Value) -> ir.Value:
        """``[B, S, heads, d]``."""
        if self.is_grouped:
            dims = (0, self.placeholder.heads, -1, size(self.placeholder.inputs[2], 3))
            mixed = self.op("Reshape", [mixed, integers(self.graph, dims)], "Split")
        return self.op("Transpose", [mixed], "Output", perm=[0, 2, 1, 3])


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None  # a placeholder has all its inputs
    return value
