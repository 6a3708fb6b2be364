"""The faces of packages: what is public of them, loaded on first use.

A package's ``__all__`` says what is public. Each name has a home, a module of the package, which is
imported when the name is first asked for: importing one module of a package loads no other, so that
what needs no torch stays free of it, and no import circle can come of a face.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, tuple[str, ...]]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package.

    Args:
        package: its ``__name__``.
        homes: public names by the module of the package that defines them; ``calib`` itself names
            modules of its packages.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def load(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(f"{package}.{home_of[name]}"), name)

    return load
