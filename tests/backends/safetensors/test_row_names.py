"""Names in checkpoints that transformers itself writes: read, and written again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backends.safetensors.backend import SafetensorsBackend
from backends.safetensors.names import Names
from calib.fusing import check_contents
from calib.fusing.source import SourceTensors
from calib.network import open_checkpoint, portable_config
from calib.network.skeleton import expected_tensors
from calib.schemes import LINEAR_SCHEMES
from tests.answers import model_refusal
from tests.rows import ROWS
from tests.tiny import make_tiny


@pytest.mark.parametrize("name", ROWS)
def test_what_transformers_saves_is_read_and_called_the_same_again(
    name: str, tmp_path: Path
) -> None:
    tiny = make_tiny(ROWS[name]())
    tiny.model(torch.float32).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    check_contents(checkpoint, tiny.wiring, name)

    source = SourceTensors(checkpoint, tiny.wiring, expected_tensors(tiny.config))
    names = Names.of(portable_config(tiny.config))
    written: set[str] = set()
    for key, tensor in tiny.state.items():
        assert torch.equal(source.read(key), tensor.float())
        written |= {stored for stored, _ in names.stored(key, tensor)}
    tied = {tiny.wiring.head.weight} if tiny.config.tie_word_embeddings else set()
    assert written - tied == set(checkpoint)


@pytest.mark.parametrize("name", ["experts.gate_up_proj.0", "input_linear"])
def test_experts_in_one_piece_have_no_place_in_a_bundle(name: str) -> None:
    """As the run calls them, and as the plan does."""
    config = portable_config(ROWS["granitemoe"]())
    linears = {f"model.layers.0.block_sparse_moe.{name}": LINEAR_SCHEMES["int8-weight-only"]}
    found = model_refusal(SafetensorsBackend(), config, linears, "vllm")
    assert found is not None
    assert "in one piece" in found.reason
