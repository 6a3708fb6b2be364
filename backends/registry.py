"""Finding backends: built-in and third-party ones alike come from the entry-point group
``rotq.backends``.

An entry point names a callable without arguments that returns a :class:`~backends.base.Backend`.
One that fails to load, or takes too long, is listed with its error and never stops the others.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import TypeVar

from backends.asking import reasons_against, refusal_of
from backends.base import CONTRACT_VERSION, OLDEST_CONTRACT, Backend, Request
from calib.architectures.spec import KINDS
from calib.errors import BackendError, did_you_mean
from calib.files.reading import MALFORMED, reason_of
from calib.process.time_limit import TooLongError, time_limit
from calib.schemes import FLOAT, KV_SCHEMES, LINEAR_SCHEMES

__all__ = ["GROUP", "BackendInfo", "available", "get_backend", "names", "target_of"]

GROUP = "rotq.backends"
SECONDS = 10.0
"""That the backend of another package may take to load, and again to say what it can express."""
_VARIABLE = "ROTQ_PLUGIN_SECONDS"
_OWN = "rotq"
"""The distribution whose backends are not timed."""
_FAILURES = (Exception, SystemExit, GeneratorExit, TooLongError)
"""What ends a plugin and not rotq; of BaseException, others are told to rotq itself."""
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
    return [_describe(entry) for entry in sorted(_registered(), key=lambda entry: entry.name)]


def names() -> list[str]:
    """Of every registered backend, in order; none of them is loaded."""
    return sorted({entry.name for entry in _registered()})


def get_backend(name: str) -> Backend:
    """Load the backend called ``name``.

    Raises:
        BackendError: no such backend, its plugin fails to load, or it was written for a version of
            the contract that this rotq does not take.
    """
    entries = {entry.name: entry for entry in _registered()}
    if name not in entries:
        raise BackendError(
            f"unknown backend '{name}'",
            hint=f"{did_you_mean(name, entries)}installed backends:"
            f" {', '.join(sorted(entries)) or 'none'}",
        )

    subject = f"backend '{name}' of {_distribution(entries[name])}"
    try:
        backend = _loaded(entries[name])
        strange = _strange_contract(backend)
    except _FAILURES as error:  # sys.exit at import is the plugin's end, not rotq's
        raise BackendError(
            f"{subject} failed to load: {reason_of(error)}",
            hint=f"give it longer ({_VARIABLE}=60), or remove that package"
            if isinstance(error, TooLongError)
            else "reinstall or remove that package",
        ) from error

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
            hint=f"{did_you_mean(target, backend.targets)}its targets are:"
            f" {', '.join(backend.targets)}",
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
    with contextlib.redirect_stdout(sys.stderr), _limit(entry):
        try:
            backend: Backend = entry.load()()
        except BaseException as error:
            if type(error) is BaseException:  # nobody tells rotq anything by this one
                raise TypeError(f"it raises a BaseException: {reason_of(error)}") from error
            raise
    if not isinstance(backend.targets, tuple | list) or not backend.targets:
        raise TypeError("its 'targets' is no tuple of names")
    return backend


def _registered() -> list[EntryPoint]:
    """The entry points of all distributions whose own files can be read."""
    found: dict[str, EntryPoint] = {}
    for distribution in distributions():
        with contextlib.suppress(OSError, *MALFORMED):  # of one of them, whatever it is for
            if _is_regular(distribution, "entry_points.txt"):
                for entry in distribution.entry_points.select(group=GROUP):
                    found.setdefault(entry.name, entry)
    return list(found.values())


def _is_regular(distribution: Distribution, name: str) -> bool:
    """Whether reading the file ``name`` of a distribution comes to an end: it is a file, or not
    there; a pipe has none."""
    folder = getattr(distribution, "_path", None)  # of those that lie in folders
    return folder is None or not (folder / name).exists() or (folder / name).is_file()


def _limit(entry: EntryPoint) -> contextlib.AbstractContextManager[None]:
    """Ends what a plugin does in the time that it has; rotq's own have all the time they need."""
    if _distribution(entry).startswith(f"{_OWN} "):
        return contextlib.nullcontext()
    try:
        return time_limit(float(os.environ.get(_VARIABLE, SECONDS)))
    except ValueError:
        return time_limit(SECONDS)


def _describe(entry: EntryPoint) -> BackendInfo:
    distribution = _distribution(entry)
    try:
        backend = _loaded(entry)
        strange = _strange_contract(backend)
        if strange is not None:
            return BackendInfo(entry.name, distribution, (), error=f"it {strange[0]}")

        with contextlib.redirect_stdout(sys.stderr), _limit(entry):
            return BackendInfo(
                str(backend.name),
                distribution,
                tuple(map(str, backend.targets)),
                schemes=_for_each_target(backend, _schemes),
                warnings=_for_each_target(backend, _warnings),
                caches=_for_each_target(backend, _caches),
                rotations=_for_each_target(backend, _rotations),
                rotation_warnings=_for_each_target(backend, _rotation_warnings),
            )
    except _FAILURES as error:  # a broken plugin must not take the list down
        said = str(error) and reason_of(error)
        return BackendInfo(entry.name, distribution, (), error=f"{type(error).__name__}: {said}")


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
    unknown = "unknown distribution"
    try:
        if entry.dist is None or not _is_regular(entry.dist, "METADATA"):
            return unknown
        return f"{entry.dist.name} {entry.dist.version}"
    except (OSError, *MALFORMED):
        return unknown
