"""From options to a validated recipe and run options, before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import OutputError, RecipeError, did_you_mean
from calib.schemes import KV_SCHEMES, SCHEMES
from exporter.cli.errors import UsageError
from exporter.cli.options import OutputFlags, ResumeFlags
from exporter.flags import option_of
from exporter.run.named_targets import known_targets, with_backend

if TYPE_CHECKING:
    from exporter.recipe import Recipe

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def resolve(
    source: str | None, flags: Mapping[str, Any], from_artifact: Path | None = None
) -> Recipe:
    """The recipe of a run: options over recipe file over defaults.

    Args:
        source: ``--recipe``.
        flags: what options override (:func:`exporter.cli.overrides.overrides`).
        from_artifact: a quantized model to start from; without ``--recipe``, the recipe saved with
            it applies.

    Raises:
        UsageError: an option is at fault.
        RotqError: the recipe is at fault.
    """
    from exporter.recipe import RECIPE_FILE, Recipe, load_recipe

    if from_artifact is not None:
        fixed = [option_of(key) for key in flags if Recipe.scope(key).fixed_by_artifact]
        if fixed:
            raise UsageError(
                f"{fixed[0]} has no effect with --from-artifact: the artifact is quantized already",
                hint="run 'rotq calibrate' again with that option, or leave it out",
            )
        if source is None and (from_artifact / RECIPE_FILE).is_file():
            source = str(from_artifact / RECIPE_FILE)
            # What it was calibrated in is no wish for what it is written in: targets have dtypes of
            # their own.
            flags = {"dtype": "auto", **flags}
    _check_names(flags)
    flags = with_backend(flags, load_recipe(source).backend)
    try:
        recipe = load_recipe(source, flags)
    except RecipeError as error:
        load_recipe(source)  # raises again if the file itself is at fault
        raise UsageError(
            _in_terms_of_options(error.message, flags), hint="'rotq export --help' describes it"
        ) from error
    _check_consistency(recipe, flags)
    return recipe


def check_output(
    output: OutputFlags, recipe: Recipe, goal: str, resume: ResumeFlags | None = None
) -> Path:
    """The output folder, by default one that is named after what is in it; refused now rather than
    after the long job.

    Raises:
        UsageError: options that do not go together.
        OutputError: the folder exists, or cannot be created.
    """
    from exporter.output import check_target
    from exporter.run.destination import default_output

    if resume is not None and resume.resume and resume.work_dir is None:
        raise UsageError(
            "--resume needs --work-dir", hint="give the folder that the interrupted run was given"
        )
    folder = default_output(recipe, goal) if output.output is None else output.output
    if output.output is None and output.dry_run:
        return folder
    try:
        check_target(folder, output.overwrite)
    except OSError as error:
        raise OutputError(
            f"cannot use '{folder}': {error.strerror}", hint="choose another -o/--output"
        ) from error
    return folder


def check_backend(recipe: Recipe, flags: Mapping[str, Any], *, write: bool = True) -> None:
    """Refuse a backend or target that does not exist, and, to ``write``, what it cannot express of
    the recipe.

    Raises:
        UsageError: ``--backend`` or ``--target`` names something that does not exist.
        BackendError: the recipe does, or the target cannot express the scheme, the cache or the
            rotations.
    """
    from backends.asking import check
    from backends.base import Request
    from backends.registry import available, get_backend, target_of
    from exporter.run.quantizing import customised_scheme

    backends = {info.name: info for info in available()}
    if "backend" in flags and recipe.backend not in backends:
        raise UsageError(
            f"unknown --backend '{recipe.backend}'",
            hint=f"{did_you_mean(recipe.backend, backends)}installed:"
            f" {', '.join(backends) or 'none'}",
        )
    backend = get_backend(recipe.backend)
    unknown = [
        target for target in recipe.targets if target is not None and target not in backend.targets
    ]
    if "target" in flags and unknown:
        raise UsageError(
            f"backend '{recipe.backend}' has no --target '{unknown[0]}'",
            hint=f"{did_you_mean(unknown[0], known_targets())}its targets are:"
            f" {', '.join(backend.targets)}",
        )
    linear = customised_scheme(recipe).linear
    for name in recipe.targets if write else ():
        request = Request(
            target_of(backend, name),
            linears={} if linear is None else {recipe.scheme: linear},
            cache=KV_SCHEMES[recipe.kv] if recipe.kv else None,
            rotations=recipe.rotate.certain,
            logits=recipe.logits,
            kv_buffer=recipe.kv_buffer,
            int8_weights=recipe.int8_weights,
            dtype=recipe.dtype,
            prefix=recipe.certain_prefix,
        )
        check(backend, request, called=f"scheme '{recipe.scheme}'")


def check_device(device: str) -> None:
    """Refuse a ``--device`` that cannot exist; whether it does exist, only torch knows.

    Raises:
        UsageError: it is misspelt.
    """
    if not _DEVICE.fullmatch(device):
        raise UsageError(
            f"unknown --device '{device}'", hint="the devices are: auto, cpu, cuda, cuda:N"
        )


def _check_names(flags: Mapping[str, Any]) -> None:
    scheme = flags.get("scheme")
    if scheme is not None and scheme not in SCHEMES:
        raise UsageError(
            f"unknown --scheme '{scheme}'",
            hint=f"{did_you_mean(scheme, SCHEMES)}the schemes are: {', '.join(SCHEMES)}",
        )
    check_device(flags.get("device", "auto"))


def _check_consistency(recipe: Recipe, flags: Mapping[str, Any]) -> None:
    """Refuse what would be silently ignored or fail late."""
    for kind, training in (("r1", recipe.rotation.r1), ("r2", recipe.rotation.r2)):
        if f"rotation.{kind}.lr" in flags and training.optimizer == "monotone":
            raise UsageError(
                f"--{kind}-lr has no effect: the monotone optimizer has no learning rate",
                hint=f"add --rotation-optimizer qr, or leave --{kind}-lr out",
            )
    if "layerwise.max_memory" in flags and not recipe.layerwise.enabled:
        raise UsageError(
            "--max-memory has no effect without --layerwise",
            hint="add --layerwise, or leave it out",
        )
    from exporter.run.quantizing import check_names

    try:
        check_names(recipe)
    except RecipeError as error:
        option = next((each for each in flags if _speaks_of(error.message, each)), None)
        if option is None:
            raise
        message = re.sub(r"^recipe key '[^']*'", option_of(option), error.message)
        hint = error.hint or "'rotq export --help' describes it"
        raise UsageError(message, hint=hint) from error
    if not _DEVICE.fullmatch(recipe.device):
        raise RecipeError(
            f"recipe key 'device': '{recipe.device}' is no device",
            hint="the devices are: auto, cpu, cuda, cuda:N",
        )


def _speaks_of(message: str, key: str) -> bool:
    """Whether an error is about the recipe key ``key``, or one inside or around it."""
    found = re.match(r"recipe key '([^']*)'", message)
    return found is not None and (
        f"{found[1]}.".startswith(f"{key}.") or f"{key}.".startswith(f"{found[1]}.")
    )


def _in_terms_of_options(message: str, flags: Mapping[str, Any]) -> str:
    for key in flags:
        message = message.replace(f"recipe key '{key}'", option_of(key))
    return message
