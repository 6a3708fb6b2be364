"""The rules of :mod:`exporter.run.remedies`, as data: a condition on what a run measured, what it
asks for, and why. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from calib.schemes import PerBlock, Scheme, scheme_named
from exporter.recipe import Recipe
from exporter.reporting.report import ParityRow, Report
from exporter.run.quantizing import customised_scheme

Fault = Literal["files", "ranges", "fold", "runtime", "overflow", "quality"]
"""What kind of figure was missed: the files are not what was calibrated; static ranges do not fit
held-out text; the rotated float model is another one; the runtime computes something else than the
simulation; an activation is beyond the dtype; the quantized model is too far from the original."""
Change = Mapping[str, Any]
"""Recipe values, by dotted key."""

SMALL_BLOCK = 32
FEW_ROWS = 64
"""Evaluation rows that are worth taking where rounding flips are rare, or a figure is near its
bound."""
NEAR = 1.25
"""How far beyond its bound, in logarithms, a ratio may be for more text to be worth looking at."""
MANY_ROWS = 256
_WIDER_INPUTS = {
    "int8": ("int8-dynamic", "int8-weight-only"),
    "w4a8": ("int4-weight-only",),
    "w4a8-float8": ("int4-weight-only",),
    "float8": ("float8-dynamic",),
}
"""By scheme: what leaves the weights of a linear as they are and takes its input in a wider form,
the cheapest first; ``float`` always does."""
_WIDER_SCHEMES = {
    "int4-weight-only": ("int8-weight-only",),
    "w4a4": ("w4a8", "int8-dynamic", "int8"),
    "w4a8": ("int8", "int8-weight-only"),
    "w4a8-float8": ("float8", "float8-dynamic"),
    "nvfp4": ("float8", "mxfp8"),
    "mxfp4": ("mxfp8", "float8"),
    "int8": ("int8-dynamic", "int8-weight-only"),
    "int8-dynamic": ("int8-weight-only",),
    "float8": ("float8-dynamic",),
}
"""By scheme: those that lose less, the cheapest first."""


@dataclass(frozen=True)
class Case:
    """A run whose parity failed."""

    report: Report
    recipe: Recipe
    generic: bool = False
    """Whether the family of the model is not in the table, so that nothing can be folded."""

    @cached_property
    def scheme(self) -> Scheme:
        """That of the run, with its finer controls."""
        return customised_scheme(self.recipe)

    @cached_property
    def missed(self) -> Mapping[Fault, ParityRow]:
        """The figures that missed their bounds, one of each kind."""
        return {_fault(row): row for row in self.report.parity if row.passed is False}

    @property
    def ratio(self) -> ParityRow | None:
        """The perplexity ratio, where it was measured."""
        rows = (row for row in self.report.parity if row.metric == "perplexity ratio")
        return next((row for row in rows if row.measured and row.bound), None)

    @property
    def few_bits(self) -> bool:
        """Whether weights have few bits."""
        return _few_bits(self.scheme)

    @property
    def rounds_plainly(self) -> bool:
        """Whether every weight is rounded by itself."""
        return self.recipe.weights.algorithm.partition(":")[0] in ("rtn", "mse")

    @property
    def block(self) -> int | None:
        """Input features that share a scale of a weight, where that can be chosen."""
        weight = self.scheme.weight
        if weight is None or weight.scale_format != "compute":
            return None
        return weight.granularity.size if isinstance(weight.granularity, PerBlock) else None

    @property
    def large_blocks(self) -> bool:
        """Whether smaller blocks can be had."""
        return self.block is not None and self.block > SMALL_BLOCK

    @property
    def static_inputs(self) -> bool:
        """Whether inputs are rounded with limits fixed beforehand."""
        activation = self.scheme.activation
        return activation is not None and activation.needs_calibration

    @property
    def clips(self) -> bool:
        """Whether the runtime clips sums of products on the machine that ran it, and there are any:
        of weights alone it multiplies floats.
        """
        return self.scheme.activation is not None and any(
            value.startswith("clipped")
            for row in self.report.parity
            for value in row.session.values()
        )

    @property
    def smoothed(self) -> bool:
        """Whether anything smooths, by the recipe or by the choice of the gate."""
        return self.report.calibration.smoothing != "none"

    @property
    def widened(self) -> bool:
        """Whether the gate has widened inputs."""
        return any(row.chosen and row.wider for row in self.report.gate)

    @property
    def massive(self) -> list[str]:
        """Linears whose inputs have massive tokens, the largest first."""
        return [row.name for row in self.report.massive]

    @property
    def near(self) -> bool:
        """Whether the perplexity ratio is barely beyond its bound."""
        row = self.ratio
        if row is None or row.measured is None or row.bound is None or row.measured <= 1:
            return False
        return math.log(row.measured) <= NEAR * math.log(row.bound)

    def has(self, name: str) -> bool:
        """Whether the parity check measured something of this name."""
        return any(row.name == name for row in self.report.parity)


@dataclass(frozen=True)
class Rule:
    """A condition on what was measured, what it asks for, and why."""

    name: str
    mends: tuple[Fault, ...]
    when: Callable[[Case], bool]
    changes: Callable[[Case], Sequence[Change]]
    """Changes of the recipe, of which the first that the target can express is taken."""
    why: str
    left: float | None = None
    """Share of the logarithm of the perplexity ratio that is left, as measured on
    SmolLM2-135M-Instruct by int4-weight-only (docs/weights.md); ``None``: nothing is known."""
    longer: float = 1.0
    """How much longer calibrating takes."""


_GPTQ = {"weights.algorithm": "gptq"}
_BLOCKS = {"weights.block_size": SMALL_BLOCK}

RULES: tuple[Rule, ...] = (
    Rule(
        "again",
        ("files",),
        lambda case: True,
        lambda case: [{}],
        "the files are not what was calibrated: no setting mends that; if it happens again, report"
        " it with report.json and the output of 'rotq env'",
    ),
    Rule(
        "unsigned",
        ("runtime", "quality"),
        lambda case: case.clips,
        lambda case: [{"int8_weights": "unsigned"}],
        "this processor clips sums of signed int8 products (it has no VNNI); weights stored in"
        " uint8 are multiplied exactly on every one",
    ),
    Rule(
        "auto",
        ("quality", "ranges"),
        lambda case: not (case.recipe.rotate.auto or case.recipe.layerwise.enabled or case.generic),
        lambda case: [{"rotate": "auto"}],
        "the rotations were given: auto compares all sets, and none, on held-out text",
    ),
    Rule(
        "prefix",
        ("quality", "ranges"),
        lambda case: (
            case.recipe.prefix == "none"
            and bool(case.massive)
            and not (case.recipe.layerwise.enabled or case.generic)
        ),
        lambda case: [{"prefix": "auto"}],
        "inputs have massive tokens, which a prefix takes upon itself, and --prefix is none",
    ),
    Rule(
        "rows",
        ("runtime",),
        lambda case: case.has("one-flip floor"),
        lambda case: [{"evaluation.nsamples": _more(case.recipe.evaluation.nsamples, FEW_ROWS)}],
        "roundings that flip were too few to measure a floor with: more rows have more of them",
    ),
    Rule(
        "more-text",
        ("ranges",),
        lambda case: case.recipe.calibration.nsamples < MANY_ROWS,
        lambda case: [{"calibration.nsamples": _more(case.recipe.calibration.nsamples, MANY_ROWS)}],
        "static ranges do not fit held-out text: more rows of calibration see larger inputs",
    ),
    Rule(
        "min-max",
        ("ranges",),
        lambda case: case.recipe.activations.observer != "min_max",
        lambda case: [{"activations.observer": "min_max"}],
        "the observer sets ranges that held-out text does not have",
    ),
    Rule(
        "gptq",
        ("quality",),
        lambda case: case.few_bits and case.rounds_plainly,
        lambda case: [_GPTQ],
        "weights are rounded one by one; GPTQ lets later ones make up for earlier ones, with the"
        " calibration text",
        left=0.37,
        longer=4.0,
    ),
    Rule(
        f"block-{SMALL_BLOCK}",
        ("quality",),
        lambda case: case.few_bits and case.large_blocks,
        lambda case: [_BLOCKS],
        f"a scale for every {SMALL_BLOCK} weights follows them closer; a few per cent larger",
        left=0.68,
    ),
    Rule(
        f"gptq-block-{SMALL_BLOCK}",
        ("quality",),
        lambda case: case.few_bits and case.rounds_plainly and case.large_blocks,
        lambda case: [{**_GPTQ, **_BLOCKS}],
        "both: GPTQ, and smaller blocks",
        left=0.13,
        longer=4.0,
    ),
    Rule(
        "smooth",
        ("quality", "ranges"),
        lambda case: case.static_inputs and not case.smoothed,
        lambda case: [{"smoothing": "smoothquant:auto"}],
        "inputs have static scales and nothing smooths: SmoothQuant moves outliers into weights, at"
        " no cost at run time",
        longer=2.0,
    ),
    Rule(
        "awq",
        ("quality",),
        lambda case: (
            case.few_bits
            and case.scheme.weight_only
            and not case.smoothed
            and not case.rounds_plainly
        ),
        lambda case: [{"smoothing": "awq"}],
        "AWQ protects the weights that large inputs meet, at no cost at run time",
        longer=2.0,
    ),
    Rule(
        "wide",
        ("quality", "ranges"),
        lambda case: (
            case.recipe.widen == "none" and case.static_inputs and not case.recipe.layerwise.enabled
        ),
        lambda case: [{"widen": "auto"}],
        "the gate may not widen inputs (--overrides none): auto does so for those that hurt most",
    ),
    Rule(
        "by-name",
        ("quality", "ranges"),
        lambda case: case.static_inputs and bool(case.massive) and not case.widened,
        lambda case: [_override(case, form) for form in _forms(case)],
        "these inputs have massive tokens, which a static scale has to hold: they get a wider form,"
        " which costs a little at run time",
    ),
    Rule(
        "more-rows",
        ("quality",),
        lambda case: case.near and case.recipe.evaluation.nsamples < FEW_ROWS,
        lambda case: [{"evaluation.nsamples": FEW_ROWS}],
        "the figure is barely beyond its bound, and few rows measured it: more of them say whether"
        " it is so",
    ),
    Rule(
        "kv-int8",
        ("quality",),
        lambda case: case.recipe.kv == "int4",
        lambda case: [{"kv": "int8"}],
        "four bits for keys and values lose most; eight take twice the cache",
    ),
    Rule(
        "grown",
        ("runtime",),
        lambda case: case.recipe.kv_buffer == "shared",
        lambda case: [{"kv_buffer": "grown"}],
        "a graph whose keys and values grow uses plainer operators",
    ),
    Rule(
        "bfloat16",
        ("overflow",),
        lambda case: case.report.dtype == "float16",
        lambda case: [{"dtype": "bfloat16"}, {"dtype": "float32"}],
        "activations are beyond the range of float16",
    ),
    Rule(
        "float32",
        ("fold", "runtime"),
        lambda case: case.report.dtype in ("float16", "bfloat16"),
        lambda case: [{"dtype": "float32"}],
        "the target computes in a short dtype; float32 loses nothing, and is larger and slower",
    ),
    Rule(
        "unrotated",
        ("fold",),
        lambda case: case.report.rotate != "none",
        lambda case: [{"rotate": "none"}],
        "the rotated float model is another one: nothing is folded without a rotation",
    ),
    Rule(
        "wider",
        ("quality",),
        lambda case: case.recipe.scheme in _WIDER_SCHEMES,
        lambda case: [_wider(case, name) for name in _WIDER_SCHEMES[case.recipe.scheme]],
        "a scheme that loses less: larger, or slower",
    ),
)
"""From what is free at run time to what is not; the last resort is last."""


def _fault(row: ParityRow) -> Fault:
    """What kind of figure ``row`` is."""
    match row.rung, row.metric:
        case _, "share of the range":
            return "overflow"
        case 0, "share of ranges that do not fit":
            return "ranges"
        case 0, _:
            return "files"
        case 1, _:
            return "fold"
        case 2, _:
            return "runtime"
    return "quality"


def _more(rows: int, least: int) -> int:
    return max(2 * rows, least)


def _forms(case: Case) -> tuple[str, ...]:
    return (*_WIDER_INPUTS.get(case.recipe.scheme, ()), "float")


def _few_bits(scheme: Scheme) -> bool:
    """Whether weights have four bits or fewer."""
    return scheme.weight is not None and scheme.weight.format.bits <= 4


def _wider(case: Case, name: str) -> Change:
    """The scheme ``name``, without what a scheme of few bits needs: the recipe of a run says its
    algorithm and its blocks, also where nobody had asked for them.
    """
    weights = case.recipe.weights
    change: dict[str, Any] = {"scheme": name}
    if not case.rounds_plainly and not _few_bits(scheme_named(name)):
        change["weights.algorithm"] = "rtn"
    if weights.block_size is not None:
        change["weights.block_size"] = 0
    return change


def _override(case: Case, form: str) -> Change:
    """The overrides of the run, and ``form`` for the linears with massive tokens: an option takes
    the place of all that the recipe has."""
    return {"overrides": {**case.recipe.overrides, **dict.fromkeys(case.massive, form)}}
