"""Finding backends: built-in and third-party ones alike come from the entry-point group
``rotq.backends``.

An entry point names a callable without arguments that returns a :class:`~backends.base.Backend`.
One that fails to load is listed with its error and never stops the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from backends.base import Backend
from calib.architectures.spec import KINDS
from calib.errors import BackendError
from calib.schemes import (
    FLOAT,
    KV_SCHEMES,
    LINEAR_SCHEMES,
    LinearScheme,
    TensorScheme,
    linear_words,
)

GROUP = "rotq.backends"


@dataclass(frozen=True)
class BackendInfo:
    """One registered backend, as ``rotq backends`` lists it."""

    name: str
    distribution: str
    targets: tuple[str, ...]
    schemes: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    """target -> scheme -> why the target cannot express it, ``None`` if it can."""
    warnings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """target -> scheme -> what the target makes of it instead of running it fast; only where there
    is something.
    """
    caches: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    """target -> format of the KV cache -> why the target cannot express it, ``None`` if it can."""
    rotations: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    """target -> kind of rotation -> why the target cannot express it, ``None`` if it can."""
    error: str | None = None
    """Why the plugin could not be loaded; the other fields are empty then."""


def available() -> list[BackendInfo]:
    """Every registered backend, by name. Imports no runtime and no torch."""
    return [
        _describe(entry)
        for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    ]


def get_backend(name: str) -> Backend:
    """Load the backend called ``name``.

    Raises:
        BackendError: no such backend, or its plugin fails to load.
    """
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        raise BackendError(
            f"unknown backend '{name}'",
            hint=f"installed backends: {', '.join(sorted(found)) or 'none'}",
        )
    try:
        backend: Backend = found[name].load()()
    except Exception as error:
        raise BackendError(
            f"backend '{name}' of {_distribution(found[name])} failed to load: {error}",
            hint="reinstall or remove that package",
        ) from error
    return backend


def target_of(backend: Backend, target: str | None) -> str:
    """``target``, or the backend's default where it is ``None``.

    Raises:
        BackendError: the backend has no such target.
    """
    if target is not None and target not in backend.targets:
        raise BackendError(
            f"backend '{backend.name}' has no target '{target}'",
            hint=f"its targets are: {', '.join(backend.targets)}",
        )
    return target or backend.targets[0]


def check_target(backend: Backend, schemes: Mapping[str, LinearScheme], target: str | None) -> str:
    """The target to write for, after checking that it can express every linear.

    Args:
        backend: what writes.
        schemes: how linears are quantized, by what the error calls them: the scheme's name, or
            modules.
        target: one of its targets, or ``None`` for its default.

    Raises:
        BackendError: unknown target, or one that cannot express a scheme; the hint lists what would
            work.
    """
    chosen = target_of(backend, target)
    for name, scheme in schemes.items():
        reason = backend.refusal(scheme, chosen)
        if reason is not None:
            possible = [
                name
                for name, linear in LINEAR_SCHEMES.items()
                if backend.refusal(linear, chosen) is None
            ]
            raise BackendError(
                f"target '{chosen}' of backend '{backend.name}' cannot express {name}: {reason}",
                hint=f"schemes it can express: {', '.join([FLOAT, *possible])}",
            )
    return chosen


def check_cache(backend: Backend, cache: TensorScheme | None, target: str) -> None:
    """Refuse a quantized KV cache that ``target`` cannot express.

    Raises:
        BackendError: with the reason.
    """
    reason = None if cache is None else backend.cache_refusal(cache, target)
    if cache is not None and reason is not None:
        raise BackendError(
            f"target '{target}' of backend '{backend.name}' cannot express a KV cache of"
            f" {cache.format.name}: {reason}",
            hint="calibrate without --kv, or choose another target",
        )


def check_expressible(
    backend: Backend, target: str, linears: Mapping[str, LinearScheme], cache: TensorScheme | None
) -> None:
    """Refuse a model of which ``target`` cannot express something.

    Args:
        backend: what writes.
        target: one of its targets.
        linears: how each linear is quantized, by module name.
        cache: how the KV cache is, if it is.

    Raises:
        BackendError: naming the first linear that it cannot express, or the cache.
    """
    first: dict[LinearScheme, str] = {}
    for name, scheme in linears.items():
        first.setdefault(scheme, f"'{name}'")
    check_target(backend, {name: scheme for scheme, name in first.items()}, target)
    check_cache(backend, cache, target)


def expressible(
    backend: Backend,
    target: str,
    linears: Collection[LinearScheme],
    cache: TensorScheme | None,
    rotations: Collection[str] = (),
) -> bool:
    """Whether ``target`` can express linears of these schemes, this cache and these kinds of
    rotations.
    """
    return (
        all(backend.refusal(scheme, target) is None for scheme in linears)
        and (cache is None or backend.cache_refusal(cache, target) is None)
        and all(backend.rotation_refusal(kind, target) is None for kind in rotations)
    )


def check_model(
    backend: Backend, target: str, config: Mapping[str, Any], linears: Mapping[str, LinearScheme]
) -> None:
    """Refuse a model that ``target`` cannot express.

    Args:
        backend: what writes.
        target: one of its targets.
        config: Hugging Face config.
        linears: how what is quantized is, by module name.

    Raises:
        BackendError: with the reason, and what to do.
    """
    refused = backend.model_refusal(config, linears, target)
    if refused is not None:
        reason, hint = refused
        raise BackendError(
            f"target '{target}' of backend '{backend.name}' cannot express this model: {reason}",
            hint=hint,
        )


def check_logits(backend: Backend, target: str, logits: str) -> None:
    """Refuse logits of the last token alone where ``target`` cannot be written so.

    Raises:
        BackendError: with the reason.
    """
    if logits == "last":
        _check_written(backend, target, "--logits", logits, backend.logits_refusal(target))


def check_kv_buffer(backend: Backend, target: str, kv_buffer: str) -> None:
    """Refuse keys and values in one shared buffer where ``target`` cannot be written so.

    Raises:
        BackendError: with the reason.
    """
    if kv_buffer == "shared":
        _check_written(backend, target, "--kv-buffer", kv_buffer, backend.kv_buffer_refusal(target))


def check_dtype(backend: Backend, target: str, dtype: str) -> None:
    """Refuse a dtype that ``target`` does not compute in; ``auto`` asks for none.

    Raises:
        BackendError: with the reason.
    """
    if dtype != "auto":
        _check_written(backend, target, "--dtype", dtype, backend.dtype_refusal(dtype, target))


def _check_written(
    backend: Backend, target: str, option: str, value: str, reason: str | None
) -> None:
    if reason is not None:
        raise BackendError(
            f"target '{target}' of backend '{backend.name}' cannot be written with {option}"
            f" {value}: {reason}",
            hint=f"leave {option} out",
        )


def check_rotations(backend: Backend, target: str, kinds: Collection[str]) -> None:
    """Refuse rotations that ``target`` cannot express.

    Raises:
        BackendError: with the reason.
    """
    for kind in kinds:
        reason = backend.rotation_refusal(kind, target)
        if reason is not None:
            raise BackendError(
                f"target '{target}' of backend '{backend.name}' cannot express {kind.upper()}:"
                f" {reason}",
                hint=f"calibrate without {kind} in --rotate, or choose another target",
            )


def warnings_of(backend: Backend, target: str, linears: Mapping[str, LinearScheme]) -> list[str]:
    """What ``target`` expresses but does not run fast, a sentence for each kind of linear."""
    counts = Counter(linears.values())
    found = ((scheme, count, backend.warning(scheme, target)) for scheme, count in counts.items())
    return [
        f"{count} linear{'s' if count > 1 else ''} with {linear_words(scheme)}: {warning}"
        for scheme, count, warning in found
        if warning is not None
    ]


def _describe(entry: EntryPoint) -> BackendInfo:
    distribution = _distribution(entry)
    try:
        backend: Backend = entry.load()()
        return BackendInfo(
            backend.name,
            distribution,
            tuple(backend.targets),
            schemes={target: _schemes(backend, target) for target in backend.targets},
            warnings={target: _warnings(backend, target) for target in backend.targets},
            caches={
                target: {
                    name: backend.cache_refusal(cache, target) for name, cache in KV_SCHEMES.items()
                }
                for target in backend.targets
            },
            rotations={
                target: {kind: backend.rotation_refusal(kind, target) for kind in KINDS}
                for target in backend.targets
            },
        )
    except Exception as error:  # a broken plugin must not take the list down
        return BackendInfo(entry.name, distribution, (), error=f"{type(error).__name__}: {error}")


def _schemes(backend: Backend, target: str) -> dict[str, str | None]:
    return {
        FLOAT: None,
        **{name: backend.refusal(linear, target) for name, linear in LINEAR_SCHEMES.items()},
    }


def _warnings(backend: Backend, target: str) -> dict[str, str]:
    able = (
        name
        for name, reason in _schemes(backend, target).items()
        if reason is None and name != FLOAT
    )
    found = {name: backend.warning(LINEAR_SCHEMES[name], target) for name in able}
    return {name: warning for name, warning in found.items() if warning is not None}


def _distribution(entry: EntryPoint) -> str:
    return (
        f"{entry.dist.name} {entry.dist.version}"
        if entry.dist is not None
        else "unknown distribution"
    )
