"""What targets cannot express, as data. Torch-free, for ``rotq backends``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from backends.facts import How, Runtime, stated
from calib.schemes import LinearScheme, TensorScheme


@dataclass(frozen=True)
class Rule:
    """Something that a target cannot express, or expresses at a price."""

    when: Callable[[LinearScheme], bool]
    reason: str
    of: tuple[Runtime, ...] = ()
    """The runtimes that the reason speaks of; none where it is the file that has no place for
    it.
    """
    how: How = "tested"
    """How that is known of them."""
    shown: str = ""
    """The test that shows it."""

    def words(self) -> str:
        """The reason, with the versions that it speaks of where these are not installed here."""
        return stated(self.reason, self.of)


def first_reason(rules: Sequence[Rule], scheme: LinearScheme) -> str | None:
    """The reason of the first of ``rules`` that applies to ``scheme``; ``None`` if none does."""
    return next((rule.words() for rule in rules if rule.when(scheme)), None)


def tensor_schemes(scheme: LinearScheme) -> list[TensorScheme]:
    """That of the weight and, where the input is quantized, that of the input."""
    return [scheme.weight, *([scheme.input] if scheme.input is not None else [])]


def is_dynamic(scheme: LinearScheme) -> bool:
    """Whether scales of the input are computed while running."""
    return scheme.input is not None and scheme.input.dynamic
