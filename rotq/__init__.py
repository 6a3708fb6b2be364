"""From a Hugging Face causal LM to a rotated, calibrated, quantized model that a deployment runtime
loads.

    import rotq

    result = rotq.export("./my-model", scheme="int4-weight-only", target="ort")
    result.report.status

Everything is in :mod:`rotq.api` and :mod:`rotq.looking`, which are loaded when they are first asked
for, so that ``import rotq`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rotq.api import calibrate, capture, export, load_recipe, rotate, stats, sweep
    from rotq.looking import diff, evaluate, evaluate_tasks, inspect, report, verify

    __version__: str

__all__ = [
    "__version__",
    "calibrate",
    "capture",
    "diff",
    "evaluate",
    "evaluate_tasks",
    "export",
    "inspect",
    "load_recipe",
    "report",
    "rotate",
    "stats",
    "sweep",
    "verify",
]
_LOOKING = frozenset({"diff", "evaluate", "evaluate_tasks", "inspect", "report", "verify"})


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("rotq")
    if name not in __all__:
        raise AttributeError(f"module 'rotq' has no attribute '{name}'")
    return getattr(import_module("rotq.looking" if name in _LOOKING else "rotq.api"), name)


def __dir__() -> list[str]:
    return __all__
