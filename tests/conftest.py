"""Fixtures of the tests that run the whole tool. One export of the embedded model serves all that only look at it."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.recipe import Recipe, load_recipe

SMALL = {"calibration.nsamples": 48, "gate.nsamples": 8, "evaluation.nsamples": 16, "rotation.r1_tokens": 4096}
"""Fewer rows than the default, so that the suite stays short; every step is the same."""


@pytest.fixture(scope="session")
def small_recipe() -> Recipe:
    """The default recipe on fewer rows."""
    return load_recipe(None, SMALL)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, small_recipe: Recipe) -> Path:
    """The embedded model, exported once for the session. Tests that write must copy it."""
    from exporter.pipeline import export
    from exporter.run_options import RunOptions

    root = tmp_path_factory.mktemp("exported")
    return export(small_recipe, RunOptions(root / "demo", work_dir=root / "work")).output
