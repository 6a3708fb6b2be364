"""What the conformance suite asks of a target, and what an answer has to look like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from backends.base import Backend, Dtype, Reason, Request
from backends.testing.cases import linear_schemes
from calib.architectures import SPACE_OF
from calib.schemes import KV_SCHEMES


def requests(target: str) -> Iterator[Request]:
    """What is asked of a target where no model is known: one thing at a time."""
    for name, scheme in linear_schemes().items():
        yield Request(target, linears={name: scheme})
    for cache in KV_SCHEMES.values():
        yield Request(target, cache=cache)
    for kind in SPACE_OF:
        yield Request(target, rotations=(kind,))
    yield Request(target, logits="last")
    yield Request(target, kv_buffer="shared")
    yield Request(target, prefix=1)
    for dtype in get_args(Dtype):
        yield Request(target, dtype=dtype)


def check_reasons(backend: Backend, again: Backend, request: Request) -> None:
    """Every reason is well-formed, about something that ``request`` asks, and given each time.

    Args:
        backend: what is asked.
        again: a second object of it, which must answer the same.
        request: what is asked of it.
    """
    reasons = list(backend.refusals(request))
    assert list(again.refusals(request)) == reasons, request

    asked = {
        "linear": {*request.linears},
        "rotation": {*request.rotations},
        "option": {*request.options()},
        "cache": set() if request.cache is None else {""},
        "model": set() if request.config is None else {""},
    }
    for reason in reasons:
        assert isinstance(reason, Reason), request
        assert reason.name in asked[reason.about], f"it was not asked about {reason}"
        assert reason.severity in ("refused", "slow"), reason
        assert reason.reason.strip(), reason
        assert "\n" not in reason.reason + reason.hint, reason
        if reason.about == "model":
            assert reason.hint, f"it says what is wrong and not what to do: {reason}"

    subjects = [(reason.about, reason.name) for reason in reasons if reason.about != "model"]
    assert len(set(subjects)) == len(subjects), f"it says more than one thing of one: {reasons}"
