"""Plugins that do at import, or answer, what a plugin should not."""

from __future__ import annotations

from random import Random

from tests.fuzz.mutations import mutate_bytes

_IMPORTED = (
    *("import sys; sys.exit(3)", "raise SystemExit", "1 / 0", "class", "x = [0] * 10**11"),
    *("raise BaseException('x')", "import nothing_there", "def f(): return f()\nf()"),
    *("raise GeneratorExit", "print('noise')", "import os; os.write(1, b'noise')"),
    *("import sys; sys.stdout = None", "import logging; logging.disable()"),
    *("import time; time.sleep(30)", "while True: pass", "raise Exception('a\\nb')"),
)
_ANSWERED = (
    *("raise SystemExit(4)", "return None", "return 5", "return [None]", "return ['text']"),
    *("raise RuntimeError('a\\nb')", "return self.refusals(request)", "yield 1"),
)


def mutate_plugin(data: bytes, rng: Random) -> bytes:
    """A plugin's module, changed as bytes, at its import, or in what it says of itself."""
    text = data.decode()
    match rng.randrange(6):
        case 0:
            return mutate_bytes(data, rng)
        case 1 if rng.random() < 0.5:
            return f"{rng.choice(_IMPORTED)}\n{text}".encode()
        case 2:
            lines = text.replace("def __init__(self):\n", "def __init__(self):\n        {}\n")
            return lines.replace("{}", rng.choice(_ANSWERED)).encode()
        case 3:
            answered = f"def refusals(self, request):\n        {rng.choice(_ANSWERED)}\n"
            return text.replace("def refusals(self, request):\n", answered).encode()
        case 4:
            targets = rng.choice(("()", "None", "5", "'text'", "[1]", "{}", "('a', None)"))
            return text.replace('targets = ("one", "two", "own")', f"targets = {targets}").encode()
    contract = rng.choice(("None", "'2'", "[]", "2.5", "-1", "True", "10**400", "float('nan')"))
    return text.replace("contract = 2", f"contract = {contract}").encode()
