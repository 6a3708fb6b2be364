"""A run is resumed from the inputs that it began with, whatever they are called."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from calib.artifact import load_artifact
from calib.errors import OutputError
from exporter.commands.export import calibrate, export, run_capture
from exporter.commands.rotate import rotate
from exporter.recipe import Recipe
from exporter.run.options import RunOptions
from exporter.run.workdir import CONTENTS
from tests.checkpoints import write_checkpoint
from tests.few import few
from tests.sealing import edit_sealed

TEXT = "A line of text that is long enough to be a row of its own, number {}.\n"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, rotations and a capture, with a work folder of a run that used them."""
    folder = tmp_path_factory.mktemp("started")
    write_checkpoint(folder / "model", num_hidden_layers=1)
    (folder / "text.txt").write_text("".join(TEXT.format(number) for number in range(60)))
    plain = few(
        model=str(folder / "model"), rotate="r1", rotation__select=False, calibration__seqlen=16
    )
    rotate(plain, RunOptions(folder / "rotated"))
    run_capture(plain, RunOptions(folder / "capture"))
    calibrate(recipe(folder), options(folder, "out"))
    return folder


def recipe(folder: Path) -> Recipe:
    return few(
        model=str(folder / "model"),
        rotate="r1",
        calibration__dataset=str(folder / "text.txt"),
        calibration__seqlen=16,
        rotation__files=[str(folder / "rotated")],
    )


def options(folder: Path, output: str, *, resume: bool = False) -> RunOptions:
    return RunOptions(folder / output, work_dir=folder / "work", resume=resume)


@pytest.fixture
def copied(started: Path, tmp_path: Path) -> Path:
    """All of it at another place, where a test may change it."""
    folder = shutil.copytree(started, tmp_path / "copy")
    kept = folder / "work" / "rotq.yaml"
    kept.write_text(kept.read_text().replace(str(started), str(folder)))
    return folder


def test_the_same_inputs_at_another_place_are_the_same(copied: Path) -> None:
    result = calibrate(recipe(copied), options(copied, "again", resume=True))
    assert result.quantized.linears


def _text(folder: Path) -> None:
    text = folder / "text.txt"
    text.write_text(text.read_text().replace("number 7.", "number 8."))


def _config(folder: Path) -> None:
    path = folder / "model" / "config.json"
    values = json.loads(path.read_text())
    values["rope_parameters"] = {**values["rope_parameters"], "rope_theta": 5e5}
    path.write_text(json.dumps(values))


def _epsilon(folder: Path) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))


def _tokenizer(folder: Path) -> None:
    path = folder / "model" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"] = [{**token, "special": False} for token in values["added_tokens"]]
    path.write_text(json.dumps(values))


def _weights(folder: Path) -> None:
    write_checkpoint(folder / "model", num_hidden_layers=1, seed=1)


def _rotations(folder: Path) -> None:
    shutil.rmtree(folder / "rotated")
    other = few(model=str(folder / "model"), rotate="r1", calibration__seqlen=16, seed=5)
    rotate(other, RunOptions(folder / "rotated"))


def _version(folder: Path) -> None:
    edit_sealed(
        folder / "work" / CONTENTS,
        lambda values: values["contents"].update({"the version of torch": "1.0"}),
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_text, r"the calibration text 'text\.txt' changed since the run began"),
        (_config, r"rope_parameters of config\.json changed from .*10000.* to .*500000"),
        (_epsilon, r"rms_norm_eps of config\.json changed from 1e-06 to 0\.001"),
        (_tokenizer, r"the tokenizer's tokenizer\.json changed"),
        (_weights, "the weights of the model changed"),
        (_rotations, r"the rotations in rotations\.(json|safetensors) changed"),
        (_version, r"the version of torch changed from 1\.0 to \d"),
    ],
)
def test_a_resume_from_other_inputs_is_refused_by_name(
    copied: Path, change: Callable[[Path], None], said: str
) -> None:
    change(copied)
    with pytest.raises(OutputError, match=said) as caught:
        export(recipe(copied), options(copied, "again", resume=True))
    assert "another --work-dir" in str(caught.value.hint)
    assert not (copied / "again").exists()


class Hub(ModuleType):
    """Stands in for the ``datasets`` library."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.lines = [TEXT.format(number) for number in range(60)]
        self.readings = 0

    def load_dataset(self, path: str, **options: object) -> Iterator[dict[str, str]]:
        self.readings += 1
        return iter([{"text": line} for line in self.lines])


def test_a_data_set_of_the_hub_that_changed_is_refused_by_name(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    plain = few(
        model=str(copied / "model"),
        rotate="none",
        calibration__dataset="someone/something",
        calibration__seqlen=16,
    )
    kept = {"work_dir": copied / "of hub"}
    calibrate(plain, RunOptions(copied / "one", **kept))
    assert hub.readings == 1  # what was fingerprinted is what was calibrated on
    calibrate(plain, RunOptions(copied / "two", resume=True, **kept))

    hub.lines[7] = TEXT.format("seven")
    said = "the calibration text 'someone/something' changed since the run began"
    with pytest.raises(OutputError, match=said):
        calibrate(plain, RunOptions(copied / "three", resume=True, **kept))


def test_a_capture_that_is_given_only_now_is_named(copied: Path) -> None:
    given = RunOptions(
        copied / "again",
        work_dir=copied / "work",
        resume=True,
        from_capture=copied / "capture",
    )
    with pytest.raises(OutputError, match=r"the capture given \(manifest\.json\) was added"):
        calibrate(recipe(copied), given)


def test_a_work_folder_without_fingerprints_is_refused(copied: Path) -> None:
    (copied / "work" / CONTENTS).unlink()
    with pytest.raises(OutputError, match=r"it has no inputs\.json"):
        calibrate(recipe(copied), options(copied, "again", resume=True))


def test_damaged_fingerprints_are_refused(copied: Path) -> None:
    path = copied / "work" / CONTENTS
    path.write_text(path.read_text().replace("the weights", "the weightz"))
    with pytest.raises(OutputError, match=r"inputs\.json is damaged"):
        calibrate(recipe(copied), options(copied, "again", resume=True))


def test_an_artifact_says_what_it_was_calibrated_on(started: Path) -> None:
    provenance = load_artifact(started / "out").provenance
    assert provenance.threads == torch.get_num_threads()
    assert provenance.cpu
    assert provenance.versions["torch"] == torch.__version__
