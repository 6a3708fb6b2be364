"""What calibrating would make of a model, as far as headers tell."""

from __future__ import annotations

from collections.abc import Sequence

from calib.architectures import Architecture
from calib.architectures.stored import canonical_name
from calib.quantizing.plan import choose, nothing_matches
from calib.schemes import KV_SCHEMES
from exporter.planning.headers import ArtifactHeaders, CheckpointHeaders
from exporter.recipe import Recipe
from exporter.run.quantizing import customised_scheme

_EXPERTS = ".experts."


def planned_artifact(
    recipe: Recipe,
    checkpoint: CheckpointHeaders,
    family: Architecture,
    linears: Sequence[str],
) -> ArtifactHeaders:
    """What calibrating would make of a model; of rotations, those that are certain.

    Linears are found by the rules of :func:`calib.quantizing.plan.choose`, over the names in the
    file: parsing the config takes libraries that a plan does without.

    Args:
        recipe: scheme, overrides, cache and rotations.
        checkpoint: the model.
        family: that of the model.
        linears: names of the decoder's linears, as stored.

    Raises:
        QuantizationError: an override matches nothing. Experts have names of their own in the run,
            several for one stored tensor, so with any of them it is left to the run.
    """
    outside = (*(table.name for table in family.embeddings), family.head.name)
    names = {linear: canonical_name(linear, family, ()) for linear in linears}
    choice = choose(customised_scheme(recipe), recipe.overrides, names, outside)
    if choice.unmatched and not any(_EXPERTS in name for name in linears):
        raise nothing_matches(choice.unmatched[0], list(names.values()), outside)
    return ArtifactHeaders(
        checkpoint,
        {name: scheme for name, scheme in choice.linears.items() if scheme is not None},
        None if recipe.kv is None else KV_SCHEMES[recipe.kv],
        recipe.rotate.certain,
    )
