"""What a run reads is never overwritten, and what it writes is its own."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from calib.errors import OutputError
from exporter.commands.export import calibrate, export, run_capture
from exporter.commands.rotate import rotate
from exporter.commands.stats import stats
from exporter.output import atomic_folder
from exporter.recipe import Recipe, load_recipe
from exporter.run.options import RunOptions
from exporter.run.reservation import check_paths, reserved


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What an earlier run wrote: a checkpoint, say, of ``rotq rotate``."""
    with atomic_folder(tmp_path / "made") as made:
        (made / "model.safetensors").write_text("weights")
        (made / "inner").mkdir()
        (made / "inner" / "text.txt").write_text("text")
    return tmp_path / "made"


@pytest.mark.parametrize("below", ["", "inner"])
@pytest.mark.parametrize(
    ("what", "keys", "option"),
    [
        ("the model", "model", None),
        ("the artifact", None, "from_artifact"),
        ("the capture", None, "from_capture"),
        ("the rotations", "rotation.files", None),
        ("the calibration text", "calibration.dataset", None),
        ("the evaluation text", "evaluation.dataset", None),
    ],
)
def test_an_input_in_the_output_is_refused(
    folder: Path, below: str, what: str, keys: str | None, option: str | None
) -> None:
    place = folder / below
    value = [str(place)] if keys == "rotation.files" else str(place)
    recipe = load_recipe(None, {keys: value} if keys else {})
    chosen: dict[str, Any] = {option: place} if option else {}
    options = RunOptions(folder, overwrite=True, **chosen)
    with pytest.raises(OutputError, match=f"is {what} '{place}', or holds it"):
        check_paths(recipe, options)
    check_paths(recipe, RunOptions(folder.parent / "elsewhere", **chosen))


@pytest.mark.parametrize("run", [export, calibrate, run_capture, rotate, stats])
def test_every_command_refuses_it_first(run: Any, folder: Path) -> None:
    """The folder holds no model: whoever looked into it would say so."""
    recipe = Recipe(model=str(folder))
    with pytest.raises(OutputError, match="is the model"):
        run(recipe, RunOptions(folder, overwrite=True))
    assert (folder / "model.safetensors").read_text() == "weights"


def test_an_input_is_found_behind_links_and_by_either_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "text.txt").symlink_to(folder / "inner" / "text.txt")
    for model in (tmp_path / "link", tmp_path / "text.txt"):
        with pytest.raises(OutputError, match="is the model"):
            check_paths(Recipe(model=str(model)), RunOptions(folder, overwrite=True))
    with pytest.raises(OutputError, match="is the model"):
        check_paths(
            Recipe(model=str(folder / "inner")), RunOptions(tmp_path / "link", overwrite=True)
        )


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a" * 300, "org/model", "a\0b", ""])
def test_a_name_that_is_no_path_is_no_input(folder: Path, name: str) -> None:
    recipe = load_recipe(None, {"calibration.dataset": name, "evaluation.dataset": name})
    check_paths(
        recipe.model_copy(update={"model": name or "x"}), RunOptions(folder, overwrite=True)
    )


@pytest.mark.parametrize(
    ("output", "work"), [("a", "a"), ("a/b", "a"), ("a", "a/b"), ("x/../a", "a")]
)
def test_output_and_work_folder_are_apart(tmp_path: Path, output: str, work: str) -> None:
    with pytest.raises(OutputError, match="one holds the other"):
        check_paths(Recipe(), RunOptions(tmp_path / output, work_dir=tmp_path / work))


def test_two_runs_cannot_share_a_work_folder(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with (
        reserved(Recipe(), RunOptions(tmp_path / "one", work_dir=work)),
        pytest.raises(OutputError, match=r"the work folder '.*' is in use by process \d+ on "),
        reserved(Recipe(), RunOptions(tmp_path / "two", work_dir=work)),
    ):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_work_folder(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("notes")
    with (
        pytest.raises(OutputError, match="cannot write in the work folder"),
        reserved(Recipe(), RunOptions(tmp_path / "out", work_dir=tmp_path / "work")),
    ):
        pytest.fail("the block must not run")


def test_a_work_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()

    def refuse(folder: Path) -> None:
        if folder.name == "work":
            raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("exporter.output.lock.take", refuse)
    monkeypatch.setattr("exporter.run.reservation.claimed", lambda *_, **__: nullcontext())
    with (
        pytest.raises(OutputError, match=r"cannot write in the work folder .*Permission denied"),
        reserved(Recipe(), RunOptions(tmp_path / "out", work_dir=tmp_path / "work")),
    ):
        pytest.fail("the block must not run")
