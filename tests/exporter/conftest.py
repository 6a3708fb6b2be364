"""Fixtures of the front door's tests: an installed backend that writes nothing, and a stand-in for
the pipeline.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins import install_plugins


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths in these tests mean an empty folder, not the checkout, where a user's output
    may lie.
    """
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with an installed distribution of two backends, of which one is broken."""
    folder = tmp_path_factory.mktemp("plugins")
    install_plugins(folder)
    return str(folder)


@pytest.fixture
def clean_logging() -> Iterator[None]:
    """The command line configures logging for its process, which here is the test's."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    root.handlers = before
    for name in ("exporter", "calib", "backends"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture
def pipeline(
    monkeypatch: pytest.MonkeyPatch, clean_logging: None, plugins: str
) -> types.ModuleType:
    """Stands in for ``exporter.commands.export``; a test gives it the function it needs."""
    module = types.ModuleType("exporter.commands.export")
    monkeypatch.setitem(sys.modules, "exporter.commands.export", module)
    monkeypatch.setattr("exporter.cli.session._silence_libraries", lambda: None)
    monkeypatch.syspath_prepend(plugins)
    return module
