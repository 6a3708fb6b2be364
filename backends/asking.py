"""What rotq asks a backend before it writes, and what it makes of the answers. Torch-free where no
config is given.

Everything goes through :meth:`~backends.base.Backend.refusals`. Here are the words of the errors,
so that all backends refuse alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from backends.base import Backend, ListsFiles, Reason, Request
from calib.errors import BackendError, RotqError
from calib.files.reading import reason_of
from calib.schemes import FLOAT, LINEAR_SCHEMES, LinearScheme, TensorScheme, linear_words

__all__ = [
    "check",
    "expressible",
    "files_of",
    "reasons_against",
    "refusal_of",
    "refused_rotations",
    "slow_linears",
    "warnings_of",
]

_ANY_LINEAR = "*"
"""The name of a linear in a request that is about none in particular."""
_FLAGS = {"max_shard_bytes": "--max-shard-size"}
"""Options that the command line calls otherwise than :class:`~backends.base.Request`."""


def reasons_against(backend: Backend, request: Request) -> list[Reason]:
    """All that speaks against ``request``: what the backend answers, and the options that it was
    written too early to know.
    """
    unknown = [
        Reason(
            f"the backend was written for version {backend.contract} of the backend contract,"
            " which has no such option",
            about="option",
            name=option,
        )
        for option in request.options(newer_than=backend.contract)
    ]
    return [*_answer(backend, request), *unknown]


def _answer(backend: Backend, request: Request) -> list[Reason]:
    """What the backend says; of one of another package, whatever it is."""
    if type(backend).__module__.partition(".")[0] == __package__:
        return list(backend.refusals(request))
    try:
        reasons = list(backend.refusals(request))
        wrong = [each for each in reasons if not isinstance(each, Reason)]
    except (RotqError, MemoryError):
        raise
    except (Exception, SystemExit, GeneratorExit) as error:
        raise BackendError(
            f"backend '{backend.name}' fails when it is asked what it can express:"
            f" {reason_of(error)}",
            hint="update or remove its package",
        ) from error
    if wrong:
        raise BackendError(
            f"backend '{backend.name}' gives a {type(wrong[0]).__name__} where a Reason belongs",
            hint="update or remove its package",
        )
    return reasons


def refusal_of(backend: Backend, request: Request) -> str | None:
    """The first reason why the target cannot express ``request``; ``None`` if it can."""
    return next(
        (
            reason.reason
            for reason in reasons_against(backend, request)
            if reason.severity == "refused"
        ),
        None,
    )


def check(backend: Backend, request: Request, *, called: str | None = None) -> None:
    """Refuse what a target cannot express.

    What can be answered without a config is asked first: it needs no torch, and what is said of a
    model as a whole takes for granted that its parts can be expressed.

    Args:
        backend: what writes.
        request: what it shall write.
        called: what the error calls a linear, where none is known by name: ``scheme 'int8'``.

    Raises:
        BackendError: with the first reason, and what to do.
    """
    parts = replace(request, config=None, linears=dict(_one_of_each(request.linears)))
    for asked in (parts, request) if request.config is not None else (parts,):
        for reason in reasons_against(backend, asked):
            if reason.severity == "refused":
                raise _error(backend, asked, reason, called)


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
    by_name = {f"{_ANY_LINEAR}{index}": scheme for index, scheme in enumerate(linears)}
    request = Request(target, linears=by_name, cache=cache, rotations=tuple(rotations))
    return refusal_of(backend, request) is None


def refused_rotations(
    backend: Backend,
    target: str,
    kinds: Collection[str],
    config: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Why ``target`` cannot express rotations of ``kinds``, by kind; those that it can are left
    out.

    Args:
        backend: what is asked.
        target: one of its targets.
        kinds: any of r1, r2, r3, r4.
        config: Hugging Face config of the model that they are of; ``None``: of none in particular.
    """
    reasons = reasons_against(backend, Request(target, rotations=tuple(kinds), config=config))
    return {
        reason.name: reason.reason
        for reason in reasons
        if reason.severity == "refused" and reason.about == "rotation"
    }


