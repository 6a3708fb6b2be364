"""How far a setting reaches: what of the recipe an artifact fixes, and what a run that is resumed.

The fields of the recipe say it themselves, by one of the values below in their annotation; a field
without one is :data:`CALIBRATED`, and a section's holds for all that is in it. Everybody else asks
:func:`scope_of`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel


@dataclass(frozen=True)
class Scope:
    """What keeps a setting from being another one later."""

    fixed_by_artifact: bool = True
    """A calibrated model was made with it: one that is written again keeps it, and an option that
    says otherwise is refused, not ignored.
    """
    fixed_by_work_dir: bool = True
    """A finished step of a run may depend on it: a resume with another value is refused."""


CALIBRATED = Scope()
"""Decides the numbers of the calibrated model."""
EACH_RUN = Scope(fixed_by_artifact=False)
"""What the run works with: where the original is found (its fingerprint says that it is the same),
and what computes.
"""
WRITING = Scope(fixed_by_artifact=False, fixed_by_work_dir=False)
"""How the calibrated model is written and checked."""
COST = Scope(fixed_by_work_dir=False)
"""What calibrating may take, or start from; no number depends on it, and it has no effect
afterwards."""


def scope_of(key: str, recipe: type[BaseModel]) -> Scope:
    """How far the setting ``key`` of ``recipe`` reaches.

    Args:
        key: dotted, such as ``layerwise.max_memory``; what follows the name of a field that is no
            section (a pattern in ``overrides``) does not matter.
        recipe: the class of the recipe.
    """
    section: type[BaseModel] = recipe
    scope = CALIBRATED

    for name in key.split("."):
        field = section.model_fields[name]
        scope = next((mark for mark in field.metadata if isinstance(mark, Scope)), scope)
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        section = field.annotation
    return scope
