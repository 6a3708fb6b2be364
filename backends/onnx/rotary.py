"""RoPE as the standard operator.

    x * [cos, cos] + [-x_2, x_1] * [sin, sin]   ->   RotaryEmbedding(x, cos, sin),   x = [x_1, x_2]

transformers spells it out in six nodes for queries and six for keys in every layer. A prompt moves
through memory six times instead of once, and a single token waits longer for the nodes to start
than for what they compute. RoPE whose cosines are scaled (YaRN) stays as it is spelled out.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.rewriter import onnx_fusions

ROTARY_EMBEDDING = "RotaryEmbedding"
ROTARY_OPSET = 23
"""The first with the operator. What a trace at opset 21 uses means the same there: only types were
added.
"""
_IR_VERSION = 11


def fuse_rotary(model: ir.Model) -> None:
    """Replace RoPE in ``model``, in place."""
    model.graph.opset_imports[""] = ROTARY_OPSET
    model.ir_version = max(model.ir_version, _IR_VERSION)
    onnx_fusions.fuse(model)
    # every layer got cosines and sines of its own
    passes.CommonSubexpressionEliminationPass()(model)
