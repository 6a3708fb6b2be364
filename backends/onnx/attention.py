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

_DEPTH = 70.0


def lower_attention(model: ir.Model) -> None:
    """Replace every attention placeholder of ``model``, in place."""
    masks = Masks(model.graph)
    for placeholder in attention_placeholders(model.graph):
        nodes = tape.Tape()
        replace(
            model.graph,
            placeholder.node,
            nodes,
            attention(model.graph, nodes, placeholder, placeholder.inputs, masks.of(placeholder)),
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
    query, key, value = inputs
    heads, kv_heads, dtype = placeholder.heads, placeholder.kv_heads, placeholder.dtype

    def op(kind: str, inputs: list[ir.Value], label: str, **attributes: Attribute) -> ir.Value:
        return builder.op(kind, inputs, attributes, name=f"{placeholder.name}/{label}")

    def scalar(label: str, number: float) -> ir.Value:
        return constant(
            graph, f"attention.{label}.{number!r}.{dtype.name}", np.array(number, dtype.numpy())
        )

    grouped = heads != kv_heads
    width = size(placeholder.inputs[2], 3)
    if grouped:
        query = op(
            "Reshape",
            [query, integers(graph, (0, kv_heads, -1, size(placeholder.inputs[0], 3)))],
            "Group",
        )
    keys = op(
        "Transpose",
        [op("Mul", [key, scalar("scale", placeholder.scale)], "Scale")],
        "Keys",
        perm=[0, 1, 3, 2],
    )
    scores = op("MatMul", [query, keys], "Scores")
    if grouped:
        apart = op(
            "Concat",
            [integers(graph, (0, heads)), mask.sequence, integers(graph, (-1,))],
            "Heads",
            axis=0,
        )
        scores = op("Reshape", [scores, apart], "Ungroup")
    if placeholder.softcap is not None:
        cap = scalar("cap", placeholder.softcap)
        scores = op("Mul", [op("Tanh", [op("Div", [scores, cap], "Divide")], "Tanh"), cap], "Cap")
    scores = op("Add", [scores, mask.bias], "Mask")
    # what computes in fewer bits is no CPU, and fuses attention without the Max
    if dtype == ir.DataType.FLOAT:
        largest = op("ReduceMax", [scores, integers(graph, (-1,))], "Largest", keepdims=1)
        scores = op(
            "Max", [scores, op("Sub", [largest, scalar("depth", _DEPTH)], "Least")], "Clamp"
        )
    weights = op("Softmax", [scores], "Softmax", axis=-1)
    if grouped:
        together = op("Concat", [integers(graph, (0, kv_heads, -1)), mask.total], "Groups", axis=0)
        weights = op("Reshape", [weights, together], "Regroup")
    mixed = op("MatMul", [weights, value], "Values")
    if grouped:
        mixed = op("Reshape", [mixed, integers(graph, (0, heads, -1, width))], "Split")
    return op("Transpose", [mixed], "Output", perm=[0, 2, 1, 3])


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None  # a placeholder has all its inputs
    return value
