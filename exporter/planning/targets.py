"""What a plan can say of the targets from headers alone: their dtypes, and what they refuse or run
slowly.
"""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from backends.asking import check, warnings_of
from backends.base import Backend, Request
from backends.registry import get_backend, target_of
from calib.schemes import KV_SCHEMES, LinearScheme, scheme_named
from exporter.planning.headers import ArtifactHeaders, CheckpointHeaders
from exporter.recipe import Recipe, asked_for
from exporter.run.dtypes import common_dtype, dtype_of
from exporter.run.quantizing import customised_scheme


def planned_dtypes(
    recipe: Recipe, checkpoint: CheckpointHeaders, *, calibrated: bool
) -> dict[str, str]:
    """What each target computes in, by its name.

    Args:
        recipe: names backend and targets.
        checkpoint: the model, or the artifact.
        calibrated: whether it is an artifact, which can be written in any dtype.

    Raises:
        BackendError: no such backend or target, or targets that no one calibration serves.
    """
    backend, targets = _resolved(recipe)
    if not calibrated:
        common_dtype(recipe, backend, targets, lambda: checkpoint.dtype)
    return {
        target: dtype_of(recipe, backend, target, lambda: checkpoint.dtype) for target in targets
    }


def planned_warnings(recipe: Recipe, artifact: ArtifactHeaders) -> list[str]:
    """What the targets run slowly.

    Args:
        recipe: names backend and targets.
        artifact: what they are given.

    Raises:
        BackendError: a target cannot express the model.
    """
    backend, targets = _resolved(recipe)
    found = []
    for target in targets:
        request = Request(
            target,
            linears=artifact.linears,
            cache=artifact.cache,
            rotations=artifact.rotations,
            config=artifact.checkpoint.config,
            logits=recipe.logits,
            kv_buffer=recipe.kv_buffer,
            dtype=recipe.dtype,
        )
        check(backend, request)
        found += [
            f"target '{target}': {warning}"
            for warning in warnings_of(backend, target, artifact.linears)
        ]
    return found


def planned_artifact(
    recipe: Recipe, checkpoint: CheckpointHeaders, linears: Collection[str]
) -> ArtifactHeaders:
    """What calibrating would make of a model; of rotations, those that are certain.

    Linears are found by the rules of :func:`calib.quantizing.plan.resolve`, over the names in the
    file: parsing the config takes libraries that a plan does without.

    Args:
        recipe: scheme, overrides, cache and rotations.
        checkpoint: the model.
        linears: names of the decoder's linears.
    """
    chosen: dict[str, LinearScheme | None] = dict.fromkeys(
        linears, customised_scheme(recipe).linear
    )
    tensors = {tensor.name.removesuffix(".weight") for tensor in checkpoint.tensors}
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
        tuple(asked_for(recipe.rotate)),
    )


def _resolved(recipe: Recipe) -> tuple[Backend, list[str]]:
    backend = get_backend(recipe.backend)
    return backend, [target_of(backend, target) for target in recipe.targets]
