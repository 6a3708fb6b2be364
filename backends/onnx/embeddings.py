"""Quantized embeddings, in one of two forms.

Rows are gathered as integers and then dequantized, so that a run touches the rows of its tokens
alone:

    table int8 [V, h], ids -> Gather -> Cast -+
    scale [V],         ids -> Gather ------- Mul

TensorRT takes an integer constant in front of a DequantizeLinear only, and fuses what follows:

    table int8 [V, h], scale [V] -> DequantizeLinear axis 0 -> Gather ids
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tape
from torch import Tensor

from backends.base import Reason
from backends.onnx.names import Part, initializer_name
from backends.onnx.nodes import integers, replace
from calib.artifact import QuantizedLinear
from calib.errors import BackendError
from calib.schemes import INT8, PerChannel, TensorScheme


def lower_embeddings(
    model: ir.Model,
    linears: Mapping[str, QuantizedLinear],
    tables: Collection[str],
    *,
    integer_rows: bool,
) -> None:
    """Quantize the embeddings ``tables`` of a traced graph, in place.

    Args:
        model: a traced graph, the tables of which are initializers under their checkpoint keys.
        linears: quantized linears and embeddings of the artifact.
        tables: names of embeddings.
        integer_rows: gather integers (see the module's docstring).

    Raises:
        BackendError: a table is quantized in a way that has no such form, or the model does more
            with it than look rows up.
    """
    for name in tables:
        if name not in linears:
            continue
        refused = table_refusal(name, linears[name].weight_scheme)
        if refused is not None:
            raise BackendError(
                f"'{name}' cannot be written as ONNX: {refused.reason}", hint=refused.hint
            )
        _lower(model.graph, linears[name], integer_rows=integer_rows)


def _lower(graph: ir.Graph, table: QuantizedLinear, *, integer_rows: bool) -> None:
    old = graph.initializers[initializer_name(table.name, Part.WEIGHT)]
    users = list(old.consumers())
    if any(user.op_type != "Gather" or user.inputs[0] is not old for user in users):
        raise BackendError(
            f"the embedding '{table.name}' cannot be quantized: the model does more with it than"
            " look rows up",
            hint=f"leave it in float: --override '{table.name}=float'",
        )

    dtype = old.dtype
    assert dtype is not None
    assert old.name is not None
    graph.initializers.pop(old.name)
    stored = _initializer(graph, old.name, table.weight, ir.DataType.INT8)
    scale = _initializer(
        graph, initializer_name(table.name, Part.WEIGHT_SCALE), table.weight_scale, dtype
    )

    for index, node in enumerate(users):
        ids = node.inputs[1]
        assert ids is not None
        builder = tape.Tape()
        label = f"{table.name}/{index}" if index else table.name
        if integer_rows:
            rows = builder.op("Gather", [stored, ids], {"axis": 0}, name=f"{label}/Rows")
            cast = builder.op("Cast", [rows], {"to": dtype}, name=f"{label}/Cast")
            steps = builder.op("Gather", [scale, ids], {"axis": 0}, name=f"{label}/Steps")
            column = builder.op(
                "Unsqueeze", [steps, integers(graph, (-1,))], name=f"{label}/Column"
            )
            output = builder.op("Mul", [cast, column], name=f"{label}/Dequantize")
        else:
            values = builder.op(
                "DequantizeLinear", [stored, scale], {"axis": 0}, name=f"{label}/DequantizeTable"
            )
            output = builder.op("Gather", [values, ids], {"axis": 0}, name=f"{label}/Rows")
        replace(graph, node, builder, output)


def table_refusal(name: str, scheme: TensorScheme) -> Reason | None:
    """Why the embedding ``name`` cannot be written in ``scheme``, and what to do; ``None`` if it
    can.
    """
    if scheme.format == INT8 and isinstance(scheme.granularity, PerChannel) and scheme.symmetric:
        return None
    return Reason(
        (
            "embeddings are looked up as rows of int8 with one scale each, without zero points,"
            f" and '{name}' would be something else"
        ),
        f"quantize it so, --override '{name}=int8-weight-only', or leave it in float",
    )


def read_embedding(
    graph: ir.Graph, name: str, entry: Mapping[str, Any], scheme: TensorScheme
) -> QuantizedLinear:
    """The embedding ``name`` as a written graph holds it."""
    stored, scale = (
        graph.initializers[initializer_name(name, part)].const_value
        for part in (Part.WEIGHT, Part.WEIGHT_SCALE)
    )
    assert stored is not None
    assert scale is not None

    return QuantizedLinear(
        name=name,
        weight=torch.from_numpy(stored.numpy().copy()),
        weight_scale=torch.from_numpy(scale.numpy().copy()),
        weight_scheme=scheme,
        bias=None,
        input_scheme=None,
        input_scale=None,
        online_rotation=entry["online_rotation"],
    )


def _initializer(graph: ir.Graph, name: str, tensor: Tensor, dtype: ir.DataType) -> ir.Value:
    shape = ir.Shape(tuple(tensor.shape))
    unread = ir.LazyTensor(
        lambda: ir.tensor(tensor.contiguous(), dtype=dtype, name=name),
        dtype=dtype,
        shape=shape,
        name=name,
    )
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=unread)
    graph.register_initializer(value)
    return value
