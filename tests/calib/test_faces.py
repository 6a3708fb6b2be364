"""What is public of calib's packages, and where paths of earlier documentation lead."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import calib
from calib._names.moved import MOVED

PACKAGES = sorted(
    f"calib.{module.name}" for module in pkgutil.iter_modules(calib.__path__) if module.ispkg
)


def clean(code: str) -> str:
    """What ``code`` prints in a process of its own."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_is_public(package: str) -> None:
    face = importlib.import_module(package)
    assert face.__doc__
    assert len(face.__all__) == len(set(face.__all__))
    for module in pkgutil.iter_modules(face.__path__):
        importlib.import_module(f"{package}.{module.name}")
    for name in face.__all__:
        # a module of that name would hide it
        assert not isinstance(getattr(face, name), ModuleType), name
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        face.absent  # noqa: B018 - the access is the test


def test_faces_load_nothing_until_they_are_asked() -> None:
    code = (
        "import sys, calib.data, calib.capture.sites, calib.rotations, calib.modelopt\n"
        "import calib.network, calib.architectures.groups, calib.schemes, calib._names.moved\n"
        "print([m for m in ('torch', 'modelopt', 'transformers') if m in sys.modules])"
    )
    assert clean(code) == "[]"


@pytest.mark.parametrize("old", sorted(MOVED))
def test_a_module_that_moved_is_found_with_a_warning(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"'{old}' moved to {MOVED[old][0]}") as caught:
        module = importlib.import_module(old)
    assert len(caught) == 1
    for home in map(importlib.import_module, MOVED[old]):
        own = [
            name
            for name, value in vars(home).items()
            if name[0] != "_" and _defined_in(value, home.__name__)
        ]
        assert own
        for name in own:
            assert getattr(module, name) is getattr(home, name)
            assert name in dir(module)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        module.absent  # noqa: B018 - the access is the test


def _defined_in(value: object, module: str) -> bool:
    return getattr(value, "__module__", None) == module and hasattr(value, "__qualname__")


def test_names_are_imported_from_where_they_were() -> None:
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    from calib.grids import grid_of\n"
        "    import calib.scales\n"
        "    from calib.rotations.rotation_files import import_spinquant, save_rotations\n"
        "    from calib.experts.names import expert_index\n"
        "from calib.architectures import experts\n"
        "assert expert_index is experts.expert_index\n"
        "from calib.arithmetic import grids, scales\n"
        "assert grid_of is grids.grid_of\n"
        "assert calib.scales.convert_to_scale is scales.convert_to_scale\n"
        "print([w.filename for w in caught])"
    )
    assert clean(code) == str(["<string>"] * 4)


def test_a_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"calib\.never"):
        importlib.import_module("calib.never")


@pytest.mark.parametrize("name", ["fake_quantize", "scheme_error"])
def test_a_name_that_moved_is_found_with_a_warning(name: str) -> None:
    old = importlib.import_module("calib.rotations.objectives")
    with pytest.warns(DeprecationWarning, match=f"{name}' moved to calib.rotations.quantizer"):
        found = getattr(old, name)
    assert found is getattr(importlib.import_module("calib.rotations.quantizer"), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        old.nothing  # noqa: B018
