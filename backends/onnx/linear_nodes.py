"""The nodes of one linear while they are put together, and initializers that stay unread until they
are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch
from onnx_ir import tape
from torch import Tensor

from backends.onnx.names import Label, Part, initializer_name, node_name
from backends.onnx.nodes import constant, integers
from backends.onnx.row_tensor import RowTensor
from calib.errors import BackendError

STORAGE = {
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "float8_e4m3": ir.DataType.FLOAT8E4M3FN,
    "float4_e2m1": ir.DataType.FLOAT4E2M1,
}
"""What the number formats of :mod:`calib.schemes` are in ONNX, by name."""
UNSIGNED_ZERO = 128
"""What uint8 stores for 0 of int8."""


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    """What a float dtype of torch is in ONNX."""
    return ir.tensor(torch.zeros((), dtype=dtype)).dtype


class LinearNodes:
    """Nodes and initializers of one linear. All bear its name, a separator and their own label.

    Args:
        graph: gets the initializers.
        name: the linear.
        dtype: of the graph's floats.
    """

    def __init__(self, graph: ir.Graph, name: str, dtype: torch.dtype) -> None:
        self.graph = graph
        self.name = name
        self.torch_dtype = dtype
        self.dtype = onnx_dtype(dtype)
        self.tape = tape.Tape()

    def op(
        self, operator: str, inputs: Sequence[ir.Value], label: Label, **attributes: int
    ) -> ir.Value:
        """A node of the standard domain, called ``{linear}/{label}``, and its only output."""
        return self.tape.op(operator, inputs, attributes, name=node_name(self.name, label))

    def split(self, x: ir.Value, sizes: ir.Value, count: int) -> Sequence[ir.Value]:
        """``x`` in ``count`` parts of its last axis."""
        return self.tape.op_multi_out(
            "Split",
            [x, sizes],
            {"axis": -1},
            num_outputs=count,
            name=node_name(self.name, Label.SPLIT),
        )

    def custom(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        label: Label,
        *,
        domain: str,
        outputs: int,
        **attributes: int,
    ) -> Sequence[ir.Value]:
        """A node of another domain, and its outputs."""
        name = node_name(self.name, label)
        return self.tape.op_multi_out(
            operator, inputs, attributes, domain=domain, num_outputs=outputs, name=name
        )

    def floats(self, part: Part, tensor: Tensor) -> ir.Value:
        """The initializer ``{linear}.{part}`` in the dtype of the graph."""
        return self.lazy(
            initializer_name(self.name, part),
            tensor.shape,
            self.dtype,
            lambda: tensor.to(self.torch_dtype).contiguous(),
        )

    def scale(self, part: Part, tensor: Tensor, dtype: torch.dtype | None = None) -> ir.Value:
        """The same for scales, in ``dtype`` if it is not that of the graph.

        Raises:
            BackendError: one is not finite or not above zero in that dtype, which runtimes reject.
        """
        stored = dtype or self.torch_dtype
        cast = tensor.to(stored).float()
        unusable = ~((cast > 0) & cast.isfinite())

        if bool(unusable.any()):
            name = str(stored).removeprefix("torch.")
            before, after = float(tensor[unusable][0]), float(cast[unusable][0])
            raise BackendError(
                f"the scale {before:g} of '{initializer_name(self.name, part)}' becomes {after:g}"
                f" in {name}",
                hint=f"calibrate with --dtype {name}, which keeps scales within its range",
            )

        return self.lazy(
            initializer_name(self.name, part),
            tensor.shape,
            onnx_dtype(stored),
            lambda: tensor.to(stored).contiguous(),
        )

    def weight(
        self, weights: Sequence[Tensor], dtype: ir.DataType | None = None, rows: int | None = None
    ) -> ir.Value:
        """Weights ``[out, in]``, beside each other, as the initializer ``[rows, sum of out]``; rows
        past ``in`` are 0.

        Args:
            weights: integers or codes, or floats of any dtype.
            dtype: as which it is stored; ``None``: floats in the dtype of the graph.
            rows: by default as many as there are input features.

        Integers of int8 that are stored in uint8 are 128 above: two's complement with the sign bit
        turned over.
        """
        out, width = sum(len(weight) for weight in weights), weights[0].shape[1]
        name, stored = initializer_name(self.name, Part.WEIGHT), dtype or self.dtype

        def read(start: int, stop: int) -> ir.TensorProtocol:
            turned = torch.cat([weight[:, start:stop].T for weight in weights], dim=1)
            missing = stop - max(start, width)
            if missing > 0:
                turned = torch.cat([turned, turned.new_zeros(missing, out)])
            if stored == ir.DataType.UINT8:
                turned = turned.contiguous().view(torch.uint8) ^ UNSIGNED_ZERO
            return _tensor(
                (turned.to(self.torch_dtype) if dtype is None else turned).contiguous(),
                stored,
                name,
            )

        shape = ir.Shape((rows or width, out))
        return self._registered(
            RowTensor(read, dtype=stored, shape=shape, name=name, sources=weights)
        )

    def integers(self, dims: Sequence[int]) -> ir.Value:
        """An int64 constant ``[len(dims)]`` that the graph holds once."""
        return integers(self.graph, dims)

    def filled(
        self, label: str, shape: tuple[int, ...], dtype: ir.DataType, number: int = 0
    ) -> ir.Value:
        """A constant of one number that the graph holds once, by ``label``, shape and dtype."""
        name = ".".join([label, dtype.name.lower(), *map(str, shape)])
        return constant(self.graph, name, torch.full(shape, float(number)).numpy(), dtype)

    def lazy(
        self, name: str, shape: Sequence[int], dtype: ir.DataType, read: Callable[[], Tensor]
    ) -> ir.Value:
        """The initializer called ``name``, made on first use. Its bytes are read when they are
        written, not kept.
        """
        sizes = ir.Shape(shape)
        return self._registered(
            ir.LazyTensor(lambda: _tensor(read(), dtype, name), dtype=dtype, shape=sizes, name=name)
        )

    def _registered(self, tensor: ir.LazyTensor) -> ir.Value:
        name = tensor.name
        assert name is not None  # all of ours have one
        if name not in self.graph.initializers:
            value = ir.Value(
                name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]


def _tensor(values: Tensor, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """``values`` as they are stored. torch has no 4-bit dtypes, so these go through numpy's, which
    onnx_ir packs.
    """
    if dtype == ir.DataType.INT4:
        return ir.tensor(values.numpy().astype(dtype.numpy()), dtype=dtype, name=name)
    if dtype == ir.DataType.FLOAT4E2M1:  # codes already
        return ir.tensor(values.numpy().view(dtype.numpy()), dtype=dtype, name=name)
    return ir.tensor(values, dtype=dtype, name=name)
