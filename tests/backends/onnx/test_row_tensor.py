"""Tensors that are written part by part are the same bytes as tensors that are written whole."""

from __future__ import annotations

import io

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from backends.onnx import row_tensor
from backends.onnx.linear_nodes import LinearNodes

ROWS, COLUMNS = 11, 7  # odd both, so that a row of 4-bit elements ends in mid-byte


def written(tensor: ir.TensorProtocol) -> bytes:
    file = io.BytesIO()
    tensor.tofile(file)  # type: ignore[attr-defined]
    return file.getvalue()


def stored(weight: Tensor, dtype: ir.DataType | None, rows: int | None = None) -> ir.TensorProtocol:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21})
    value = LinearNodes(graph, "linear", torch.float16).weight([weight], dtype, rows)
    assert value.const_value is not None
    return value.const_value


@pytest.mark.parametrize(
    "dtype", [ir.DataType.INT8, ir.DataType.INT4, None], ids=["int8", "int4", "float16"]
)
@pytest.mark.parametrize("rows", [ROWS, ROWS + 4])
def test_parts_are_the_whole(
    monkeypatch: pytest.MonkeyPatch, dtype: ir.DataType | None, rows: int
) -> None:
    weight = torch.randint(
        -7, 8, (COLUMNS, ROWS), generator=torch.Generator().manual_seed(0), dtype=torch.int8
    )
    source = weight.float() if dtype is None else weight
    whole = stored(source, dtype, rows)
    monkeypatch.setattr(row_tensor, "PART_BYTES", 1)  # two rows, the least
    parts = stored(source, dtype, rows)
    assert written(parts) == written(whole) == whole.tobytes()
    found = torch.from_numpy(whole.numpy().astype("float32"))
    assert torch.equal(found[:ROWS], weight.T.float())
    assert not found[ROWS:].any()


def test_only_a_part_is_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_tensor, "PART_BYTES", 4 * COLUMNS)
    made: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> ir.TensorProtocol:
        made.append((start, stop))
        return ir.tensor(torch.zeros(stop - start, COLUMNS, dtype=torch.int8))

    shape = ir.Shape([ROWS, COLUMNS])
    tensor = row_tensor.RowTensor(
        read, dtype=ir.DataType.INT8, shape=shape, name="w", sources=[torch.zeros(1)]
    )
    assert len(written(tensor)) == ROWS * COLUMNS
    assert made == [(0, 4), (4, 8), (8, 11)]
