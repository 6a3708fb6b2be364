"""What each ONNX target expresses, as data. Torch-free, for ``rotq backends``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from calib.schemes import INT8, LinearScheme, PerBlock, PerTensor, TensorScheme


@dataclass(frozen=True)
class Rule:
    """Something that a target cannot express."""

    when: Callable[[LinearScheme], bool]
    reason: str


@dataclass(frozen=True)
class Target:
    """A runtime profile of the ONNX backend."""

    compute_dtype: str
    opset: int
    rules: tuple[Rule, ...]
    """The first that applies is the reason."""

    def refusal(self, scheme: LinearScheme) -> str | None:
        """Why this target cannot express a linear of ``scheme``; ``None`` if it can."""
        return next((rule.reason for rule in self.rules if rule.when(scheme)), None)


def _dynamic(scheme: LinearScheme) -> bool:
    return scheme.input is not None and scheme.input.dynamic


def _tensors(scheme: LinearScheme) -> list[TensorScheme]:
    return [scheme.weight, *([scheme.input] if scheme.input is not None else [])]


_ORT = (
    Rule(
        lambda scheme: any(tensor.format.kind == "float" for tensor in _tensors(scheme)),
        "ONNX Runtime's CPU provider has no float8 or float4 kernels, and its optimizer fails to load such a graph",
    ),
    Rule(_dynamic, "its Q/DQ graphs take calibrated scales; scales computed while running are not fused"),
    Rule(
        lambda scheme: any(not tensor.symmetric for tensor in _tensors(scheme)),
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
