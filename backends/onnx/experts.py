"""``rotq::Experts`` as standard operators: every expert is run on its own tokens.

With ``gates [tokens, experts]`` holding the router's weights of the chosen experts and zero
elsewhere, expert e does

    token = NonZero(gates[:, e])                      the tokens that chose it, maybe none
    y = down(act(gate(x[token])) * up(x[token])) * gates[token, e]
    total[token] += y                                 Gather, Add, ScatterND; no token comes twice

TensorRT-RTX has no NonZero. For it every expert is run on all tokens, and what did not choose it
counts zero times.

Its linears are ``rotq::Linear`` placeholders in turn, under the names of
:mod:`calib.architectures.experts`, which :mod:`backends.onnx.lower` fills in like any other linear,
R4 included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace as replace_fields
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tape
from torch import Tensor

from backends.onnx.nodes import Attribute, constant, integers, replace
from backends.onnx.placeholders import COUNT_ATTRIBUTE, DOMAIN, EXPERTS, LINEAR, MODULE_ATTRIBUTE
from calib.architectures import LinearSpec, wiring_of
from calib.artifact import QuantizedModel

Activation = Callable[[tape.Tape, ir.Value, str], ir.Value]


def _silu(builder: tape.Tape, x: ir.Value, name: str) -> ir.Value:
    return builder.op(
        "Mul", [x, builder.op("Sigmoid", [x], name=f"{name}/Sigmoid")], name=f"{name}/SiLU"
    )


def _unary(operator: str, **attributes: str) -> Activation:
    def apply(builder: tape.Tape, x: ir.Value, name: str) -> ir.Value:
        return builder.op(operator, [x], attributes, name=f"{name}/{operator}")

    return apply


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": _silu,
    "swish": _silu,
    "relu": _unary("Relu"),
    "gelu": _unary("Gelu"),
    "gelu_pytorch_tanh": _unary("Gelu", approximate="tanh"),
}
"""What transformers' names of activation functions are in ONNX."""


def lower_experts(model: ir.Model, config: Mapping[str, Any], *, routed: bool) -> None:
    """Replace every placeholder of experts in ``model``, in place, by linears that are
    placeholders.

    Args:
        model: a traced graph.
        config: Hugging Face config as a dictionary; its activation is one of :data:`ACTIVATIONS`.
        routed: run an expert on the tokens that chose it, else on all.
    """
    wiring = wiring_of(config)
    paths: dict[str, list[LinearSpec]] = {}
    for spec in wiring.linears:
        if spec.layout == "experts":
            paths.setdefault(spec.name.rpartition(".")[0], []).append(spec)

    for node in list(model.graph):
        if (node.domain, node.op_type) == (DOMAIN, EXPERTS):
            path = node.attributes[MODULE_ATTRIBUTE].as_string()
            gate_up, down = paths[path]
            activation = ACTIVATIONS[wiring.config.hidden_act]
            _Layer(model.graph, node, gate_up, down, activation).run(routed=routed)


def with_experts_apart(quantized: QuantizedModel) -> QuantizedModel:
    """``quantized`` with each float expert as a weight of its own, called
    ``{parameter}.{e}.weight``.
    """
    floats: dict[str, Tensor] = dict(quantized.floats)
    for parameter in wiring_of(quantized.config).expert_parameters:
        if parameter in floats:
            stacked = floats.pop(parameter)
            floats |= {
                f"{parameter}.{index}.weight": stacked[index] for index in range(stacked.shape[0])
            }
    return replace_fields(quantized, floats=floats)


