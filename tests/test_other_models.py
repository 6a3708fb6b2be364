"""Models other than the embedded one, from folders and as objects, through the whole pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from exporter import export as export_from_python
from exporter.commands.export import export
from exporter.run.options import RunOptions
from tests.checkpoints import write_checkpoint
from tests.few import few


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"head_dim": 12, "num_key_value_heads": 4},
        {"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 36, "head_dim": 10},
    ],
    ids=["biases, tied", "head_dim is not hidden / heads", "one kv head, odd sizes"],
)
def test_llamas_of_every_kind_pass(tmp_path: Path, changes: dict[str, object]) -> None:
    model = write_checkpoint(tmp_path / "model", **changes)
    report = export(few(model=str(model), rotate="r1,r2,r4"), RunOptions(tmp_path / "out")).report
    assert [row.name for row in report.parity if row.passed is False] == []


@pytest.mark.parametrize("scheme", ["int8-weight-only", "int8"])
def test_a_model_object_is_exported_from_python(tmp_path: Path, scheme: str) -> None:
    folder = write_checkpoint(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = export_from_python(model, few(scheme=scheme, rotate="r1,r2"), output=tmp_path / "out")
    assert result.report.status == "passed"
    assert result.report.scheme == scheme
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
