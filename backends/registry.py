"""Finding backends: built-in and third-party ones alike come from the entry-point group ``rotq.backends``.

An entry point names a callable without arguments that returns a :class:`~backends.base.Backend`. One that fails to load
is listed with its error and never stops the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from backends.base import Backend
from calib.errors import BackendError
from calib.schemes import SCHEMES

GROUP = "rotq.backends"


@dataclass(frozen=True)
class BackendInfo:
    """One registered backend, as ``rotq backends`` lists it."""

    name: str
    distribution: str
    targets: tuple[str, ...]
    schemes: Mapping[str, Mapping[str, str | None]]
    """target -> scheme -> why the target cannot express it, ``None`` if it can."""
    error: str | None = None
    """Why the plugin could not be loaded; the other fields are empty then."""


def available() -> list[BackendInfo]:
    """Every registered backend, by name. Imports no runtime and no torch."""
    return [_describe(entry) for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)]


def get_backend(name: str) -> Backend:
    """Load the backend called ``name``.

    Raises:
        BackendError: no such backend, or its plugin fails to load.
    """
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        raise BackendError(
            f"unknown backend '{name}'", hint=f"installed backends: {', '.join(sorted(found)) or 'none'}"
        )
    try:
        backend: Backend = found[name].load()()
    except Exception as error:
        raise BackendError(
            f"backend '{name}' of {_distribution(found[name])} failed to load: {error}",
            hint="reinstall or remove that package",
        ) from error
    return backend


def check_target(backend: Backend, scheme: str, target: str | None) -> str:
    """The target to write for, after checking that it can express ``scheme``.

    Raises:
        BackendError: unknown target, or one that cannot express the scheme; the hint lists what would work.
    """
    if target is not None and target not in backend.targets:
        raise BackendError(
            f"backend '{backend.name}' has no target '{target}'", hint=f"its targets are: {', '.join(backend.targets)}"
        )
    chosen = target or backend.targets[0]
    reason = backend.refusal(scheme, chosen)
    if reason is not None:
        possible = [name for name in SCHEMES if backend.refusal(name, chosen) is None]
        raise BackendError(
            f"target '{chosen}' of backend '{backend.name}' cannot express scheme '{scheme}': {reason}",
            hint=f"schemes it can express: {', '.join(possible)}",
        )
    return chosen


def _describe(entry: EntryPoint) -> BackendInfo:
    try:
        backend: Backend = entry.load()()
        schemes = {target: {name: backend.refusal(name, target) for name in SCHEMES} for target in backend.targets}
    except Exception as error:  # a broken plugin must not take the list down
        return BackendInfo(entry.name, _distribution(entry), (), {}, f"{type(error).__name__}: {error}")
    return BackendInfo(backend.name, _distribution(entry), backend.targets, schemes)


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "unknown distribution"
