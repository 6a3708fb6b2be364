"""Fixtures of the tests that run the whole tool. One export of the embedded model serves all that
only look at it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.recipe import Recipe, load_recipe

SMALL = {
    "calibration.nsamples": 48,
    "gate.nsamples": 8,
    "evaluation.nsamples": 16,
    "rotation.r1_tokens": 4096,
}
"""Fewer rows than the default, so that the suite stays short; every step is the same."""


LONGEST = (
    "test_end_to_end",
    "test_verified_again",
    "test_sabotage",
    "test_run_again",
    "test_frequencies",
    "test_artifacts",
    "test_conformance_onnx",
    "test_onnx_runtime",
    "test_families_rotary",
    "test_families_layer_norm",
    "test_families_packed",
    "test_families_post_norm",
    "test_chosen_prefix",
    "test_rotary",
    "test_readers",
    "test_sweep",
    "test_report_command",
    "test_web_page",
    "test_plan",
    "test_parity",
    "test_cli",
    "test_written_options",
    "test_families_experts",
    "test_families_opt",
)
"""Files of half a minute and more, longest first: a worker that began one of them last would be
alone in the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--regenerate-golden`` writes the golden files anew; read the difference before you commit
    it.
    """
    parser.addoption(
        "--regenerate-golden",
        action="store_true",
        help="write the golden files instead of comparing",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; everything else in the order that it has."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(scope="session")
def regenerate_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written."""
    return bool(request.config.getoption("--regenerate-golden"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session's own that its worker processes share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def trace_cache(request: pytest.FixtureRequest) -> Iterator[Path]:
    """For traced graphs, instead of the user's: pytest's own, where the next run finds them.

    The name of an entry is a hash of all that decides a trace, our own modules among it; half of
    the time of a first run goes into traces. ``pytest --cache-clear`` forgets them.
    """
    folder = Path(request.config.cache.mkdir("rotq"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROTQ_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def small_recipe() -> Recipe:
    """The default recipe on fewer rows."""
    return load_recipe(None, SMALL)


@pytest.fixture(scope="session")
def exported(shared: Path, small_recipe: Recipe) -> Path:
    """The embedded model, exported once for the session; workers wait for the first one. Tests that
    write must copy it.
    """
    from filelock import FileLock  # torch brings it

    from exporter.commands.export import export
    from exporter.run.options import RunOptions

    root = shared / "exported"
    output = root / "demo"
    with FileLock(shared / "exported.lock"):
        if not output.is_dir():  # it appears whole
            export(small_recipe, RunOptions(output, work_dir=root / "work"))
    return output


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct, made once into the user's cache; workers wait for the first one."""
    from benchmarks.real_model import UnavailableError, real_model

    try:
        return real_model()
    except UnavailableError as error:
        pytest.skip(f"the real model cannot be had: {error}")
