"""Models other than the embedded one, from folders and as objects, through the whole pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from calib.rotations.rotation_set import RotationSet
from exporter import export as export_from_python
from exporter.commands.export import export
from exporter.parity.tables import table_rows
from exporter.run.options import RunOptions
from exporter.source import open_source
from tests.checkpoints import TINY, write_checkpoint
from tests.few import few, parity_row


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


def one_by_one() -> Any:
    """Of a family that is not in the table, whose tensors lie under other names in the tree."""
    return transformers.FlexOlmoConfig(**TINY, num_experts=2, num_experts_per_tok=1)


def test_embeddings_of_a_converted_checkpoint_are_compared(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", one_by_one())
    source = open_source(few(model=str(model)))
    fused = source.fuse(RotationSet(), dtype=torch.float32, fold_norms=False)
    (row,) = table_rows(source, fused)
    assert row.measured == 0
    fused.state[source.wiring.embeddings[0].weight][5, 3] += 1
    (row,) = table_rows(source, fused)
    assert row.passed is False
    assert row.note.startswith("worst: row 5 of")


@pytest.mark.census
def test_experts_stored_one_by_one_pass_where_the_family_is_not_in_the_table(
    tmp_path: Path,
) -> None:
    model = write_checkpoint(tmp_path / "model", one_by_one())
    recipe = few(model=str(model), scheme="int8-weight-only")
    report = export(recipe, RunOptions(tmp_path / "out")).report
    assert report.status == "passed"
    assert report.model.how == "generic"
    assert parity_row(report, 1, "embedding rows", "relative length").measured == 0
