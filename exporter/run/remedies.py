"""What would most likely mend a parity figure that missed its bound: a table of rules
(:mod:`exporter.run.remedy_rules`), each of which looks at what the run measured and changes the
recipe.

Of the rules that apply, those whose change the target cannot express, or that a run would refuse,
are left out. The others are in the order of the table, which goes from what is free at run time to
what makes the folder larger or slower; those that are expected to hold the bound come first.

Imports no torch for a family of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calib.architectures import Architecture, architecture_of
from calib.errors import RotqError
from calib.quantizing.plan import choose
from calib.schemes import KV_SCHEMES
from exporter.recipe import Recipe, with_values
from exporter.reporting.report import Remedy, Report
from exporter.run.destination import Destination
from exporter.run.generic import check_generic
from exporter.run.quantizing import check_names, customised_scheme
from exporter.run.remedy_rules import RULES, Case, Change, Rule

SHOWN = 5
"""Remedies of a report at most."""
_TRUSTED = {"trust_remote_code": True}
"""What a recipe in a folder does not say."""


def remedies_of(
    report: Report, recipe: Recipe, config: Mapping[str, Any], linears: Sequence[str]
) -> list[Remedy]:
    """What would most likely mend what failed; nothing where nothing did.

    Args:
        report: of a run.
        recipe: of that run, for one target.
        config: Hugging Face config of the model.
        linears: names of all that is quantized.
    """
    family = architecture_of(config)
    case = Case(report, recipe, family.how == "generic")
    found = []
    for rule in RULES:
        if not any(fault in case.missed for fault in rule.mends) or not rule.when(case):
            continue
        changes = rule.changes(case)
        change = next(
            (each for each in changes if _possible(each, recipe, config, family, linears)), None
        )
        if change is not None:
            found.append(_remedy(rule, change, case))
    return sorted(found, key=lambda remedy: _doubt(remedy, case))[:SHOWN]


def _remedy(rule: Rule, change: Change, case: Case) -> Remedy:
    ratio, expected = _expected(rule, case)
    stages = {name: spent for name, spent in case.report.seconds.items() if name != "verify"}
    again = sum(stages.values()) + (rule.longer - 1) * stages.get("calibrate", 0.0)
    return Remedy(
        name=rule.name,
        change={**change, **_TRUSTED} if case.recipe.trust_remote_code else dict(change),
        why=rule.why,
        expected=expected,
        expected_ratio=ratio,
        seconds=again or None,
    )


def _expected(rule: Rule, case: Case) -> tuple[float | None, str]:
    """The perplexity ratio to expect, and in words."""
    row = case.ratio
    if rule.left is None or row is None or not row.measured or row.measured <= 1:
        return None, ""
    ratio = row.measured**rule.left
    return ratio, f"a perplexity ratio of about {ratio:.2f} instead of {row.measured:.2f}"


def _doubt(remedy: Remedy, case: Case) -> int:
    """0 where the bound is expected to be held, 1 where nothing is known, 2 where it is not."""
    if remedy.expected_ratio is None or case.ratio is None or case.ratio.bound is None:
        return 1
    return 0 if remedy.expected_ratio <= case.ratio.bound else 2


def _possible(
    change: Change,
    recipe: Recipe,
    config: Mapping[str, Any],
    family: Architecture,
    linears: Sequence[str],
) -> bool:
    """Whether a run with ``change`` would begin."""
    try:
        changed = with_values(recipe, change)
        check_names(changed)
        check_generic(changed, family, "export", quiet=True)
        outside = (*(table.name for table in family.embeddings), family.head.name)
        decoder = {name: name for name in linears if name not in outside}
        schemes = choose(customised_scheme(changed), changed.overrides, decoder, outside).linears
        Destination.of(changed).check(
            changed,
            config,
            {name: linear for name, linear in schemes.items() if linear is not None},
            None if changed.kv is None else KV_SCHEMES[changed.kv],
            changed.rotate.certain,
            changed.certain_prefix,
        )
    except RotqError:
        return False
    return True
