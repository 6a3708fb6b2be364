"""Build wheel and sdist, and try both where nothing else is: ``python -m tests.check_package``.

The versions of what they depend on are those of the lock.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from locks.install import lock_of

ROOT = Path(__file__).parents[1]
CLEAN = ROOT / ".venv-package"
AWAY = ROOT / "out" / "package"
"""Where the installed package is tried: beside the sources, Python would import those instead."""
CONSUMER = Path(__file__).with_name("typed_consumer.py")


def main() -> None:
    """Stops at the first thing that is wrong."""
    lock = lock_of(Path(sys.executable))
    wheel, sdist = build(lock)
    run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist])

    run([sys.executable, "-m", "venv", "--clear", CLEAN])
    python = CLEAN / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", lock]
    run([*install, "pip", "setuptools"])
    run([*install, "torch"])

    shutil.rmtree(AWAY, ignore_errors=True)
    AWAY.mkdir(parents=True)
    shutil.copy(CONSUMER, AWAY)
    for package in (sdist, wheel):
        again = ["--force-reinstall", "--no-deps", "--no-build-isolation"]
        run([*install, package])
        run([*install, *again, package])
        run([python, "-m", "pip", "check"])
        run([python, "-c", "import rotq, exporter, backends, calib; rotq.export"])
        run([CLEAN / "bin" / "rotq", "--help"], quiet=True)
        run([CLEAN / "bin" / "rotq", "backends"], quiet=True)

    checker = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python]
    run([*checker, CONSUMER.name])
    sys.stdout.write(f"{wheel.name} and {sdist.name}: built, installed, typed\n")


def build(lock: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel made of it, with the locked build tools."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run([sys.executable, "-m", "pip", "install", "--quiet", "-c", lock, "--group", "package"], ROOT)
    run([sys.executable, "-m", "build", "--no-isolation"], ROOT, quiet=True)
    (wheel,), (sdist,) = (ROOT / "dist").glob("*.whl"), (ROOT / "dist").glob("*.tar.gz")
    return wheel, sdist


def run(command: Sequence[str | Path], folder: Path = AWAY, *, quiet: bool = False) -> None:
    """One step; its output is shown if it fails, or unless it is to be quiet."""
    AWAY.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, capture_output=quiet, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{done.stdout or ''}{done.stderr or ''}failed: {' '.join(map(str, command))}")


if __name__ == "__main__":
    main()
