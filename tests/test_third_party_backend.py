"""A backend in a package of its own: installed by pip, found by its entry point, and held to the
conformance suite.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "third_party_backend"


def run(*arguments: str | Path, site: Path, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed, built from a copy because setuptools leaves files beside
    the source.
    """
    root = tmp_path_factory.mktemp("third_party")
    shutil.copytree(PACKAGE, root / "source")
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run(
        "-m",
        "pip",
        "install",
        "-q",
        *offline,
        "--target",
        root / "site",
        root / "source",
        site=root,
        cwd=root,
    )
    return root / "site"


def test_it_is_found_by_its_entry_point(site: Path, tmp_path: Path) -> None:
    code = (
        "from backends.registry import available, get_backend;info = {entry.name: entry for entry"
        " in available()}['npz'];print(info.error, info.distribution, info.targets,"
        " get_backend('npz').__class__.__module__)"
    )
    assert (
        run("-c", code, site=site, cwd=tmp_path)
        == "None rotq-npz 1.0 ('numpy',) rotq_npz.backend\n"
    )


def test_it_passes_the_conformance_suite(site: Path, tmp_path: Path) -> None:
    shutil.copy(PACKAGE / "conformance.py", tmp_path / "test_npz.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    printed = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_npz.py", site=site, cwd=tmp_path
    )
    summary = printed.strip().splitlines()[-1]
    assert " passed" in summary
    assert "failed" not in summary
    assert "skipped" not in summary
    # every scheme, every model, every test
    assert int(summary.split(" passed")[0].split()[-1]) > 100
