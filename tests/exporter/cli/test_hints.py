"""Commands that hints and last lines advise are run as they are printed."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from calib.errors import CheckpointError
from calib.network.checkpoint import open_checkpoint
from exporter.planning.plan import plan
from exporter.recipe import load_recipe
from exporter.run.options import RunOptions
from tests.checkpoints import write_checkpoint
from tests.exporter.cli_support import rotq


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "a model")


def test_pickles_become_a_folder_that_an_export_takes(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "its pickles")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickles") as caught:
        open_checkpoint(folder)
    python, *arguments = shlex.split(str(caught.value.hint).partition(": ")[2])
    assert python == "python"
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    converted = tmp_path / "its pickles-safetensors"
    plan(load_recipe(None, {"model": str(converted)}), RunOptions(Path("out")))
    assert (converted / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "command",
    [
        ("stats", "--scheme", "w4a4", "--rotate", "none"),
        ("capture",),
    ],
    ids=" ".join,
)
def test_what_comes_next_is_planned(model: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    sizes = ("--nsamples", "4", "--seqlen", "32", "--device", "cpu")
    done = rotq(*command, "-m", model, *sizes, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    advised = done.stderr.partition("next:\n")[2].strip().partition("  (")[0]
    program, *arguments = shlex.split(advised)
    assert program == "rotq"
    advised_run = rotq(*arguments, "--dry-run", cwd=tmp_path)
    assert advised_run.returncode == 0, advised_run.stderr
