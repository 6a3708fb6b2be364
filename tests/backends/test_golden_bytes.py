"""Four-bit values lie in their bytes as the packers of those who made the formats put them.

Writer and reader of a layout share their idea of which nibble comes first, so that a round trip
says nothing of it. Here the bytes are somebody else's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from backends.onnx.linear_nodes import _tensor
from backends.onnx.read import _tensor as read_tensor
from backends.safetensors.modelopt.tensors import _pairs_of_rows, _unpacked
from backends.safetensors.tensorrt.packing import pack, unpack
from calib.schemes import INT4, PerBlock, TensorScheme

CODES = torch.tensor(
    [[-8, 7, 0, 1], [3, -1, 5, -6], [2, -3, -7, 4], [6, -2, -5, -4]], dtype=torch.int8
)
"""All sixteen values once, no two neighbours alike either way."""
ROW_MAJOR = (0x78, 0x10, 0xF3, 0xA5, 0xD2, 0x49, 0xE6, 0xCB)
"""The first of two neighbours in the low half: of ONNX's specification of INT4, which TensorRT's
``kINT4`` follows."""
TWO_OUTPUTS = (0x38, 0xF7, 0x50, 0xA1, 0x62, 0xED, 0xB9, 0xC4)
"""Two outputs of one input in a byte: of ModelOpt's ``pack_int4_in_uint8``."""


def test_onnx_packs_int4_by_its_specification() -> None:
    theirs: Any = onnx.helper.make_tensor(  # noqa: TID251 (its packer, as the reference)
        "codes", onnx.TensorProto.INT4, CODES.shape, CODES.flatten().tolist()
    )
    packed = np.frombuffer(bytes(np.array(theirs.int32_data, dtype=np.uint8)), np.uint8)
    assert tuple(packed) == ROW_MAJOR
    ours = _tensor(CODES, ir.DataType.INT4, "codes")
    assert tuple(ours.tobytes()) == ROW_MAJOR
    value = ir.Value(name="codes", const_value=ours)
    assert torch.equal(read_tensor(value), CODES)


def test_a_tensorrt_bundle_packs_as_onnx_does() -> None:
    packed = pack(CODES)
    assert tuple(packed.tolist()) == ROW_MAJOR
    assert torch.equal(unpack(packed, CODES.shape, signed=True), CODES)


def test_modelopt_packs_two_outputs_in_a_byte() -> None:
    packed = _pairs_of_rows(CODES, slice(0, 2))
    assert tuple(packed.flatten().tolist()) == TWO_OUTPUTS
    scheme = TensorScheme(INT4, PerBlock(4))
    assert torch.equal(_unpacked(packed, scheme), CODES)


def test_the_bytes_of_modelopt_are_those_of_its_own_packer() -> None:
    utils: Any = pytest.importorskip("modelopt.torch.export.quant_utils")
    blocks = CODES.repeat(1, 4).float()  # its blocks have 16 values at least
    packed = utils.pack_int4_in_uint8(blocks, torch.ones(4, 1), 16)
    assert torch.equal(packed, _pairs_of_rows(CODES.repeat(1, 4), slice(0, 2)))
    assert tuple(packed[:, :4].flatten().tolist()) == TWO_OUTPUTS
