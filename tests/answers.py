"""What a backend answers, in the form in which a test wants to know it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.asking import refusal_of, slow_linears
from backends.base import Backend, Reason, Request
from calib.schemes import LinearScheme, TensorScheme


def linear_refusal(backend: Backend, scheme: LinearScheme, target: str) -> str | None:
    """Why ``target`` cannot express a linear of ``scheme``."""
    return refusal_of(backend, Request(target, linears={"it": scheme}))


def linear_warning(backend: Backend, scheme: LinearScheme, target: str) -> str | None:
    """What a linear of ``scheme`` falls back to."""
    return slow_linears(backend, target, {"it": scheme}).get("it")


def cache_refusal(backend: Backend, scheme: TensorScheme, target: str) -> str | None:
    """Why ``target`` cannot express a KV cache of ``scheme``."""
    return refusal_of(backend, Request(target, cache=scheme))


def model_refusal(
    backend: Backend, config: Mapping[str, Any], linears: Mapping[str, LinearScheme], target: str
) -> Reason | None:
    """Why ``target`` cannot express a model whose linears it can express one by one."""
    reasons = backend.refusals(Request(target, config=config, linears=linears))
    return next((reason for reason in reasons if reason.about == "model"), None)
