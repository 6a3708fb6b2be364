"""What a run does without where the family of a model is not in the table. Imports no torch.

Which linears there are is known then, and how they are wired is not. So whatever folds something,
or reaches into attention, is refused with the reason; and a run that writes is always checked
against the original: a linear that was found where there is none cannot pass parity.
"""

from __future__ import annotations

import logging

from calib.architectures import Architecture
from calib.architectures.generic import GENERIC, UNKNOWN_WIRING
from calib.errors import CheckpointError, RecipeError, RotationError
from exporter.recipe import Recipe

logger = logging.getLogger(__name__)

_CHECK = "only the parity check shows that its linears were found rightly"
_UNREACHED = "which of its modules attend, and how, is not known"


def check_generic(
    recipe: Recipe,
    family: Architecture,
    goal: str,
    *,
    verify: bool = True,
    original: bool = True,
    quiet: bool = False,
) -> None:
    """Refuse what cannot be done to a model whose family is not in the table, and say in one line
    what is done without.

    Args:
        recipe: what is asked for.
        family: of :mod:`calib.architectures.generic`; one of the table passes.
        goal: the command: ``export``, ``calibrate``, ``capture``, ``rotate`` or ``stats``.
        verify: whether what is written is checked.
        original: whether the model is at hand that it is checked against.
        quiet: only refuse.

    Raises:
        RotationError: a rotation is asked for.
        CheckpointError: the original is not at hand.
        RecipeError: anything else that is, or the check is left out.
    """
    if family.how != "generic":
        return
    what = f"'{family.name}' is not in the architecture table"
    if recipe.rotate.certain or recipe.rotation.files:
        asked = ",".join(recipe.rotate.certain).upper() or "a file of rotations"
        raise RotationError(
            f"{asked} is refused for {family.name}: {UNKNOWN_WIRING}", hint="give --rotate none"
        )
    if goal in ("rotate", "capture"):
        raise RotationError(
            f"there is nothing to {goal}: {what}, so that it is not rotated",
            hint="rotq export quantizes it as it is",
        )
    settings = {
        "--smoothing": (recipe.smoothing != "none", UNKNOWN_WIRING),
        "--kv": (recipe.kv is not None, _UNREACHED),
        "--prefix": (bool(recipe.certain_prefix), _UNREACHED),
        "--layerwise": (recipe.layerwise.enabled, "how its blocks are called is not known"),
    }
    for option, (asked_for, reason) in settings.items():
        if asked_for:
            raise RecipeError(
                f"{option} is refused for {family.name}: {reason}; {what}",
                hint=f"leave {option} out",
            )
    if not verify:
        raise RecipeError(
            f"--no-verify is refused for {family.name}: {what}, and {_CHECK}",
            hint="leave --no-verify out",
        )
    if not original:
        raise CheckpointError(
            f"the original of the artifact is not at hand: {what}, and {_CHECK}",
            hint="name it with -m/--model",
        )
    if not quiet:
        logger.warning("%s: %s", family.name, GENERIC)
