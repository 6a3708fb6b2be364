"""What lies beside the weights is bounded before transformers reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from calib.errors import CheckpointError
from calib.files.reading import LARGEST
from calib.network.checkpoint import load_config
from calib.network.original import load_network
from tests.checkpoints import write_checkpoint


def test_a_generation_config_of_any_size_is_refused_unread(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    with (folder / "generation_config.json").open("wb") as file:
        file.truncate(LARGEST + 1)  # on a disk that hardly notices
    with pytest.raises(CheckpointError, match=r"generation_config\.json is larger than"):
        load_network(folder, load_config(folder))
