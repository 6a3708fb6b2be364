"""What a bug report needs to know about this machine, gathered without importing any of the
libraries it names.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from backends.cpu import cpu_name
from exporter.process import usable_cores

PACKAGES = (
    "rotq",
    "torch",
    "transformers",
    "nvidia-modelopt",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "safetensors",
    "huggingface-hub",
    "tokenizers",
    "datasets",
    "numpy",
    "pydantic",
    "typer",
    "rich",
)
VARIABLES = (
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "NO_COLOR",
)
"""Settings of other tools that change what rotq does. Tokens are left out on purpose: reports are
pasted in public.
"""

_NVIDIA_SMI_SECONDS = 10


@dataclass(frozen=True)
class Environment:
    """Versions and hardware."""

    python: str
    executable: str
    system: str
    cpu: str
    cores: int
    memory_bytes: int | None
    cuda_devices: list[str]
    versions: dict[str, str | None]
    """By distribution name; ``None``: not installed."""
    variables: dict[str, str]
    """Those of :data:`VARIABLES` that are set."""

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def environment() -> Environment:
    """Look around."""
    return Environment(
        python=platform.python_version(),
        executable=sys.executable,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=cpu_name(),
        cores=usable_cores(),
        memory_bytes=memory_bytes(),
        cuda_devices=cuda_devices(),
        versions={name: installed_version(name) for name in PACKAGES},
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution from its metadata, or ``None``."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def memory_bytes() -> int | None:
    """Physical memory, or ``None`` where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def free_memory() -> int | None:
    """Bytes of physical memory that nobody uses, or could be made to give back; ``None`` where the
    system does not say.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return memory_bytes()


def cuda_devices() -> list[str]:
    """Name and memory of each CUDA device, as nvidia-smi reports them; empty where there is no
    (working) driver.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
