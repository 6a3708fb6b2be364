"""Modules that moved, under the paths that earlier documentation names.

``import calib.grids`` still works: a finder at the end of ``sys.meta_path``, which is asked for
what no file provides, gives a module that looks names up where they are now, and warns.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "calib.attention": ("calib.modules.attention",),
    "calib.blockwise": ("calib.layerwise.calibrator",),
    "calib.casting": ("calib.artifact.casting",),
    "calib.checkpoint": ("calib.network.checkpoint",),
    "calib.clusters": ("calib.stats.clusters",),
    "calib.experts.gather": ("calib.network.gather_experts",),
    "calib.experts.modules": ("calib.network.experts",),
    "calib.experts.names": ("calib.architectures.experts",),
    "calib.experts.observe": ("calib.network.observe_experts",),
    "calib.floor": ("calib.measure.floor",),
    "calib.forward_loop": ("calib.data.forward_loop",),
    "calib.fusing.expected": ("calib.network.skeleton",),
    "calib.grids": ("calib.arithmetic.grids",),
    "calib.inputs": ("calib.arithmetic.inputs",),
    "calib.kept": ("calib.quantizing.calibrator",),
    "calib.kv_cache": ("calib.network.kv_cache",),
    "calib.observation": ("calib.quantizing.observation",),
    "calib.online": ("calib.network.online",),
    "calib.perplexity": ("calib.measure.perplexity",),
    "calib.progress": ("calib.process.progress",),
    "calib.quantization": ("calib.quantizing.plan",),
    "calib.quantize": ("calib.quantizing.calibrator",),
    "calib.reading": ("calib.files.reading",),
    "calib.reference": ("calib.measure.reference",),
    "calib.rotations.imported": ("calib.rotations.foreign",),
    "calib.rotations.rotation_files": ("calib.rotations.files", "calib.rotations.foreign"),
    "calib.rounding": ("calib.arithmetic.rounding",),
    "calib.scales": ("calib.arithmetic.scales",),
    "calib.sealed": ("calib.files.sealed",),
    "calib.skeleton": ("calib.network.skeleton",),
}
"""Where what an old module held is now: the first of several that has a name counts."""
_PACKAGES = ("calib.experts",)
"""Packages all of whose modules moved. They hold nothing else, so only their modules warn."""


def moved_names(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that stays, some of whose names moved.

    Args:
        module: its ``__name__``.
        homes: the module that defines each of these names now.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{module}' has no attribute '{name}'")
        warnings.warn(f"'{module}.{name}' moved to {homes[name]}", DeprecationWarning, stacklevel=2)
        return getattr(import_module(homes[name]), name)

    return load


class _MovedModule(ModuleType):
    """Stands in for a module that moved."""

    def __getattr__(self, name: str) -> Any:
        homes = [import_module(home) for home in MOVED[self.__name__]]
        if name == "__all__":
            return sorted({each for home in homes for each in vars(home) if each[0] != "_"})
        for home in homes:
            if hasattr(home, name):
                return getattr(home, name)
        raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.__all__]


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in _PACKAGES:
            return ModuleSpec(fullname, self, is_package=True)
        if fullname not in MOVED:
            return None
        # Frames of the import system do not count: this one's caller is who imports.
        warnings.warn(
            f"'{fullname}' moved to {' and '.join(MOVED[fullname])}",
            DeprecationWarning,
            stacklevel=2,
        )
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return _MovedModule(spec.name) if spec.name in MOVED else None  # an ordinary module

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run: names are looked up when they are asked for."""


def install() -> None:
    """Let imports find what moved."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
