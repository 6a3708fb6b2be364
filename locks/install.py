"""Make or renew the environment of a make target: ``python locks/install.py .venv``.

With ``--versions locked`` (the default) it holds what ``locks/`` names for its Python, with
``newest`` the newest that ``pyproject.toml`` admits, with ``oldest`` the oldest. Runs on the
standard library alone, before anything is installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

LOCKS = Path(__file__).resolve().parent
PROJECT = LOCKS.parent


def main() -> None:
    """Install into the folder of the command line, which is created where there is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--versions", choices=["locked", "newest", "oldest"], default="locked")
    options = parser.parse_args()

    python = options.folder / "bin" / "python"
    lock = lock_of(python if python.exists() else Path(sys.executable), options.versions)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(options.folder)], check=True)

    if options.versions == "newest":
        install_newest(python)
    else:
        install_locked(python, lock, "test,lint" if options.versions == "locked" else "test")


def lock_of(python: Path, versions: str = "locked", prefix: str = "py") -> Path:
    """The file that names the versions for an interpreter; ends the program with one line where
    there is none."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([str(python), "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    version = done.stdout.strip()
    prefix = "oldest-py" if versions == "oldest" else prefix
    locks = {f"3.{path.stem[len(prefix) + 1 :]}": path for path in LOCKS.glob(f"{prefix}3*.txt")}
    if version not in locks:
        known = " or ".join(sorted(locks))
        sys.exit(
            f"Python {known} is needed, and {python} is {version}: "
            "name one with make ... PYTHON=/path/to/python"
        )
    return locks[version]


def install_locked(python: Path, lock: Path, extras: str) -> None:
    """What the lock names. torch goes first: what follows finds it there, and takes no other."""
    pip(python, "-c", lock, "--upgrade", "pip", "setuptools")
    pip(python, "-c", lock, "torch")
    pip(python, "-c", lock, "--build-constraint", lock, "-e", f"{PROJECT}[{extras}]")


def install_newest(python: Path) -> None:
    """The newest of everything, again at every call."""
    newest = ("--upgrade", "--upgrade-strategy", "eager")
    pip(python, *newest, "pip", "setuptools")
    pip(python, *newest, "-e", f"{PROJECT}[test]")


def pip(python: Path, *arguments: str | Path) -> None:
    """One installation. What pip says of a failure is all that is said."""
    command = [str(python), "-m", "pip", "install", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
