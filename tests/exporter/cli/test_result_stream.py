"""stdout holds the result alone, whoever prints."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.exporter.cli_support import ROOT

NOISY = """
import ctypes, os
from exporter.cli.options import TalkFlags
from exporter.cli.session import print_json, running

libc = ctypes.CDLL(None)
with running(TalkFlags(json_output=True, verbose={verbose}, quiet=True)):
    print("from Python")
    os.write(1, b"from native code\\n")
    libc.puts(b"buffered by C")
print_json({{"output": "out"}})
"""


@pytest.mark.parametrize("verbose", [False, True])
def test_native_code_does_not_print_into_json(verbose: bool) -> None:
    command = [sys.executable, "-c", NOISY.format(verbose=verbose)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(done.stdout) == {"output": "out"}
    printed = ("from Python", "from native code", "buffered by C")
    assert all((words in done.stderr) == verbose for words in printed)


WINDOWS = """
import ctypes, sys
from exporter.cli.options import TalkFlags
from exporter.cli.session import print_json, running

def refused(name):
    raise TypeError("bad argument type for built-in operation")

ctypes.CDLL, sys.platform = refused, "win32"
with running(TalkFlags(json_output=True, verbose=True, quiet=True)):
    print("from Python")
print_json({"output": "out"})
"""


def test_stdout_comes_back_on_windows() -> None:
    command = [sys.executable, "-c", WINDOWS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"output": "out"}
