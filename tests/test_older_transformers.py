"""Folders that rotq wrote, read by transformers 4: runtimes bundle it, and its config has keys of
its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from exporter.commands.export import export
from exporter.commands.rotate import rotate
from exporter.run.options import RunOptions
from tests.checkpoints import VOCABULARY, write_checkpoint
from tests.few import few
from tests.install_runtimes import OPTIMUM
from tests.tiny import relative_l2
from tests.tolerances import SAME_SUMS

THETA = 5e5
"""Not the 10000 that version 4 takes where its config says nothing."""
_IN_OLDER = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
ids = torch.tensor(json.loads(sys.argv[1]))
found = []
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    with torch.no_grad():
        found.append(model.eval()(ids).logits.tolist())
print(json.dumps({"version": transformers.__version__, "logits": found}))
"""

pytestmark = [
    pytest.mark.runtimes,
    pytest.mark.skipif(
        not (OPTIMUM / "transformers").is_dir(),
        reason="transformers 4 is not installed (make test-runtimes)",
    ),
]


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0))


def newer(folder: Path, ids: Tensor) -> Tensor:
    """Logits in the transformers of this process."""
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = network.eval()(ids).logits
    return found


def older(ids: Tensor, *folders: Path) -> list[Tensor]:
    """Logits in transformers 4, in a process that alone sees it."""
    environment = os.environ | {"PYTHONPATH": str(OPTIMUM), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _IN_OLDER, json.dumps(ids.tolist()), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith("4.57.")
    return [torch.tensor(each) for each in found["logits"]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rope = {"rope_theta": THETA, "rope_type": "default"}
    return write_checkpoint(tmp_path_factory.mktemp("older") / "model", rope_parameters=rope)


def test_a_rotated_checkpoint_is_the_same_model(model: Path, ids: Tensor, tmp_path: Path) -> None:
    """And without the keys of version 4 it would be another: the test can fail."""
    folder = tmp_path / "rotated"
    rotate(few(model=str(model), rotate="r1,r2"), RunOptions(folder))
    without = shutil.copytree(folder, tmp_path / "without")
    config = json.loads((without / "config.json").read_text())
    del config["rope_theta"]
    (without / "config.json").write_text(json.dumps(config))

    right, wrong = older(ids, folder, without)
    expected = newer(folder, ids)
    assert relative_l2(right, expected) <= SAME_SUMS
    assert relative_l2(wrong, expected) > 1e-3


@pytest.mark.parametrize("scheme", ["int8", "int8-weight-only"])
def test_a_bundle_is_the_same_model(model: Path, ids: Tensor, scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    recipe = few(
        model=str(model),
        backend="safetensors",
        target="transformers",
        scheme=scheme,
        rotate="r1,r2",
    )
    folder = tmp_path / "bundle"
    export(recipe, RunOptions(folder, verify=False))
    (found,) = older(ids, folder)
    assert relative_l2(found, newer(folder, ids)) <= SAME_SUMS
