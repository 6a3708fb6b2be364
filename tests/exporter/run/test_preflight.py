"""What is found out before anything is loaded: a kind each, by a plan and by a run alike."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends.registry import get_backend
from calib.errors import BackendError, OutputError, RecipeError
from exporter.commands.export import export
from exporter.output import LOCK_FILE
from exporter.planning.plan import plan
from exporter.recipe import load_recipe
from exporter.run.destination import Destination
from exporter.run.options import RunOptions
from exporter.run.preflight import check_disk, check_libraries, row_warnings, tokenizer_warnings
from exporter.run.quantizing import check_names
from tests.checkpoints import write_checkpoint
from tests.exporter.cli_support import write_llama

HOLD = """
import sys, time
from pathlib import Path
from exporter.output.lock import take
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
lock = take(folder)
print("held", flush=True)
sys.stdin.read()
"""


def planned(folder: Path, options: RunOptions | None = None, **values: Any) -> tuple[str, ...]:
    recipe = load_recipe(None, {"model": str(folder), "dtype": "float32", **values})
    return plan(recipe, options or RunOptions(Path("out"))).warnings


@pytest.mark.parametrize("held", ["out/.model.rotq", "work"])
def test_what_another_run_holds_is_refused_by_a_plan(held: str, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    options = RunOptions(Path("out/model"), work_dir=Path("work"))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, held],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"is in use by process {process.pid} on") as caught:
            planned(folder, options)
        assert "wait for that run" in str(caught.value.hint)
        process.communicate("")
    # the file that a killed run leaves is no lock, and it is not taken away
    assert (Path(held) / LOCK_FILE).is_file()
    planned(folder, options)
    assert (Path(held) / LOCK_FILE).is_file()


def test_a_full_disk_is_refused_with_what_is_free(tmp_path: Path) -> None:
    options = RunOptions(tmp_path / "new" / "out")
    check_disk(options, 1)
    with pytest.raises(OutputError, match=r"GB free, and about 1125899\.9 GB are written"):
        check_disk(options, 2**50)
    both = RunOptions(tmp_path / "out", work_dir=tmp_path / "work")
    with pytest.raises(OutputError, match=r"about 2251799\.8 GB are written"):
        check_disk(both, 2**50)


def test_a_plan_and_a_run_ask_for_the_room_that_their_output_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "model")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    recipe = load_recipe(None, {"model": str(folder), "scheme": "int8-weight-only"})
    for run in (plan, export):
        with pytest.raises(OutputError, match=r"has 0\.0 GB free"):
            run(recipe, RunOptions(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_library_that_a_target_lacks_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backend = get_backend("safetensors")
    assert backend.libraries("modelopt") == {}  # type: ignore[attr-defined]
    command = backend.libraries("vllm")["compressed_tensors"]  # type: ignore[attr-defined]
    assert command.startswith("pip install")
    monkeypatch.setattr(
        type(backend), "libraries", lambda self, target: {"no_such_library": "pip install it"}
    )
    recipe = load_recipe(
        None, {"model": "nowhere", "backend": "safetensors", "target": "vllm", "dtype": "float32"}
    )
    runs: list[Callable[[], object]] = [
        lambda: check_libraries(Destination.of(recipe), RunOptions(Path("out"))),
        lambda: plan(recipe, RunOptions(Path("out"))),
        lambda: export(recipe, RunOptions(Path("out"))),
    ]
    for run in runs:
        with pytest.raises(BackendError, match="'no_such_library', which is not installed") as it:
            run()
        assert it.value.hint == "pip install it"


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"scheme": "float", "weights.algorithm": "gptq"}, "weights.algorithm"),
        ({"scheme": "int8-weight-only", "activations.observer": "mse"}, "activations.observer"),
        ({"scheme": "int8-dynamic", "activations.observer": "mse"}, "activations.observer"),
    ],
)
def test_what_the_scheme_makes_moot_is_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe key '{key}' has no effect"):
        check_names(load_recipe(None, values))


@pytest.mark.parametrize(
    "values",
    [
        {"scheme": "float", "overrides": {"*": "int8"}, "weights.algorithm": "gptq"},
        {"scheme": "int8-weight-only", "kv": "int8", "activations.observer": "mse"},
        {"scheme": "int8-weight-only", "overrides": {"*": "int8"}, "activations.observer": "mse"},
        {"scheme": "nvfp4", "activations.observer": "mse"},
    ],
)
def test_what_an_override_or_the_cache_has_a_use_for_is_not(values: dict[str, Any]) -> None:
    check_names(load_recipe(None, values))


def test_blocks_that_a_width_has_no_whole_number_of_are_refused_by_a_plan(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    values = {"backend": "safetensors", "target": "tripy", "scheme": "int4-weight-only"}
    planned(folder, **values, **{"weights.block_size": 32})
    with pytest.raises(BackendError, match="input features of"):
        planned(folder, **values, **{"weights.block_size": 7})


def test_rows_that_a_text_has_not_are_said_by_a_plan_and_by_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("once upon a time there was a cat\n" * 100)
    values = {"calibration.dataset": str(text), "calibration.layout": "documents"}
    assert row_warnings(load_recipe(None, values)) == [
        f"'{text}' has room for about 15 evaluation rows, and 32 are asked for: give a longer"
        " text, a smaller --eval-nsamples or --seqlen, or an --eval-dataset"
    ]
    assert row_warnings(load_recipe(None, {**values, "evaluation.nsamples": 15})) == []
    assert row_warnings(load_recipe(None, {**values, "evaluation.dataset": "c4"})) == []
    assert row_warnings(load_recipe(None, {})) == []

    from calib.data.rows import RowSplits
    from exporter.run.calibration_text import warn_of_few_rows

    splits = RowSplits(train=[], gate=[], evaluation=[], layout="documents")
    with caplog.at_level(logging.WARNING):
        warn_of_few_rows(load_recipe(None, values), splits)
    assert "0 of 32 evaluation" in caplog.text


def test_a_tokenizer_that_is_missing_is_said_by_a_plan(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    (warning,) = planned(folder, scheme="int8-weight-only")
    assert "no tokenizer beside it" in warning
    destination = Destination.of(load_recipe(None, {"backend": "onnx"}))
    assert "onnxruntime-genai" in tokenizer_warnings(["tokenizer.model"], destination)[0]
    assert tokenizer_warnings(["tokenizer.json"], destination) == []
