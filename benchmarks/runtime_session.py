"""One exported folder in ONNX Runtime, in a process of its own that runs what it is told to: for
benchmarks.runtime.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

_LAYER = re.compile(r"past_key_values\.(\d+)\.(key|value)")


@dataclass(frozen=True)
class Load:
    """What every session of one table runs.

    Attributes:
        prompt: token ids of the prompt.
        steps: tokens decoded after it, one at a time.
        threads: of one operator.
        kv_heads, head_dim: of a layer's cache.
    """

    prompt: list[int]
    steps: int
    threads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Memory:
    """Of a process, in bytes (proc(5))."""

    resident: int
    """VmRSS: all pages in memory, those of mapped files as well."""
    anonymous: int
    """RssAnon: the pages that no file backs."""


class Session:
    """A model that runs in another process; a context manager.

    The process imports nothing but ONNX Runtime, so that its memory is that of the model. It reads
    words from its standard input and answers each by a line of JSON.

    Args:
        model: the ``.onnx`` file.
        load: what to run.
        shared_cache: past and present are one buffer, which the graph's attention writes into.
            Graphs with GroupQueryAttention can do so, and onnxruntime-genai has them do so.
    """

    def __init__(self, model: Path, load: Load, *, shared_cache: bool) -> None:
        told = json.dumps({"model": str(model), "shared_cache": shared_cache, "load": asdict(load)})
        self._command = [sys.executable, "-m", "benchmarks.runtime_session", told]

    def __enter__(self) -> Session:
        """Start the process, and wait until the model is loaded."""
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._receive()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def prefill(self) -> float:
        """Seconds for the prompt."""
        return float(self._ask("prefill"))

    def decode(self) -> float:
        """Seconds for all steps after the last prompt."""
        return float(self._ask("decode"))

    def memory(self) -> Memory:
        """What the process has in memory now."""
        return Memory(**self._ask("memory"))

    def _ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        print(what, file=self._process.stdin, flush=True)
        return self._receive()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"a session's process ended by itself, with code {self._process.wait()}"
            )
        return json.loads(line)


def main() -> None:
    """The process of a session."""
    told = json.loads(sys.argv[1])
    make = _Shared if told["shared_cache"] else _Chained
    runner = make(told["model"], Load(**told["load"]))
    answers: dict[str, Callable[[], object]] = {
        "prefill": runner.prefill,
        "decode": runner.decode,
        "memory": _memory,
    }
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


class _Runner:
    """What both ways of keeping the cache have in common."""

    def __init__(self, model: str, load: Load) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = load.threads
        options.log_severity_level = 3
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.load = load
        inputs = [entry.name for entry in self.session.get_inputs()]
        self.present = {
            name: _LAYER.sub(r"present.\1.\2", name) for name in inputs if _LAYER.fullmatch(name)
        }
        self.plain = [name for name in inputs if name not in self.present]

    def prefill(self) -> float:
        """Seconds for the prompt."""
        self.restart()
        began = time.perf_counter()
        self.run(self.load.prompt, 0)
        return time.perf_counter() - began

    def decode(self) -> float:
        """Seconds for the steps after it."""
        began = time.perf_counter()
        for step in range(self.load.steps):
            self.run([step], len(self.load.prompt) + step)
        return time.perf_counter() - began

    def restart(self) -> None:
        """Forget all tokens."""
        raise NotImplementedError

    def run(self, ids: list[int], before: int) -> None:
        """One pass over ``ids``, which follow ``before`` tokens."""
        raise NotImplementedError

    def values(self, ids: list[int], before: int) -> dict[str, Any]:
        """Token ids, mask and positions of ``ids`` after ``before`` tokens."""
        import numpy as np
        import onnxruntime as ort

        made = {
            "input_ids": [ids],
            "attention_mask": [[1] * (before + len(ids))],
            "position_ids": [list(range(before, before + len(ids)))],
        }
        return {
            name: ort.OrtValue.ortvalue_from_numpy(np.array(made[name], np.int64))
            for name in self.plain
        }

    def caches(self, tokens: int) -> dict[str, Any]:
        """Keys and values of every layer, zeros for ``tokens`` tokens."""
        import numpy as np
        import onnxruntime as ort

        shape = (1, self.load.kv_heads, tokens, self.load.head_dim)
        return {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for name in self.present
        }


class _Chained(_Runner):
    """What comes out as ``present`` goes in as ``past``."""

    def restart(self) -> None:
        """Begin with an empty cache."""
        self._cache = self.caches(0)

    def run(self, ids: list[int], before: int) -> None:
        """See :class:`_Runner`."""
        outputs = ["logits", *self.present.values()]
        _, *present = self.session.run_with_ort_values(
            outputs, self.values(ids, before) | self._cache
        )
        self._cache = dict(zip(self.present, present, strict=True))


class _Shared(_Runner):
    """``past`` and ``present`` are one buffer with room for all tokens."""

    def restart(self) -> None:
        """Begin with room for all tokens; the mask says how many there are."""
        self._cache = self.caches(len(self.load.prompt) + self.load.steps)

    def run(self, ids: list[int], before: int) -> None:
        """See :class:`_Runner`."""
        binding = self.session.io_binding()
        for name, value in (self.values(ids, before) | self._cache).items():
            binding.bind_ortvalue_input(name, value)
        for name, buffer in self._cache.items():
            binding.bind_ortvalue_output(self.present[name], buffer)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)


def _memory() -> dict[str, int]:
    lines = (
        line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    )
    fields = {"VmRSS:": "resident", "RssAnon:": "anonymous"}
    return {fields[line[0]]: int(line[1]) * 1024 for line in lines if line[0] in fields}


if __name__ == "__main__":
    main()
