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
_END = 2**63 - 1
"""Where a Slice ends that goes on to the end."""


def lower_attention(model: ir.Model, prefix: Prefix | None = None) -> None:
    """Replace every attention placeholder of ``model``, in place.

    Args:
        model: a traced graph.
        prefix: keys and values that stand before those of every layer.
    """
    graph = model.graph
    masks = Masks(graph)
    for layer, placeholder in enumerate(attention_placeholders(graph)):
        nodes = tape.Tape()
        before = None if prefix is None else constants(graph, prefix, layer, placeholder.dtype)
        mask = masks.of(placeholder)
        mixed = attention(graph, nodes, placeholder, placeholder.inputs, mask, before)
        replace(graph, placeholder.node, nodes, mixed)


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
        bias: ``[B, 1, S, T]``, added to scores.
        sequence, total: ``[1]``, S and T.
    """

    bias: ir.Value
    sequence: ir.Value
    total: ir.Value


class Masks:
    """The masks of a graph, each made where the first layer needs it."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
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

        return Mask(
            bias=builder.op("Where", [mask, visible, hidden], name=f"{mask.name}/Bias"),
            sequence=builder.op(
                "Shape", [mask], {"start": 2, "end": 3}, name=f"{mask.name}/Sequence"
            ),
            total=builder.op("Shape", [mask], {"start": 3, "end": 4}, name=f"{mask.name}/Total"),
        )


def attention(
    graph: ir.Graph,
    builder: tape.Tape,
    placeholder: AttentionPlaceholder,
    inputs: tuple[ir.Value, ir.Value, ir.Value],
    mask: Mask,
    prefix: Constants | None = None,
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
    nodes = _Nodes(graph, builder, placeholder, mask)
    query, key, value = inputs
    query = nodes.grouped_queries(query)

    scores = nodes.op("Add", [nodes.scores(query, key), mask.bias], "Mask")
    if prefix is not None:
        before = nodes.scores(query, prefix.keys, "Prefix")
        scores = nodes.op("Concat", [before, scores], "Together", axis=-1)

    weights = nodes.weights(scores)
    if prefix is None:
        mixed = nodes.mixed(weights, value, mask.total)
    else:
        zero, cut, end, axis = (
            integers(graph, (number,)) for number in (0, prefix.length, _END, -1)
        )
        first = nodes.op("Slice", [weights, zero, cut, axis], "PrefixWeights")
        rest = nodes.op("Slice", [weights, cut, end, axis], "TextWeights")
        before = nodes.mixed(first, prefix.values, cut, "Prefix")
        mixed = nodes.op("Add", [nodes.mixed(rest, value, mask.total), before], "Sum")

    return nodes.output(mixed)


@dataclass(frozen=True)
class _Nodes:
    """The steps of one attention. Where query heads share a key head, they are its rows."""

    graph: ir.Graph
    builder: tape.Tape
    placeholder: AttentionPlaceholder
    mask: Mask

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

    def scores(self, query: ir.Value, key: ir.Value, label: str = "") -> ir.Value:
        """``cap(q (s k)^T)``, ``[B, heads, S, T]``."""
        placeholder = self.placeholder
        scaled = self.op("Mul", [key, self.scalar("scale", placeholder.scale)], f"{label}Scale")
        keys = self.op("Transpose", [scaled], f"{label}Keys", perm=[0, 1, 3, 2])
        scores = self.op("MatMul", [query, keys], f"{label}Scores")

        if self.is_grouped:
            dims = [
                integers(self.graph, (0, placeholder.heads)),
                self.mask.sequence,
                integers(self.graph, (-1,)),
            ]
            apart = self.op("Concat", dims, f"{label}Heads", axis=0)
            scores = self.op("Reshape", [scores, apart], f"{label}Ungroup")

        if placeholder.softcap is not None:
            cap = self.scalar("cap", placeholder.softcap)
            quotient = self.op("Div", [scores, cap], f"{label}Divide")
            scores = self.op(
                "Mul", [self.op("Tanh", [quotient], f"{label}Tanh"), cap], f"{label}Cap"
            )

        return scores

    def weights(self, scores: ir.Value) -> ir.Value:
        """Their softmax, without denormal numbers on a CPU."""
        # what computes in fewer bits is no CPU, and fuses attention without the Max
        if self.placeholder.dtype == ir.DataType.FLOAT:
            axis = integers(self.graph, (-1,))
            largest = self.op("ReduceMax", [scores, axis], "Largest", keepdims=1)
            least = self.op("Sub", [largest, self.scalar("depth", _DEPTH)], "Least")
            scores = self.op("Max", [scores, least], "Clamp")
        return self.op("Softmax", [scores], "Softmax", axis=-1)

    def mixed(
        self, weights: ir.Value, value: ir.Value, total: ir.Value, label: str = ""
    ) -> ir.Value:
        """The values of ``total`` tokens by their weights, ``[B, kv_heads, G S, d]``."""
        if self.is_grouped:
            dims = [integers(self.graph, (0, self.placeholder.kv_heads, -1)), total]
            together = self.op("Concat", dims, f"{label}Groups", axis=0)
            weights = self.op("Reshape", [weights, together], f"{label}Regroup")
        return self.op("MatMul", [weights, value], f"{label}Values")

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
