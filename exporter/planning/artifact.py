"""What calibrating would make of a model, as far as headers tell."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from calib.schemes import KV_SCHEMES, LinearScheme, scheme_named
from exporter.planning.headers import ArtifactHeaders, CheckpointHeaders
from exporter.recipe import Recipe
from exporter.run.quantizing import customised_scheme


def planned_artifact(
    recipe: Recipe,
    checkpoint: CheckpointHeaders,
    linears: Collection[str],
    outside: Collection[str],
) -> ArtifactHeaders:
    """What calibrating would make of a model; of rotations, those that are certain.

    Linears are found by the rules of :func:`calib.quantizing.plan.resolve`, over the names in the
    file: parsing the config takes libraries that a plan does without.

    Args:
        recipe: scheme, overrides, cache and rotations.
        checkpoint: the model.
        linears: names of the decoder's linears.
        outside: names of embeddings and of the output head, which may be tied.
    """
    chosen: dict[str, LinearScheme | None] = dict.fromkeys(
        linears, customised_scheme(recipe).linear
    )

    tensors = {tensor.name.removesuffix(".weight") for tensor in checkpoint.tensors}
    tensors |= set(outside)
    for pattern, name in recipe.overrides.items():
        matched = (
            [pattern]
            if pattern in tensors
            else [linear for linear in linears if fnmatchcase(linear, pattern)]
        )
        chosen.update(dict.fromkeys(matched, scheme_named(name).linear))
    return ArtifactHeaders(
        checkpoint,
        {name: scheme for name, scheme in chosen.items() if scheme is not None},
        None if recipe.kv is None else KV_SCHEMES[recipe.kv],
        recipe.rotate.certain,
    )
