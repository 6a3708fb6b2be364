"""Graphs of one linear, of every scheme that the command line can ask for. They are made in
milliseconds.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from backends.base import Int8Weights
from backends.onnx.lower import lower
from backends.onnx.names import METADATA_KEY
from backends.onnx.placeholders import DOMAIN, LINEAR, MODULE_ATTRIBUTE
from backends.onnx.targets import TARGETS
from calib.arithmetic.grids import quantize, weight_grid
from calib.arithmetic.inputs import input_grid
from calib.artifact import QuantizedLinear, QuantizedModel
from calib.errors import QuantizationError
from calib.measure.reference import ReferenceLinear
from calib.quantizing.plan import customised
from calib.rotations.rotation_set import RotationSet
from calib.schemes import (
    INT4,
    SCHEMES,
    LinearScheme,
    PerBlock,
    PerCluster,
    TensorScheme,
    linear_words,
    scheme_named,
)
from tests.tiny import CONFIGS, PROVENANCE

OUT = 24
WIDTH = 96
"""Input features: whole blocks of 16, 32 and 48, a short one behind 64 and one of 128."""
NAME = "linear"
_CONTROLS = {
    "block_size": (None, 48, 64),
    "weight_symmetric": (None, False),
    "activation_symmetric": (None, False),
    "activation_granularity": (None, "tensor", "token", "cluster:2"),
}


def preset(name: str) -> LinearScheme:
    """What a preset, or one of int4 weights in ``int4/{size}`` blocks, does to a linear."""
    if name.startswith("int4/"):
        return LinearScheme(TensorScheme(INT4, PerBlock(int(name.removeprefix("int4/")))), None)
    scheme = scheme_named(name).linear
    assert scheme is not None
    return scheme


@cache
def schemes() -> dict[str, LinearScheme]:
    """Every scheme of a linear that presets and finer controls can express, by its description."""
    found: dict[str, LinearScheme] = {}
    for name, values in itertools.product(SCHEMES, itertools.product(*_CONTROLS.values())):
        controls: dict[str, Any] = dict(zip(_CONTROLS, values, strict=True))
        try:
            scheme = customised(scheme_named(name), **controls).linear
        except QuantizationError:
            continue  # a control that this preset does not have
        if scheme is None:
            continue
        scales = (
            ""
            if scheme.weight.scale_format == "compute"
            else f", {scheme.weight.scale_format} scales"
        )
        found.setdefault(linear_words(scheme) + scales, scheme)
    return found


def accepted(target: str) -> dict[str, LinearScheme]:
    """Those that ``target`` takes."""
    return {
        words: scheme
        for words, scheme in schemes().items()
        if TARGETS[target].refusal(scheme) is None
    }


@dataclass(frozen=True)
class Single:
    """One quantized linear, and inputs ``[2, 5, in]`` that it was calibrated on."""

    linear: QuantizedLinear
    inputs: Tensor

    @property
    def reference(self) -> ReferenceLinear:
        """What it is, in float32."""
        return ReferenceLinear(self.linear, None)

    def output(self) -> Tensor:
        """What it makes of the inputs, in float32."""
        found: Tensor = self.reference(self.inputs.float())
        return found

    def graph(self, target: str, copies: int = 1, int8_weights: Int8Weights = "auto") -> ir.Model:
        """``x -> y``, or several times the same linear on one ``x``, in the dtype of the linear's
        scales.
        """
        dtype = self.inputs.dtype
        kind = ir.TensorType(ir.DataType.FLOAT16 if dtype == torch.float16 else ir.DataType.FLOAT)
        leading = ["batch", "sequence"][: self.inputs.dim() - 1]
        x = ir.Value(name="x", type=kind, shape=ir.Shape([*leading, self.linear.weight.shape[1]]))
        nodes = []
        for index, name in enumerate(_names(copies)):
            node = ir.Node(DOMAIN, LINEAR, [x], [ir.AttrString(MODULE_ATTRIBUTE, name)])
            y = node.outputs[0]
            y.name, y.type, y.shape = (
                f"y{index or ''}",
                kind,
                ir.Shape([*leading, self.linear.weight.shape[0]]),
            )
            nodes.append(node)
        outputs = [node.outputs[0] for node in nodes]
        graph = ir.Graph(
            [x], outputs, nodes=nodes, opset_imports={"": TARGETS[target].opset}, name="single"
        )
        model = ir.Model(graph, ir_version=10)
        lower(model, self.model(copies), TARGETS[target], int8_weights=int8_weights)
        model.metadata_props[METADATA_KEY] = json.dumps(
            {name: self.linear.description() for name in _names(copies)}
        )
        return model

    def bytes(self, target: str, copies: int = 1, int8_weights: Int8Weights = "auto") -> bytes:
        """The same as an ``.onnx`` file."""
        proto = ir.to_proto(self.graph(target, copies, int8_weights))
        data: bytes = proto.SerializeToString()
        return data

    def model(self, copies: int = 1) -> QuantizedModel:
        """An artifact that holds this linear alone, maybe several times."""
        return QuantizedModel(
            config=CONFIGS["llama"]().to_dict(),
            scheme=scheme_named("int8"),
            dtype=self.inputs.dtype,
            linears={name: replace(self.linear, name=name) for name in _names(copies)},
            floats={},
            kept={},
            rotations=RotationSet([]),
            provenance=PROVENANCE,
        )


def _names(copies: int) -> list[str]:
    return [NAME, *(f"{NAME}{index}" for index in range(1, copies))]


def single(
    scheme: LinearScheme,
    dtype: torch.dtype = torch.float32,
    *,
    width: int = WIDTH,
    order: bool = False,
) -> Single:
    """A linear with random weights and a bias, rounded to nearest.

    Args:
        scheme: how it is quantized.
        dtype: of its scales, its bias and the inputs.
        width: input features.
        order: let its columns follow a random order of their own.
    """
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(OUT, width, generator=generator) / width**0.5
    x = torch.randn(2, 5, width, generator=generator) * torch.linspace(0.5, 2, width) + 0.3
    permutation = torch.randperm(width, generator=generator) if order else None
    if permutation is not None:
        weight = weight[:, permutation]
    x = x.to(dtype)
    grid = weight_grid(weight, scheme.weight, dtype)
    seen = None
    if scheme.input is not None and scheme.input.needs_calibration:
        low, high = torch.aminmax(x.float().flatten())
        if isinstance(scheme.input.granularity, PerCluster):
            half = torch.linspace(0.5, 1, width).round()  # two clusters of neighbours
            low, high = low * half, high * half
        seen = input_grid(low, high, scheme.input, dtype)
    linear = QuantizedLinear(
        name=NAME,
        weight=quantize(weight, grid, scheme.weight),
        weight_scale=grid.scale,
        weight_scheme=scheme.weight,
        bias=torch.randn(OUT, generator=generator).to(dtype),
        input_scheme=scheme.input,
        input_scale=None if seen is None else seen.scale,
        online_rotation=None,
        weight_zero_point=grid.zero_point,
        weight_second_scale=grid.second_level,
        weight_order=permutation,
        input_zero_point=None if seen is None else seen.zero_point,
    )
    return Single(linear, x)
