"""The table of what is taken for granted of runtimes, generated from the targets' rules and
:mod:`backends.known`.

``python -m exporter.tables.facts_table`` writes it into ``docs/runtime-facts.md`` between its
markers; a test fails while they differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from backends.facts import Fact, How, Runtime
from backends.known import FACTS
from backends.onnx.targets import TARGETS as ONNX
from backends.rules import Rule
from backends.safetensors.targets import TARGETS as SAFETENSORS
from backends.safetensors.targets import Target
from calib.architectures.spec import KINDS
from calib.errors import OutputError
from calib.schemes import KV_SCHEMES

BEGIN, END = "<!-- facts -->", "<!-- end of facts -->"


def all_facts() -> list[Fact]:
    """What rules say, then what is relied on elsewhere."""
    return [*_of_onnx(), *_of_safetensors(), *FACTS]


def facts_table() -> str:
    """One Markdown row for each fact."""
    header = ("relied on by", "fact", "known by", "seen in", "shown by")
    rows = [header, ("---",) * len(header), *map(_row, all_facts())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_facts(text: str) -> str:
    """``text`` with the table between the markers.

    Raises:
        OutputError: ``text`` lacks a marker.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise OutputError(f"there are no lines '{BEGIN}' and '{END}'")
    return f"{before}{BEGIN}\n\n{facts_table()}\n\n{END}{after}"


def _of_onnx() -> Iterable[Fact]:
    for name, target in ONNX.items():
        refuses, warns = f"`onnx/{name}` refuses", f"`onnx/{name}` warns"
        if target.asked is not None:
            warns += ", if not asked"
        yield from (_of_rule(rule, refuses, (), "format") for rule in target.rules)
        yield from (_of_rule(rule, warns, (), "tried") for rule in target.warnings)
        for text in dict.fromkeys(target.caches.values()):
            yield Fact((target.runtime,), "tried", text, refuses)
        if target.shared_buffer is not None:
            yield Fact((target.runtime,), "tested", target.shared_buffer, refuses)


def _of_safetensors() -> Iterable[Fact]:
    """Of one format there are targets that share reasons: those are one line."""
    where: dict[Fact, list[str]] = {}
    for name, target in SAFETENSORS.items():
        for fact in _of_target(target):
            where.setdefault(fact, []).append(name)
    for fact, names in where.items():
        yield replace(fact, where=f"`safetensors/{', '.join(names)}` {fact.where}")


def _of_target(target: Target) -> Iterable[Fact]:
    """Each with what the target does by it (``refuses``, ``warns``) in place of where."""
    for rule in target.rules:
        yield _of_rule(rule, "refuses", (target.of,), target.how)
    for rule in target.warnings:
        named = tuple(target.named_in(rule.reason))
        how: How = "tried" if named == (target.of,) else "read"
        yield _of_rule(rule, "warns", named, how)
    caches = [target.cache_refusal(cache) for cache in KV_SCHEMES.values()]
    kinds = [target.rotation_refusal(kind) for kind in KINDS]
    for text in dict.fromkeys(text for text in (*caches, *kinds) if text is not None):
        yield _stated(target, text, "refuses")
    warned = (target.rotation_warning(kind) for kind in KINDS)
    yield from (_stated(target, text, "warns") for text in warned if text is not None)


def _stated(target: Target, text: str, where: str) -> Fact:
    """A reason without a rule: it speaks of the readers that it names."""
    named = tuple(target.named_in(text))
    return Fact(named, target.how if named == (target.of,) else "read", text, where)


def _of_rule(rule: Rule, where: str, runtimes: tuple[Runtime, ...], how: How) -> Fact:
    """A rule that says of what it speaks says how that is known; else ``runtimes`` and ``how``."""
    if rule.of:
        return Fact(rule.of, rule.how, rule.reason, where, rule.shown)
    return Fact(runtimes, how, rule.reason, where, rule.shown)


def _row(fact: Fact) -> tuple[str, ...]:
    where = fact.where if fact.where.startswith("`") else f"`{fact.where}`"
    shown = f"`{fact.shown}`" if fact.shown else ""
    return (where, fact.text.replace("|", "\\|"), fact.how, fact.versions, shown)


def _main(path: Path) -> None:
    path.write_text(with_facts(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    _main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/runtime-facts.md"))
