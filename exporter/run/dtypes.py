"""Which dtype a run computes in, by name. Imports no torch, so that planning can use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backends.base import Backend
from calib.errors import BackendError
from exporter.recipe import Recipe

COMPUTED = ("float32", "float16", "bfloat16")
"""What a target can compute in."""


def dtype_of(recipe: Recipe, backend: Backend, target: str, own: Callable[[], str]) -> str:
    """What ``target`` computes in: the recipe's dtype, else the target's, else that of the weights.

    Args:
        recipe: may name one.
        backend: what writes.
        target: one of its targets.
        own: dtype of the checkpoint or artifact; asked only where nothing else decides.
    """
    if recipe.dtype != "auto":
        return recipe.dtype
    name = backend.compute_dtype(target) or own()
    return name if name in COMPUTED else "float32"


def common_dtype(
    recipe: Recipe, backend: Backend, targets: Sequence[str], own: Callable[[], str]
) -> str:
    """What all ``targets`` compute in; arguments as for :func:`dtype_of`.

    Raises:
        BackendError: they differ, and one calibration rounds to one dtype.
    """
    found = {target: dtype_of(recipe, backend, target, own) for target in targets}
    if len(set(found.values())) > 1:
        words = ", ".join(f"{target} in {name}" for target, name in found.items())
        raise BackendError(
            f"the targets compute in different dtypes: {words}",
            hint=(
                "give --dtype, or run 'rotq calibrate' once and 'rotq export --from-artifact' for"
                " all of them"
            ),
        )
    return found[targets[0]]
