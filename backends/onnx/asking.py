"""Answers of the installed runtimes about quantized linears, kept between runs. Torch-free.

What a runtime fuses holds for its version and, in part, for a CPU, so it is asked
(:mod:`backends.onnx.probes`) and not written down. An answer is kept in the user's cache, in one
file for each runtime, version, CPU and state of the questions. While it holds the answer no runtime
is imported; what is not there, or damaged, is asked again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from backends.cpu import cpu_words
from backends.facts import Runtime
from backends.user_cache import cache_folder, read_entry, write_entry
from calib.files.reading import MALFORMED, parse_json
from calib.schemes import LinearScheme, linear_words

_log = logging.getLogger(__name__)
_KEPT = 16
"""Versions and CPUs whose answers are kept; the oldest go."""
_QUESTIONS = Path(__file__).with_name("probes.py")


@dataclass(frozen=True)
class Form:
    """How a target has a linear written."""

    unsigned_inputs: bool = False
    """Int8 inputs with calibrated scales are stored in uint8."""
    unsigned_weights: bool = False
    """Int8 weights are stored in uint8."""
    barrier: bool = False
    """A vector of zeros is added to the rounded input."""


@dataclass(frozen=True)
class Answer:
    """What a runtime makes of one linear."""

    kernel: str
    """What multiplies; empty where nothing does, or more than one operator."""
    fused: bool
    """Whether that is the kernel of these formats: integer weights as stored, and integer inputs
    where there are any."""
    approximation: float = 0.0
    """How far a default session is from arithmetic as written, as relative L2."""
    level: int = 0
    """MatMulNBits' ``accuracy_level``: 1 leaves inputs in float32, 4 may round them to int8; 0 for
    other kernels."""
    refused: str = ""
    """Why the runtime does not load such a graph; empty where it does."""


class Asked:
    """One runtime, the questions that it can be asked, and the answers that are at hand.

    Args:
        runtime: whose version counts.
        module: that has to be there to ask.
        ask: puts one question; imports the runtime.
    """

    def __init__(
        self, runtime: Runtime, module: str, ask: Callable[[LinearScheme], Answer]
    ) -> None:
        self.runtime = runtime
        self._module = module
        self._ask = ask

    def about(self, scheme: LinearScheme) -> Answer | None:
        """What it makes of a linear of ``scheme``; ``None`` where it is not there to tell."""
        return self.answer(linear_words(scheme), lambda: self._ask(scheme))

    def answer(self, question: str, ask: Callable[[], Answer]) -> Answer | None:
        """The answer to ``question``, from the cache or from ``ask``; ``None`` where there is
        nobody to ask."""
        version = self.runtime.installed()
        if version is None or find_spec(self._module) is None:
            return None
        path = _path(self.runtime.name, version)
        known = _known(path)
        if question not in known:
            try:
                answer = ask()
            except ImportError as error:
                _log.warning("%s %s does not load: %s", self.runtime.name, version, error)
                return None
            _keep(path, question, answer)
            known[question] = answer
        return known[question]


def _path(runtime: str, version: str) -> Path:
    """The file of a runtime's answers."""
    key = hashlib.sha256(f"{cpu_words()}\n".encode() + _questions()).hexdigest()[:16]
    name = f"{runtime.lower().replace(' ', '-')}-{version}-{key}.json"
    return cache_folder() / "runtimes" / name


@cache
def _questions() -> bytes:
    return _QUESTIONS.read_bytes()


@cache
def _known(path: Path) -> dict[str, Answer]:
    """The answers in ``path``, and those that this process adds."""
    return _read(path)


def _read(path: Path) -> dict[str, Answer]:
    data = read_entry(path, "the kept answers of a runtime")
    if data is None:
        return {}
    try:
        answers = {question: Answer(**answer) for question, answer in parse_json(data).items()}
    except MALFORMED:  # nobody's answers, with a digest that fits
        return {}
    return {question: answer for question, answer in answers.items() if _is_sound(answer)}


def _is_sound(answer: Answer) -> bool:
    """Whether an answer that was read holds what its fields say."""
    words, numbers = (answer.kernel, answer.refused), (answer.approximation, answer.level)
    return (
        all(isinstance(each, str) for each in words)
        and all(type(each) in (int, float) for each in numbers)
        and isinstance(answer.fused, bool)
    )


def _keep(path: Path, question: str, answer: Answer) -> None:
    """Add an answer to those in ``path``, where another process may have added some meanwhile."""
    answers = {**_read(path), question: answer}
    data = json.dumps({name: asdict(found) for name, found in answers.items()}, sort_keys=True)
    write_entry(path, data.encode(), "an answer of a runtime", kept=_KEPT)
