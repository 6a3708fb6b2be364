"""What each ONNX target expresses, as data. Torch-free, for ``rotq backends``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backends.rules import Rule, first_reason, is_dynamic, tensor_schemes
from calib.schemes import INT8, LinearScheme, PerBlock, PerTensor


@dataclass(frozen=True)
class Target:
    """A runtime profile of the ONNX backend."""

    compute_dtype: str
    opset: int
    rules: tuple[Rule, ...]
    """The first that applies is the reason."""

    def refusal(self, scheme: LinearScheme) -> str | None:
        """Why this target cannot express a linear of ``scheme``; ``None`` if it can."""
        return first_reason(self.rules, scheme)


_ORT = (
    Rule(
        lambda scheme: any(tensor.format.kind == "float" for tensor in tensor_schemes(scheme)),
        "ONNX Runtime's CPU provider has no float8 or float4 kernels, and its optimizer fails to load such a graph",
    ),
    Rule(is_dynamic, "its Q/DQ graphs take calibrated scales; scales computed while running are not fused"),
    Rule(
        lambda scheme: any(not tensor.symmetric for tensor in tensor_schemes(scheme)),
        "the graph that runs everywhere has no zero points",
    ),
    Rule(
        lambda scheme: scheme.input is not None and not isinstance(scheme.input.granularity, PerTensor),
        "no runtime has an integer kernel for more than one scale of an activation",
    ),
    Rule(
        lambda scheme: scheme.input is not None and scheme.input.format != INT8,
        "it has no kernel for activations of fewer than 8 bits",
    ),
    Rule(
        lambda scheme: (
            scheme.input is not None
            and (scheme.weight.format != INT8 or isinstance(scheme.weight.granularity, PerBlock))
        ),
        "it has no kernel of INT8 activations with INT4 or blocked weights, and would dequantize these on every run",
    ),
)

TARGETS: Mapping[str, Target] = {"ort": Target(compute_dtype="float32", opset=21, rules=_ORT)}
