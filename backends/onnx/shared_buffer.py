"""Keys and values in one buffer that every run writes into.

    past_key_values.i  [B, kv_heads, C, d]  a buffer with room for C >= T tokens, T of which the
    attention mask counts present.i          [B, kv_heads, C, d]  the same with the S new tokens
    behind the T - S that were there

A runtime that binds both to one memory, as onnxruntime-genai does, never copies the cache. The new
tokens get there by TensorScatter, which then writes in place, and attention reads the first T
tokens of it:

    present = TensorScatter(past, new, T - S);  K = present[:, :, :T]

A runtime that cannot share memory, as onnxruntime-genai where it searches with several beams, hands
over T - S rows. Then C < T, and there they are appended, ``present = [past, new]``.

The slice is a copy. One token at a time it costs more than the rest of attention, and
com.microsoft:: GroupQueryAttention, which appends by itself and reads the buffer where it lies, is
faster; with more tokens it is slower, and wrong for several rows behind a past. So the cache of a
layer whose heads it takes, in float and of a multiple of 8, gets both, and the graph chooses:

    If S == 1:  GroupQueryAttention(q, k, v, past, T, bias)
    else:       TensorScatter, Slice and the attention of :mod:`backends.onnx.attention`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import tape

from backends.onnx.attention import (
    AttentionPlaceholder,
    Mask,
    Masks,
    attention,
    attention_placeholders,
)
from backends.onnx.cache_length import TOKENS, appends, count_by_mask
from backends.onnx.feeds import CACHE, CAPACITY
from backends.onnx.nodes import Attribute, integers, replace, size
from backends.onnx.residual import MICROSOFT
from backends.onnx.rotary import ROTARY_EMBEDDING

SCATTER_OPSET = 24
"""The first with TensorScatter."""
_HEAD_STEP = 8
"""Sizes of heads that GroupQueryAttention takes are multiples of it."""
_TO_HEADS = (0, 2, 1, 3)
"""The permutation between ``[B, S, heads, d]`` and ``[B, heads, S, d]``; its own inverse."""


def share_buffer(model: ir.Model, *, single: bool = True) -> None:
    """Let ``model`` write into its past, and lower the attention of every layer whose cache is in
    float, in place.

    The attention of other layers is left to :func:`backends.onnx.attention.lower_attention`.

    Args:
        model: a traced graph.
        single: give one token at a time to GroupQueryAttention; it sees nothing but the buffer, and
            so no prefix.
    """
    graph = model.graph
    lengths = _lengths(graph)
    masks = Masks(graph)
    appended = {id(node.outputs[0]): node for node in graph if appends(node)}

    for placeholder in attention_placeholders(graph):
        key, value = (appended.get(id(each)) for each in placeholder.inputs[1:])
        takes = single and _known_to_kernel(placeholder)
        if takes and key is not None and value is not None:
            _choose(graph, placeholder, (key, value), masks.of(placeholder), lengths)
            del appended[id(key.outputs[0])], appended[id(value.outputs[0])]

    for node in appended.values():
        _scatter(graph, node, lengths)
    graph.opset_imports[""] = SCATTER_OPSET
    graph.opset_imports[MICROSOFT] = 1


def _known_to_kernel(placeholder: AttentionPlaceholder) -> bool:
    """Whether GroupQueryAttention takes heads of this size."""
    sizes = {size(x, 3) for x in placeholder.inputs}
    return len(sizes) == 1 and sizes.pop() % _HEAD_STEP == 0


@dataclass(frozen=True)
class _Lengths:
    """What the layers share.

    Attributes:
        total: ``[1]``, T.
        start: ``[B]``, T - S, where the new tokens go.
        last: int32 ``[B]``, T - 1.
        count: int32, T.
        single: bool, whether S is 1.
        roomy: bool, whether C >= T.
    """

    total: ir.Value
    start: ir.Value
    last: ir.Value
    count: ir.Value
    single: ir.Value
    roomy: ir.Value


def _lengths(graph: ir.Graph) -> _Lengths:
    """Also lets whatever asked a cache for its length count the mask instead."""
    inputs_by_name = {value.name: value for value in graph.inputs}
    builder = tape.Tape()

    def op(kind: str, inputs: Sequence[ir.Value], label: str, **attributes: Attribute) -> ir.Value:
        return builder.op(kind, list(inputs), attributes, name=f"kv_buffer/{label}")

    rows = op("Shape", [inputs_by_name["input_ids"]], "Rows", start=0, end=1)
    sequence = op("Shape", [inputs_by_name["input_ids"]], "Sequence", start=1, end=2)
    total = op("Shape", [inputs_by_name["attention_mask"]], "Total", start=1, end=2)
    before = op("Sub", [total, sequence], "Before")
    # a buffer is as long as its room: what asks it for its length would get that
    count_by_mask(graph, before)
    buffer = next(value for value in graph.inputs if str(value.name).startswith(CACHE))
    capacity = op("Shape", [buffer], "Capacity", start=TOKENS, end=TOKENS + 1)
    last = op("Sub", [total, integers(graph, (1,))], "Last")
    lengths = _Lengths(
        total=total,
        start=op("Expand", [before, rows], "Start"),
        last=op(
            "Cast", [op("Expand", [last, rows], "Lasts")], "Lasts32", to=int(ir.DataType.INT32)
        ),
        count=op("Squeeze", [op("Cast", [total], "Total32", to=int(ir.DataType.INT32))], "Count"),
        roomy=op("Squeeze", [op("GreaterOrEqual", [capacity, total], "HasRoom")], "Roomy"),
        single=op("Squeeze", [op("Equal", [sequence, integers(graph, (1,))], "IsOne")], "Single"),
    )

    graph.insert_before(next(iter(graph)), list(builder.nodes))
    return lengths


def _scatter(graph: ir.Graph, concat: ir.Node, lengths: _Lengths) -> None:
    """What read the longer cache reads the tokens of the buffer."""
    past, new, old = *concat.inputs, concat.outputs[0]
    assert past is not None
    assert new is not None
    builder = tape.Tape()
    present, tokens = _written(graph, builder, past, new, lengths, str(old.name))
    tokens.shape, tokens.type = old.shape, old.type
    graph.insert_before(concat, list(builder.nodes))
    _becomes_output(graph, present, old)
    ir.convenience.replace_all_uses_with(old, tokens)
    graph.remove(concat, safe=True)
    _hold_buffer(past, present)


def _written(
    graph: ir.Graph, builder: tape.Tape, past: ir.Value, new: ir.Value, lengths: _Lengths, name: str
) -> tuple[ir.Value, ir.Value]:
    """The buffer with ``new`` in it, and the tokens that it then holds."""
    inside, behind = tape.Tape(), tape.Tape()
    buffer = inside.op(
        "TensorScatter", [past, new, lengths.start], {"axis": TOKENS}, name=f"{name}/Write"
    )
    bounds = [integers(graph, (0,)), lengths.total, integers(graph, (TOKENS,))]
    tokens = inside.op("Slice", [buffer, *bounds], name=f"{name}/Tokens")

    longer = behind.op("Concat", [past, new], {"axis": TOKENS}, name=f"{name}/Append")
    same = behind.op("Identity", [longer], name=f"{name}/All")
    branches = {
        "then_branch": _branch(inside, [buffer, tokens], f"{name}/Inside"),
        "else_branch": _branch(behind, [longer, same], f"{name}/Behind"),
    }
    present, held = builder.op_multi_out(
        "If", [lengths.roomy], branches, num_outputs=2, name=f"{name}/If"
    )
    return present, held


def _becomes_output(graph: ir.Graph, value: ir.Value, old: ir.Value) -> None:
    """Put ``value`` in the place of ``old`` among the outputs of ``graph``."""
    name = old.name
    value.type, old.name, value.name = old.type, f"{name}/Grown", name
    graph.outputs[graph.outputs.index(old)] = value


def _hold_buffer(past: ir.Value, present: ir.Value) -> None:
    assert past.shape is not None
    past.shape = ir.Shape([past.shape[0], past.shape[1], CAPACITY, past.shape[3]])
    present.shape = past.shape


@dataclass(frozen=True)
class _Layer:
    """The attention of one layer.

    Attributes:
        placeholder: its placeholder.
        inputs: queries, and the new keys and values, ``[B, S, heads d]``.
        pasts: the buffers of keys and values.
        mask: of the placeholder.
        lengths: of the graph.
    """

    placeholder: AttentionPlaceholder
    inputs: tuple[ir.Value, ir.Value, ir.Value]
    pasts: tuple[ir.Value, ir.Value]
    mask: Mask
    lengths: _Lengths


def _choose(
    graph: ir.Graph,
    placeholder: AttentionPlaceholder,
    concats: tuple[ir.Node, ir.Node],
    mask: Mask,
    lengths: _Lengths,
) -> None:
    """The attention of a layer in both ways, behind an If."""
    builder = tape.Tape()

    # queries, and keys and values of the new tokens alone, as both branches take them
    news = [concat.inputs[1] for concat in concats]
    query, key, value = (
        _flat(graph, builder, each) for each in (placeholder.inputs[0], *news) if each is not None
    )
    key_past, value_past = (concat.inputs[0] for concat in concats)
    assert key_past is not None
    assert value_past is not None

    layer = _Layer(placeholder, (query, key, value), (key_past, value_past), mask, lengths)
    mixed, *presents = builder.op_multi_out(
        "If",
        [lengths.single],
        {"then_branch": _single(layer), "else_branch": _several(graph, layer)},
        num_outputs=3,
        name=f"{placeholder.name}/If",
    )

    # the placeholder gave heads apart; where they are joined right behind it, they never come apart
    shape = integers(graph, (0, 0, placeholder.heads, size(placeholder.inputs[2], 3)))
    readers = [node for node in placeholder.node.outputs[0].consumers() if _joins(node)]
    replace(
        graph,
        placeholder.node,
        builder,
        builder.op("Reshape", [mixed, shape], name=f"{placeholder.name}/Apart"),
    )
    for reader in readers:
        mixed.shape, mixed.type = reader.outputs[0].shape, reader.outputs[0].type
        ir.convenience.replace_all_uses_with(reader.outputs[0], mixed)

    for past, present, concat in zip((key_past, value_past), presents, concats, strict=True):
        _becomes_output(graph, present, concat.outputs[0])
        _hold_buffer(past, present)


def _flat(graph: ir.Graph, builder: tape.Tape, x: ir.Value) -> ir.Value:
    """``x [B, heads, S, d]`` as ``[B, S, heads d]``; as it was, where its heads have only just been
    taken apart.
    """
    node = x.producer()
    if node is not None and node.op_type == ROTARY_EMBEDDING:
        inner = _joined(node.inputs[0])
        if inner is not None:
            inputs, attributes = [inner, *node.inputs[1:]], dict(node.attributes)
            return builder.op(ROTARY_EMBEDDING, inputs, attributes, name=f"{node.name}/Joined")

    inner = _joined(x)
    if inner is not None:
        return inner

    turned = builder.op("Transpose", [x], {"perm": list(_TO_HEADS)}, name=f"{x.name}/Turned")
    return builder.op(
        "Reshape",
        [turned, integers(graph, (0, 0, size(x, 1) * size(x, 3)))],
        name=f"{x.name}/Joined",
    )


def _joined(x: ir.Value | None) -> ir.Value | None:
    """``y [B, S, heads d]`` where ``x`` is Transpose(Reshape(y)) of it."""
    turned = None if x is None else x.producer()
    if (
        turned is None
        or turned.op_type != "Transpose"
        or tuple(turned.attributes["perm"].as_ints()) != _TO_HEADS
    ):
        return None

    apart = None if turned.inputs[0] is None else turned.inputs[0].producer()
    if apart is None or apart.op_type != "Reshape":
        return None

    joint = apart.inputs[0]
    return (
        joint
        if joint is not None and joint.shape is not None and len(joint.shape) == len(_TO_HEADS) - 1
        else None
    )


def _joins(node: ir.Node) -> bool:
    """Whether ``node`` makes ``[B, S, heads d]`` of ``[B, S, heads, d]``."""
    shape = node.outputs[0].shape
    return node.op_type == "Reshape" and shape is not None and len(shape) == len(_TO_HEADS) - 1


def _single(layer: _Layer) -> ir.Graph:
    """One token, by GroupQueryAttention."""
    placeholder, lengths, builder = layer.placeholder, layer.lengths, tape.Tape()
    attributes = {
        "num_heads": placeholder.heads,
        "kv_num_heads": placeholder.kv_heads,
        "scale": placeholder.scale,
    }
    if placeholder.softcap is not None:
        attributes["softcap"] = placeholder.softcap
    outputs = builder.op_multi_out(
        "GroupQueryAttention",
        [
            *layer.inputs,
            *layer.pasts,
            lengths.last,
            lengths.count,
            None,
            None,
            None,
            layer.mask.bias,
        ],
        attributes,
        domain=MICROSOFT,
        num_outputs=3,
        name=f"{placeholder.name}/Single",
    )

    return _branch(builder, outputs, f"{placeholder.name}/One")


def _several(graph: ir.Graph, layer: _Layer) -> ir.Graph:
    """Several tokens, by standard operators."""
    placeholder, builder = layer.placeholder, tape.Tape()

    def apart(x: ir.Value, like: ir.Value, label: str) -> ir.Value:
        dims = integers(graph, (0, 0, size(like, 1), size(like, 3)))
        split = builder.op("Reshape", [x, dims], name=f"{placeholder.name}/{label}Apart")
        return builder.op(
            "Transpose",
            [split],
            {"perm": list(_TO_HEADS)},
            name=f"{placeholder.name}/{label}Turned",
        )

    query, *new = (
        apart(x, like, label)
        for x, like, label in zip(
            layer.inputs, placeholder.inputs, ("Query", "Key", "Value"), strict=True
        )
    )
    written = [
        _written(graph, builder, past, x, layer.lengths, f"{placeholder.name}/{label}")
        for past, x, label in zip(layer.pasts, new, ("Key", "Value"), strict=True)
    ]
    (_, keys), (_, values) = written
    mixed = attention(graph, builder, placeholder, (query, keys, values), layer.mask)
    width = integers(graph, (0, 0, placeholder.heads * size(placeholder.inputs[2], 3)))
    joined = builder.op("Reshape", [mixed, width], name=f"{placeholder.name}/Joined")
    return _branch(
        builder, [joined, *(present for present, _ in written)], f"{placeholder.name}/More"
    )


def _branch(builder: tape.Tape, outputs: Sequence[ir.Value], name: str) -> ir.Graph:
    return ir.Graph([], list(outputs), nodes=builder.nodes, name=name)
