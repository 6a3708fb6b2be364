"""What targets cannot express, as data. Torch-free, for ``rotq backends``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from backends.base import Reason, Request
from backends.facts import How, Runtime, stated
from calib.schemes import LinearScheme, TensorScheme

__all__ = ["Limits", "Rule", "first_reason", "first_rule", "is_dynamic", "tensor_schemes"]


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


def _nothing(asked: object) -> str | None:
    """The answer of a target that has no such limit."""
    return None


@dataclass(frozen=True)
class Limits:
    """What one target cannot express, and what it runs slowly. By default it has no limits.

    Each function answers for one part of a request, with a reason or with ``None``.
    """

    linear: Callable[[LinearScheme], str | None] = _nothing
    """Why it cannot express a linear."""
    slow: Callable[[LinearScheme], str | None] = _nothing
    """What a linear that it can express falls back to."""
    cache: Callable[[TensorScheme], str | None] = _nothing
    """Why it cannot express a KV cache."""
    rotation: Callable[[str], str | None] = _nothing
    """Why it cannot express rotations of a kind."""
    slow_rotation: Callable[[str], str | None] = _nothing
    """What comes with rotations of a kind that it can express."""
    options: Mapping[str, str | Mapping[object, str]] = field(default_factory=dict)
    """Why it cannot be written with another value of an option than its default, by field of
    :class:`~backends.base.Request`; by value where some can be."""

    def reasons(self, request: Request) -> list[Reason]:
        """What speaks against ``request``, but for what depends on its config."""
        return [
            *self._of_linears(request.linears),
            *self._of_the_rest(request),
        ]

    def _of_linears(self, linears: Mapping[str, LinearScheme]) -> Iterator[Reason]:
        # thousands of linears share a few schemes
        answers: dict[LinearScheme, tuple[str | None, str | None]] = {}
        for name, scheme in linears.items():
            if scheme not in answers:
                refused = self.linear(scheme)
                # what runs slowly is no question of what does not run
                answers[scheme] = refused, self.slow(scheme) if refused is None else None
            refused, slow = answers[scheme]

            if refused is not None:
                yield Reason(refused, about="linear", name=name)
            elif slow is not None:
                yield Reason(slow, about="linear", name=name, severity="slow")

    def _of_the_rest(self, request: Request) -> Iterator[Reason]:
        refused = None if request.cache is None else self.cache(request.cache)
        if refused is not None:
            yield Reason(refused, about="cache")

        for kind in request.rotations:
            refused = self.rotation(kind)
            slow = self.slow_rotation(kind) if refused is None else None
            if refused is not None:
                yield Reason(refused, about="rotation", name=kind)
            elif slow is not None:
                yield Reason(slow, about="rotation", name=kind, severity="slow")

        for option, value in request.options().items():
            limit = self.options.get(option)
            refused = limit.get(value) if isinstance(limit, Mapping) else limit
            if refused is not None:
                yield Reason(refused, about="option", name=option)


def first_reason(rules: Sequence[Rule], scheme: LinearScheme) -> str | None:
    """The reason of the first of ``rules`` that applies to ``scheme``; ``None`` if none does."""
    rule = first_rule(rules, scheme)
    return None if rule is None else rule.words()


def first_rule(rules: Sequence[Rule], scheme: LinearScheme) -> Rule | None:
    """The first of ``rules`` that applies to ``scheme``; ``None`` if none does."""
    return next((rule for rule in rules if rule.when(scheme)), None)


def tensor_schemes(scheme: LinearScheme) -> list[TensorScheme]:
    """That of the weight and, where the input is quantized, that of the input."""
    return [scheme.weight, *([scheme.input] if scheme.input is not None else [])]


def is_dynamic(scheme: LinearScheme) -> bool:
    """Whether scales of the input are computed while running."""
    return scheme.input is not None and scheme.input.dynamic
