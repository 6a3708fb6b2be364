"""What ``import backends`` gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

import backends


def test_loaders_are_there_and_cost_nothing_until_they_are_used() -> None:
    code = (
        "import backends, sys; sys.exit(bool({'torch', 'transformers', 'nvtripy'} &"
        " sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(callable(getattr(backends, name)) for name in backends.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        backends.nothing  # noqa: B018


def test_without_nvtripy_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from backends.base import RuntimeMissing
    from backends.safetensors.tripy.loader import fill

    monkeypatch.setitem(sys.modules, "nvtripy", None)
    with pytest.raises(RuntimeMissing, match="nvtripy cannot be imported") as caught:
        fill(object(), {}, {}, "this")
    assert caught.value.hint
