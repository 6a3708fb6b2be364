"""Finding backends: built-in and third-party ones alike come from the entry-point group
``rotq.backends``.

An entry point names a callable without arguments that returns a :class:`~backends.base.Backend`.
One that fails to load is listed with its error and never stops the others.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from backends.asking import reasons_against, refusal_of
from backends.base import CONTRACT_VERSION, OLDEST_CONTRACT, Backend, Request
from calib.architectures.spec import KINDS
from calib.errors import BackendError
from calib.reading import reason_of
from calib.schemes import FLOAT, KV_SCHEMES, LINEAR_SCHEMES

__all__ = ["GROUP", "BackendInfo", "available", "get_backend", "target_of"]

GROUP = "rotq.backends"
_T = TypeVar("_T")


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
    rotation_warnings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """target -> kind of rotation -> what comes with it there; only where there is something."""
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
        BackendError: no such backend, its plugin fails to load, or it was written for a version of
            the contract that this rotq does not take.
    """
    entries = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in entries:
        raise BackendError(
            f"unknown backend '{name}'",
            hint=f"installed backends: {', '.join(sorted(entries)) or 'none'}",
        )

    subject = f"backend '{name}' of {_distribution(entries[name])}"
    try:
        backend = _loaded(entries[name])
    except (Exception, SystemExit) as error:  # sys.exit at import is the plugin's end, not rotq's
        raise BackendError(
            f"{subject} failed to load: {reason_of(error)}",
            hint="reinstall or remove that package",
        ) from error

    strange = _strange_contract(backend)
    if strange is not None:
        reason, hint = strange
        raise BackendError(f"{subject} {reason}", hint=hint)
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


def _strange_contract(backend: Backend) -> tuple[str, str] | None:
    """Why ``backend`` cannot be talked to, and what to do; ``None`` if it can."""
    version = getattr(backend, "contract", 1)  # those of version 1 did not say so
    if OLDEST_CONTRACT <= version <= CONTRACT_VERSION:
        return None

    spoken = (
        f"version {CONTRACT_VERSION}"
        if OLDEST_CONTRACT == CONTRACT_VERSION
        else f"versions {OLDEST_CONTRACT} to {CONTRACT_VERSION}"
    )
    reason = (
        f"was written for version {version} of the backend contract, and this rotq takes {spoken}"
    )
    return reason, "update rotq" if version > CONTRACT_VERSION else "update that package"


def _loaded(entry: EntryPoint) -> Backend:
    """The backend; what its package prints meanwhile is no result of rotq."""
    with contextlib.redirect_stdout(sys.stderr):
        backend: Backend = entry.load()()
    return backend


def _describe(entry: EntryPoint) -> BackendInfo:
    distribution = _distribution(entry)
    try:
        backend = _loaded(entry)
        strange = _strange_contract(backend)
        if strange is not None:
            return BackendInfo(entry.name, distribution, (), error=f"it {strange[0]}")

        return BackendInfo(
            backend.name,
            distribution,
            tuple(backend.targets),
            schemes=_for_each_target(backend, _schemes),
            warnings=_for_each_target(backend, _warnings),
            caches=_for_each_target(backend, _caches),
            rotations=_for_each_target(backend, _rotations),
            rotation_warnings=_for_each_target(backend, _rotation_warnings),
        )
    except (Exception, SystemExit) as error:  # a broken plugin must not take the list down
        return BackendInfo(entry.name, distribution, (), error=f"{type(error).__name__}: {error}")


def _for_each_target(
    backend: Backend, answers: Callable[[Backend, str], dict[str, _T]]
) -> dict[str, dict[str, _T]]:
    return {target: answers(backend, target) for target in backend.targets}


def _schemes(backend: Backend, target: str) -> dict[str, str | None]:
    refusals = {
        name: refusal_of(backend, Request(target, linears={name: linear}))
        for name, linear in LINEAR_SCHEMES.items()
    }
    return {FLOAT: None, **refusals}


def _warnings(backend: Backend, target: str) -> dict[str, str]:
    return {
        name: reason.reason
        for name, linear in LINEAR_SCHEMES.items()
        for reason in reasons_against(backend, Request(target, linears={name: linear}))
        if reason.severity == "slow"
    }


def _caches(backend: Backend, target: str) -> dict[str, str | None]:
    return {
        name: refusal_of(backend, Request(target, cache=cache))
        for name, cache in KV_SCHEMES.items()
    }


def _rotations(backend: Backend, target: str) -> dict[str, str | None]:
    return {kind: refusal_of(backend, Request(target, rotations=(kind,))) for kind in KINDS}


def _rotation_warnings(backend: Backend, target: str) -> dict[str, str]:
    return {
        reason.name: reason.reason
        for reason in reasons_against(backend, Request(target, rotations=KINDS))
        if reason.severity == "slow" and reason.about == "rotation"
    }


def _distribution(entry: EntryPoint) -> str:
    return (
        f"{entry.dist.name} {entry.dist.version}"
        if entry.dist is not None
        else "unknown distribution"
    )
