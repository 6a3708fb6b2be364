"""A walk that is killed goes on where it was, and ends byte for byte as one that is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.errors import CheckpointError, DataError, OutputError
from calib.layerwise import CalibrationRunner, ShardStore
from tests.calib.layerwise import killed_walk
from tests.calib.layerwise.layerwise_support import Rtn, batches, lazily, shard_bytes, walk
from tests.tiny import Tiny

ASYMMETRIC = {"asym": True, "w_quant": True, "a_quant": True}


class Killed(BaseException):
    """Not an error that any code would handle, as SIGKILL is not."""


@pytest.mark.parametrize("flags", [{}, ASYMMETRIC], ids=["float", "asymmetric"])
def test_stopping_at_any_rename_changes_nothing(
    llama: Tiny, flags: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files appear by being renamed. Stop before each rename in turn, once, all in one walk of many
    resumes.
    """
    fused = lazily(llama)
    walk(fused, tmp_path / "whole", flags, head=True)
    renamed: set[str] = set()
    replace = Path.replace

    def stop_the_first_time(source: Path, target: Path) -> Path:
        where = f"{target.name} with {len(shard_bytes(tmp_path / 'killed'))} shards"
        if where not in renamed:
            renamed.add(where)
            raise Killed
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", stop_the_first_time)
    finished = False
    while not finished:
        with suppress(Killed):
            walk(fused, tmp_path / "killed", flags, head=True, resume=True, max_memory=0)
            finished = True
    assert len(renamed) > 15
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("hidden-*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_sigkill_at_random_points_changes_nothing(tmp_path: Path) -> None:
    """In a process of its own: it forks walks, kills them, and prints the blocks in which it did
    (killed_walk.py).
    """
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.calib.layerwise.killed_walk",
        str(tmp_path),
        "0",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300, env=environment
    )
    kills = json.loads(result.stdout)
    assert len(kills) == killed_walk.KILLS
    assert any(0 < finished < killed_walk.LAYERS for finished in kills)
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "whole")


def stopped_after(blocks: int, tiny: Tiny, work: Path, **options: Any) -> None:
    """A walk that ends when ``blocks`` blocks are finished."""

    def stop(stage: str, done: int, total: int | None) -> None:
        if done == blocks:
            raise Killed

    with pytest.raises(Killed):
        walk(lazily(tiny), work, progress=stop, **options)


def test_finished_blocks_are_not_calibrated_again(llama: Tiny, tmp_path: Path) -> None:
    stopped_after(1, llama, tmp_path)
    calibrator = walk(lazily(llama), tmp_path, resume=True)
    assert len(calibrator.groups) == 1
    assert all(name.startswith("model.layers.1.") for name in calibrator.groups[0])
    assert not walk(lazily(llama), tmp_path, resume=True).groups


def test_other_settings_are_refused_by_name(llama: Tiny, tmp_path: Path) -> None:
    stopped_after(1, llama, tmp_path, settings={"scheme": "int8"})
    with pytest.raises(OutputError, match="scheme was int8 and is now int4"):
        walk(lazily(llama), tmp_path, resume=True, settings={"scheme": "int4"})
    with pytest.raises(OutputError, match="asym was false and is now true"):
        walk(lazily(llama), tmp_path, {"asym": True}, resume=True, settings={"scheme": "int8"})
    with pytest.raises(OutputError, match=r"dtype was torch\.float32 and is now torch\.bfloat16"):
        walk(
            lazily(llama, dtype=torch.bfloat16), tmp_path, resume=True, settings={"scheme": "int8"}
        )


def test_a_folder_with_a_walk_needs_resume(llama: Tiny, tmp_path: Path) -> None:
    stopped_after(1, llama, tmp_path)
    with pytest.raises(OutputError, match="holds a layer-wise run already"):
        walk(lazily(llama), tmp_path)


def test_a_damaged_shard_is_named(llama: Tiny, tmp_path: Path) -> None:
    stopped_after(1, llama, tmp_path)
    shard = tmp_path / "shards" / "quantized_model-block-00000.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"block-00000\.safetensors' is missing or damaged"):
        ShardStore(tmp_path, resume=True)


def test_a_damaged_journal_is_named(llama: Tiny, tmp_path: Path) -> None:
    stopped_after(1, llama, tmp_path)
    (tmp_path / "journal.json").write_text('{"settings": {}')
    with pytest.raises(CheckpointError, match=r"journal\.json' is damaged"):
        ShardStore(tmp_path, resume=True)


def test_a_walk_that_kept_nothing_cannot_be_resumed_in_its_middle(
    llama: Tiny, tmp_path: Path
) -> None:
    stopped_after(1, llama, tmp_path, resumable=False, max_memory=0)
    with pytest.raises(CheckpointError, match="keeps no hidden states"):
        walk(lazily(llama), tmp_path, resume=True)


def test_batches_with_padding_are_refused(llama: Tiny, tmp_path: Path) -> None:
    padded = [
        replace(batch, attention_mask=torch.ones_like(batch.input_ids)) for batch in batches()
    ]
    with pytest.raises(DataError, match="without padding"):
        CalibrationRunner(lazily(llama), padded, Rtn(), tmp_path)
