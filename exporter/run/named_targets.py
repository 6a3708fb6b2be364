"""What people call targets, and which backend writes for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from calib.errors import BackendError

DEFAULT_BACKEND = "onnx"
ALIASES = {
    "onnxruntime": "ort",
    "genai": "ort",
    "onnxruntime-genai": "ort",
    "optimum": "ort",
    "trt": "tensorrt",
    "tensorrt-rtx": "tensorrt",
    "trt-llm": "modelopt",
    "tensorrt-llm": "modelopt",
    "trtllm": "modelopt",
    "hf": "transformers",
    "huggingface": "transformers",
}
"""What is typed for a target, by what reads it; a target that is called so itself comes first."""


def with_backend(flags: Mapping[str, Any], own: str | None = None) -> dict[str, Any]:
    """``flags`` with targets by their own names, and with the backend that has them, where options
    name a target and no backend: the recipe's, else the default, else the first that has them all.

    Args:
        flags: recipe values by dotted key, as options gave them.
        own: backend of the recipe.
    """
    given = flags.get("target")
    if given is None:
        return dict(flags)
    names = [given] if isinstance(given, str) else list(given)
    named = flags.get("backend")
    for backend, targets in _targets(named or own, named=named is not None):
        found = _resolved(names, targets)
        if found:
            return {**flags, "backend": backend, "target": found[0] if len(found) == 1 else found}
    return dict(flags)  # whoever looks for them says so


def known_targets() -> list[str]:
    """Every name that ``--target`` takes."""
    return [*dict.fromkeys(name for _, names in _targets(None) for name in names), *ALIASES]


def _resolved(names: list[str], targets: tuple[str, ...]) -> list[str]:
    """``names`` as one backend calls them; empty if it has not all of them."""
    found = [name if name in targets else ALIASES.get(name, name) for name in names]
    return list(dict.fromkeys(found)) if set(found) <= set(targets) else []


def _targets(wanted: str | None, *, named: bool = False) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Backends that load and their targets, ``wanted`` first, and alone if it was ``named``."""
    from backends.registry import get_backend, names

    first = [wanted or DEFAULT_BACKEND]
    for name in first if named else dict.fromkeys([*first, *names()]):
        try:
            yield name, tuple(get_backend(name).targets)
        except BackendError:  # whoever needs it says so
            continue