def slow_linears(
    backend: Backend, target: str, linears: Mapping[str, LinearScheme]
) -> dict[str, str]:
    """What linears fall back to that ``target`` expresses and does not run fast, by name."""
    reasons = _slow_schemes(backend, target, linears)
    return {name: reasons[scheme] for name, scheme in linears.items() if scheme in reasons}


def warnings_of(
    backend: Backend,
    target: str,
    linears: Mapping[str, LinearScheme],
    rotations: Collection[str] = (),
) -> list[str]:
    """What ``target`` expresses but does not run fast, a sentence for each kind of linear and of
    ``rotations``.
    """
    counts = Counter(linears.values())
    of_linears = [
        f"{counts[scheme]} linear{'s' if counts[scheme] > 1 else ''} with {linear_words(scheme)}:"
        f" {reason}"
        for scheme, reason in _slow_schemes(backend, target, linears).items()
    ]
    reasons = reasons_against(backend, Request(target, rotations=tuple(rotations)))
    return of_linears + [
        f"{reason.name.upper()}: {reason.reason}"
        for reason in reasons
        if reason.severity == "slow" and reason.about == "rotation"
    ]


def files_of(backend: Backend, request: Request, nbytes: int) -> Sequence[str]:
    """The files that ``backend`` would write for ``request``; in words where it does not tell. See
    :class:`~backends.base.ListsFiles`.
    """
    if isinstance(backend, ListsFiles):
        return backend.files(request, nbytes)
    return (f"files of {backend.name}",)


def _slow_schemes(
    backend: Backend, target: str, linears: Mapping[str, LinearScheme]
) -> dict[LinearScheme, str]:
    """What linears of a scheme fall back to, in the order of ``linears``."""
    first = dict(_one_of_each(linears))
    reasons = reasons_against(backend, Request(target, linears=first))
    return {
        first[reason.name]: reason.reason
        for reason in reasons
        if reason.severity == "slow" and reason.about == "linear"
    }


def _one_of_each(linears: Mapping[str, LinearScheme]) -> Iterator[tuple[str, LinearScheme]]:
    """The first linear of each scheme: thousands of them share a few."""
    known: set[LinearScheme] = set()
    for name, scheme in linears.items():
        if scheme not in known:
            known.add(scheme)
            yield name, scheme


def _error(backend: Backend, request: Request, reason: Reason, called: str | None) -> BackendError:
    """``reason`` in the words that users read."""
    subject = f"target '{request.target}' of backend '{backend.name}'"
    match reason.about:
        case "linear":
            named = f"'{reason.name}'" if called is None else called
            verb = f"cannot express {named}"
            hint = _possible_schemes(backend, request.target)
        case "cache":
            of_format = "" if request.cache is None else f" of {request.cache.format.name}"
            verb = f"cannot express a KV cache{of_format}"
            hint = "calibrate without --kv, or choose another target"
        case "rotation":
            verb = f"cannot express {reason.name.upper()}"
            hint = f"calibrate without {reason.name} in --rotate, or choose another target"
        case "option":
            flag = _FLAGS.get(reason.name, f"--{reason.name.replace('_', '-')}")
            verb = f"cannot be written with {flag} {getattr(request, reason.name)}"
            hint = f"leave {flag} out"
        case _:
            verb, hint = "cannot express this model", "choose another target"

    return BackendError(f"{subject} {verb}: {reason.reason}", hint=reason.hint or hint)


def _possible_schemes(backend: Backend, target: str) -> str:
    possible = [
        name
        for name, linear in LINEAR_SCHEMES.items()
        if refusal_of(backend, Request(target, linears={_ANY_LINEAR: linear})) is None
    ]
    return f"schemes it can express: {', '.join([FLOAT, *possible])}"
