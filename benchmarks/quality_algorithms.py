"""The algorithms that :mod:`benchmarks.quality` tries for a scheme."""

from __future__ import annotations

from benchmarks.quality_figures import PLAIN
from calib.schemes import INT4, PerBlock, Scheme


def algorithms_of(scheme: Scheme, adaround: int) -> list[str]:
    """What is tried for a scheme, ``rtn`` first: weight algorithms, or smoothing and, after a
    ``+``, one of them.
    """
    assert scheme.weight is not None  # 'float' is no choice here
    found = [PLAIN, "mse", "gptq"]
    if scheme.weight.format == INT4 and adaround:
        found.append(f"adaround:iterations={adaround}")
    if scheme.activation is not None and scheme.activation.format.kind == "integer":
        return [*found, "smoothquant:auto", "smoothquant:auto+gptq"]
    return [*found, "awq", "awq+gptq"] if scheme.weight.format.bits < 8 else found


def split(algorithm: str) -> tuple[str, str]:
    """The smoothing method, empty if there is none, and the weight algorithm."""
    first, _, second = algorithm.partition("+")
    return (first, second or PLAIN) if first.startswith(("awq", "smoothquant")) else ("", first)


def blocks(scheme: Scheme) -> int | None:
    """Input features that share a scale of a weight, where their number can be chosen."""
    assert scheme.weight is not None  # 'float' is no choice here
    granularity, chosen = scheme.weight.granularity, scheme.weight.scale_format == "compute"
    return granularity.size if chosen and isinstance(granularity, PerBlock) else None


def label(scheme: Scheme) -> str:
    """The name of a scheme, with the size of the blocks that can be chosen."""
    size = blocks(scheme)
    return scheme.name if size is None else f"{scheme.name} g{size}"