class _Layer:
    """One placeholder and what replaces it."""

    def __init__(
        self,
        graph: ir.Graph,
        node: ir.Node,
        gate_up: LinearSpec,
        down: LinearSpec,
        activation: Activation,
    ) -> None:
        self.graph, self.node = graph, node
        self.gate_up, self.down, self.activation = gate_up.name, down.name, activation
        self.path = node.attributes[MODULE_ATTRIBUTE].as_string()
        self.experts = node.attributes[COUNT_ATTRIBUTE].as_int()
        self.builder = tape.Tape()

    def run(self, *, routed: bool) -> None:
        hidden, chosen, weights = self.node.inputs
        assert hidden is not None  # placeholders have all their inputs
        assert chosen is not None
        assert weights is not None
        gates = self._gates(chosen, weights)
        total = self._op("Sub", [hidden, hidden], "Zero")
        for expert in range(self.experts):
            index = constant(self.graph, f"index.{expert}", np.array(expert))
            gate = self._op("Gather", [gates, index], f"expert.{expert}/Gate")
            total = (self._add_routed if routed else self._add)(expert, hidden, gate, total)
        replace(self.graph, self.node, self.builder, total)

    def _gates(self, chosen: ir.Value, weights: ir.Value) -> ir.Value:
        """Weights by expert, ``[experts, tokens]``, zero where a token did not choose it."""
        assert weights.dtype is not None
        numbers = constant(
            self.graph, f"experts.{self.experts}", np.arange(self.experts).reshape(-1, 1, 1)
        )
        zero = constant(
            self.graph, f"experts.zero.{weights.dtype.name}", np.array(0), weights.dtype
        )
        mine = self._op("Equal", [chosen, numbers], "Chosen")  # [experts, tokens, k]

        return self._op(
            "ReduceSum",
            [self._op("Where", [mine, weights, zero], "Weights"), integers(self.graph, (-1,))],
            "Gates",
            keepdims=0,
        )

    def _add(self, expert: int, hidden: ir.Value, gate: ir.Value, total: ir.Value) -> ir.Value:
        """``total`` plus what expert ``expert`` makes of all tokens, ``gate [tokens]`` times."""
        return self._op(
            "Add", [total, self._weighted(expert, hidden, gate)], f"expert.{expert}/Total"
        )

    def _add_routed(
        self, expert: int, hidden: ir.Value, gate: ir.Value, total: ir.Value
    ) -> ir.Value:
        """The same, of those tokens only that have a gate above zero."""
        label = f"expert.{expert}"
        token = self._op("NonZero", [gate], f"{label}/NonZero")
        token = self._op("Squeeze", [token, integers(self.graph, (0,))], f"{label}/Token")
        x = self._op("Gather", [hidden, token], f"{label}/Input")
        # Without a name for the number of tokens: ONNX Runtime takes equal names for equal sizes.
        x.shape, x.type = ir.Shape([None, *_features(hidden)]), hidden.type

        # no token comes twice, so that what is gathered can be scattered back
        weighted = self._weighted(expert, x, self._op("Gather", [gate, token], f"{label}/Weight"))
        weighted = self._op(
            "Add", [self._op("Gather", [total, token], f"{label}/Before"), weighted], f"{label}/Sum"
        )
        rows = self._op("Unsqueeze", [token, integers(self.graph, (1,))], f"{label}/Rows")

        return self._op("ScatterND", [total, rows, weighted], f"{label}/Total")

    def _weighted(self, expert: int, x: ir.Value, gate: ir.Value) -> ir.Value:
        """What expert ``expert`` makes of ``x [n, h]``, each row ``gate [n]`` times."""
        label = f"expert.{expert}"
        both = self._linear(x, f"{self.gate_up}.{expert}")
        halves = {"axis": -1, "num_outputs": 2}
        split = f"{self.path}/{label}/Split"
        opened, up = self.builder.op_multi_out("Split", [both], halves, num_outputs=2, name=split)

        # act(gate x) * up x, whose width only the weights of the next linear know
        inner = self._op(
            "Mul",
            [self.activation(self.builder, opened, f"{self.path}/{label}"), up],
            f"{label}/Inner",
        )
        assert x.shape is not None
        inner.shape, inner.type = ir.Shape([x.shape[0], None]), x.type
        column = self._op("Unsqueeze", [gate, integers(self.graph, (1,))], f"{label}/Column")

        return self._op(
            "Mul", [self._linear(inner, f"{self.down}.{expert}"), column], f"{label}/Weighted"
        )

    def _linear(self, x: ir.Value, name: str) -> ir.Value:
        output = self.builder.op(LINEAR, [x], {MODULE_ATTRIBUTE: name}, domain=DOMAIN, version=1)
        assert x.shape is not None
        output.shape, output.type = ir.Shape([x.shape[0], None]), x.type
        return output

    def _op(
        self, kind: str, inputs: list[ir.Value], label: str, **attributes: Attribute
    ) -> ir.Value:
        return self.builder.op(kind, inputs, attributes, name=f"{self.path}/{label}")


def _features(value: ir.Value) -> list[Any]:
    assert value.shape is not None
    return list(value.shape)[1:]
