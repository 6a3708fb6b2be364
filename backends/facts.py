"""What rotq takes for granted of runtimes and readers, of which versions it was seen, and how it is
known. Torch-free.

A fact about a runtime holds for a version of it, and maybe for a CPU. Each is one of

* **asked**: the installed runtime is given a graph of one linear, and answers
  (:mod:`backends.onnx.asking`);
* **tested**: a test runs it in the runtime, for the versions of :attr:`Runtime.seen`;
* **tried**: it was run in the runtime, for those versions, and no test repeats it;
* **read**: in the runtime's source, for those versions, where it cannot be run on a CPU;
* **format**: what the file format or its writer has no place for, whoever reads it.

Refusals and warnings carry the runtime that they speak of (:class:`backends.rules.Rule`). Where
another version than one of those seen is installed, or none, they say of which version they speak.
All facts stand in ``docs/runtime-facts.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Literal

How = Literal["asked", "tested", "tried", "read", "format"]


@dataclass(frozen=True)
class Runtime:
    """Something that reads or runs what rotq writes."""

    name: str
    """As sentences call it."""
    packages: tuple[str, ...]
    """Distributions that hold it; the first that is installed counts."""
    seen: tuple[str, ...]
    """Releases of which what is said of it was shown, oldest first. ``0.20`` stands for all of
    0.20. Empty: nobody wrote down which it was."""

    def installed(self) -> str | None:
        """The release that is installed here, without its build; ``None``: none, or none that says
        its version."""
        return _installed(self.packages)

    def is_seen(self, version: str | None) -> bool:
        """Whether ``version`` is one of those seen."""
        return version is not None and any(
            version == seen or version.startswith(f"{seen}.") for seen in self.seen
        )

    def as_of(self, text: str) -> str:
        """``text``, which speaks of this runtime, with the version that it was seen in where that
        is not clear."""
        if not self.seen:
            return text
        latest = f"{self.name} {self.seen[-1]}"
        if latest in text or self.is_seen(self.installed()):
            return text
        return f"{text} (seen in {latest})"


ORT = Runtime("ONNX Runtime", ("onnxruntime", "onnxruntime-gpu"), ("1.31.1", "1.32.0"))
OPENVINO = Runtime("OpenVINO", ("openvino",), ("2026.4.1",))
TENSORRT_RTX = Runtime("TensorRT-RTX", ("tensorrt-rtx",), ("1.7.1",))
GENAI = Runtime("onnxruntime-genai", ("onnxruntime-genai",), ("0.18",))
TRANSFORMERS = Runtime("transformers", ("transformers",), ("5.14",))
COMPRESSED_TENSORS = Runtime("compressed-tensors", ("compressed-tensors",), ("0.20",))
VLLM = Runtime("vLLM", ("vllm",), ("0.33",))
TENSORRT_LLM = Runtime("TensorRT-LLM", ("tensorrt-llm",), ())
MODELOPT = Runtime("ModelOpt", ("nvidia-modelopt",), ("0.47",))
TRIPY = Runtime("Tripy", ("nvtripy",), ("0.1.7",))


@dataclass(frozen=True)
class Fact:
    """One line of ``docs/runtime-facts.md``."""

    runtimes: tuple[Runtime, ...]
    how: How
    text: str
    where: str
    """What relies on it: a target and what it decides, or a module."""
    shown: str = ""
    """The test or the question that shows it."""

    @property
    def versions(self) -> str:
        """Of which versions it was seen."""
        return ", ".join(
            f"{runtime.name} {' and '.join(runtime.seen) or '(not noted)'}"
            for runtime in self.runtimes
        )


def stated(text: str, runtimes: Sequence[Runtime]) -> str:
    """``text`` with the versions that it speaks of, where they are not those that are installed
    here."""
    for runtime in runtimes:
        text = runtime.as_of(text)
    return text


@cache
def _installed(packages: tuple[str, ...]) -> str | None:
    for package in packages:
        try:
            return metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return None
