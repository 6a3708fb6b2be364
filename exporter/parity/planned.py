"""Rung 0, of the plan: what the recipe has quantized against what the folder holds quantized.

Where a linear is left in float without being asked for, every figure gets better: so it is counted.
What the recipe says is read here anew, and not by the code that planned the run, whose faults would
be its own measure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from calib.architectures import wiring_of
from calib.artifact import QuantizedLinear
from calib.schemes import FLOAT, LinearScheme, scheme_named
from exporter.parity.rows import row
from exporter.parity.stored import Stored
from exporter.parity.subject import Subject
from exporter.reporting.report import GateRow, ParityRow

_NAME, _METRIC = "plan of the recipe, stored against planned", "altered"


def planned_rows(subject: Subject, stored: Stored) -> list[ParityRow]:
    """How many linears of the decoder are not quantized as the recipe says; nothing of an artifact
    that does not know its recipe.
    """
    recipe = subject.quantized.provenance.recipe
    if "overrides" not in recipe:
        return []
    gate = map(GateRow.model_validate, subject.quantized.provenance.gate)
    wider = sum(tried.wider for tried in gate if tried.chosen)
    wrong = list(_unplanned(subject, stored.linears, recipe["overrides"], wider))
    note = f"{len(stored.linears)} quantized"
    if wrong:
        note += f"; not as planned: {', '.join(wrong[:3])}"
    return [row(0, _NAME, _METRIC, float(len(wrong)), 0.0, note)]


def _unplanned(
    subject: Subject,
    stored: Mapping[str, QuantizedLinear],
    overrides: Mapping[str, str],
    wider: int,
) -> Iterator[str]:
    """Names of linears that are not what scheme and overrides say; the gate may have given the
    inputs of ``wider`` of them another form.
    """
    wiring = wiring_of(subject.quantized.config)
    outside = [*(table.name for table in wiring.embeddings), wiring.head.name]
    for name in [*wiring.quantizable, *outside]:
        parameter = wiring.by_name[name].name if name in wiring.by_name else name
        patterns = [
            pattern
            for pattern in overrides
            if pattern == name
            or (
                name not in outside
                and (fnmatchcase(name, pattern) or fnmatchcase(parameter, pattern))
            )
        ]
        if patterns:
            preset = overrides[patterns[-1]]
            planned = None if preset == FLOAT else scheme_named(preset).linear
        else:
            planned = None if name in outside else subject.quantized.scheme.linear
        linear = stored.get(name)
        if (linear is None) != (planned is None):
            yield name
        elif linear is not None and planned is not None:
            found = LinearScheme(linear.weight_scheme, linear.input_scheme)
            if found.weight != planned.weight:
                yield name
            elif found.input != planned.input:
                wider -= 1
                if wider < 0:
                    yield name
