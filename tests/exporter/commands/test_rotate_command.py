"""``rotq rotate``: a stock folder that computes what the original does, or no folder at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, safe_open
from torch import Tensor

from calib.architectures import wiring_for
from calib.artifact import load_artifact
from calib.errors import RotationError, UnsupportedModelError
from calib.rotations.files import save_rotations
from calib.rotations.rotation_set import hadamard_rotations
from exporter import source as source_module
from exporter.commands.export import calibrate
from exporter.commands.rotate import RotateResult, rotate
from exporter.parity.fold import FOLD_BOUND
from exporter.recipe import RECIPE_FILE, Recipe, load_recipe
from exporter.reporting.report import ROTATE_REPORT_FILE, RotateReport
from exporter.run.options import RunOptions
from tests.checkpoints import TINY, VOCABULARY, write_checkpoint
from tests.tiny import relative_l2

SMALL = {
    "calibration.nsamples": 8,
    "gate.nsamples": 2,
    "evaluation.nsamples": 2,
    "rotation.r1_tokens": 512,
    "rotation.r2_tokens": 64,
    "rotation.r1.epochs": 2,
    "rotation.r2.epochs": 2,
    "device": "cpu",
}


def recipe(model: Path, **changes: Any) -> Recipe:
    return load_recipe(
        None,
        {**SMALL, "model": str(model), **{k.replace("__", "."): v for k, v in changes.items()}},
    )


def logits(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(3, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def test_config_json_says_the_same_to_transformers_4(tmp_path: Path) -> None:
    rope = {"rope_theta": 1e5, "rope_type": "default"}
    model = write_checkpoint(tmp_path / "model", rope_parameters=rope)
    rotate(recipe(model, rotate="none"), RunOptions(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (1e5, None)
    assert config["torch_dtype"] == config["dtype"]
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def rotated(source: Path, tmp_path_factory: pytest.TempPathFactory) -> RotateResult:
    output = tmp_path_factory.mktemp("rotated") / "out"
    return rotate(recipe(source), RunOptions(output), write_dartquant=True)


def test_the_folder_computes_what_the_original_does(source: Path, rotated: RotateResult) -> None:
    (figure,) = rotated.report.parity
    assert figure.bound == FOLD_BOUND
    assert figure.passed is True
    # Measured again here, on other tokens and without the pipeline.
    assert relative_l2(logits(rotated.output), logits(source)) <= FOLD_BOUND
    before, after = (load_file(folder / "model.safetensors") for folder in (source, rotated.output))
    name = "model.layers.0.self_attn.v_proj.weight"
    assert relative_l2(after[name], before[name]) > 0.5  # it is another set of weights
    assert torch.equal(after["model.norm.weight"], torch.ones(TINY["hidden_size"]))


def test_the_folder_is_complete(rotated: RotateResult) -> None:
    names = {path.name for path in rotated.output.iterdir()}
    wanted = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        RECIPE_FILE,
        "README.md",
    }
    assert (
        wanted | {"rotations.safetensors", "rotations.json", ROTATE_REPORT_FILE, "r1.pt", "r2.pt"}
        <= names
    )
    config = json.loads((rotated.output / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["dtype"] == "float32"  # the source's own
    assert load_recipe(rotated.output / RECIPE_FILE) == rotated.recipe
    report = RotateReport.model_validate_json((rotated.output / ROTATE_REPORT_FILE).read_text())
    assert report == rotated.report
    rows = {(row.rotation, row.candidate): row for row in report.rotation_gate}
    assert len(rows) == 8
    assert {name for (name, _), row in rows.items() if row.chosen} == {"R1", "R2"}
    assert len(rows["R2", "identity"].layers) == TINY["num_hidden_layers"]
    card = (rotated.output / "README.md").read_text()
    for expected in ("library_name: transformers", "| R1 | hadamard |", "relative L2", "## Recipe"):
        assert expected in card


def test_rotations_from_files_give_the_same_weights(
    source: Path, rotated: RotateResult, tmp_path: Path
) -> None:
    files = [
        str(rotated.output / name)
        for name in ("r1.pt", "r2.pt")
        if (rotated.output / name).is_file()
    ]
    again = rotate(recipe(source, rotation__files=files), RunOptions(tmp_path / "again"))
    before, after = (
        load_file(folder / "model.safetensors") for folder in (rotated.output, again.output)
    )
    for name, tensor in before.items():
        # float64 folds, rounded once
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-6)
    assert again.report.rotation_gate == []
    assert {rotation.origin for rotation in again.report.rotations} <= {
        "DartQuant, from r1.pt",
        "DartQuant, from r2.pt",
    }
    assert again.report.rotations


def test_bfloat16_is_held_to_the_models_own_rounding(source: Path, tmp_path: Path) -> None:
    result = rotate(recipe(source, dtype="bfloat16", rotate="r1"), RunOptions(tmp_path / "out"))
    ours, own = result.report.parity
    assert own.measured is not None
    assert ours.measured is not None
    assert ours.bound == pytest.approx(2 * own.measured)
    # above what float32 leaves: it is bfloat16 that was compared
    assert 1e-4 < ours.measured <= ours.bound
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = file.keys()
        assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            transformers.GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_head=4, n_layer=2, n_positions=128
            ),
            "h.0.attn",
        ),
        (
            transformers.MixtralConfig(**TINY, num_local_experts=2, num_experts_per_tok=1),
            "model.layers.1.block_sparse_moe.experts.1.w2.weight",
        ),
        (transformers.Gemma2Config(**TINY, head_dim=8, query_pre_attn_scalar=8), "model.layers.0"),
    ],
    ids=["gpt2", "mixtral", "gemma2"],
)
def test_other_families_keep_their_published_names(
    config: Any, expected: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", config)
    result = rotate(recipe(source), RunOptions(tmp_path / "out"))
    with (
        safe_open(source / "model.safetensors", framework="pt") as before,
        safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as after,
    ):
        assert any(expected in name for name in after.keys())  # noqa: SIM118 - no mapping
        assert set(before.keys()) | {"lm_head.weight"} == set(after.keys())
    kinds = {row.rotation for row in result.report.rotation_gate}
    assert kinds == ({"R2"} if config.model_type == "gemma2" else {"R1", "R2"})


@pytest.mark.parametrize("asked", ["r1,r4", "r3"])
def test_online_rotations_are_refused_with_the_reason(
    source: Path, tmp_path: Path, asked: str
) -> None:
    with pytest.raises(RotationError, match=r"stock folder cannot carry R[34]: online") as caught:
        rotate(recipe(source, rotate=asked), RunOptions(tmp_path / "out"))
    assert caught.value.hint is not None
    assert "rotq export" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_norm_bias_that_no_stock_model_can_hold_is_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_head=4, n_layer=1, n_positions=128
    )
    source = write_checkpoint(tmp_path / "source", config)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = 1e-30
    model.save_pretrained(source)
    with pytest.raises(
        UnsupportedModelError, match=r"transformer\.ln_f would have to stay in the norm"
    ):
        rotate(recipe(source, rotate="r1"), RunOptions(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_wrong_fold_is_noticed_and_nothing_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse = source_module.fuse

    def almost(*args: Any, **kwargs: Any) -> Any:
        fused = fuse(*args, **kwargs)
        fused.state["model.layers.1.mlp.down_proj.weight"] *= 1.001
        return fused

    monkeypatch.setattr(source_module, "fuse", almost)
    with pytest.raises(RotationError, match=r"relative L2 of logits .*, bound 1e-05"):
        rotate(recipe(source, rotate="none"), RunOptions(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_files_with_a_rotation_that_is_left_out_are_refused(source: Path, tmp_path: Path) -> None:
    wiring = _table_entry(source)
    save_rotations(hadamard_rotations(wiring, ["r2", "r3"]), tmp_path / "rotations")
    files = [str(tmp_path / "rotations")]
    with pytest.raises(RotationError, match="hold R3, which"):
        rotate(recipe(source, rotation__files=files), RunOptions(tmp_path / "out"))
    with pytest.raises(RotationError, match="hold R2, R3, which --rotate r1 leaves out") as caught:
        calibrate(recipe(source, rotation__files=files, rotate="r1"), RunOptions(tmp_path / "out"))
    assert caught.value.hint is not None
    assert "--rotate r2,r3" in caught.value.hint


def test_calibrate_uses_files_and_trains_what_they_lack(source: Path, tmp_path: Path) -> None:
    wiring = _table_entry(source)
    made = hadamard_rotations(wiring, ["r2", "r4"], seed=7)
    # older files have online rotations with signs
    wanted = made.merged(replace(rotation, seed=7) for rotation in made.values() if rotation.online)
    save_rotations(wanted, tmp_path / "rotations")
    chosen = recipe(source, rotation__files=[str(tmp_path / "rotations")], rotate="r1,r2,r4")
    quantized = calibrate(chosen, RunOptions(tmp_path / "out")).quantized
    table = quantized.provenance.rotation_gate
    assert [row["rotation"] for row in table] == ["R1"] * 4
    kept = load_artifact(tmp_path / "out").provenance.rotation_gate
    assert [row["error"] for row in kept] == [row["error"] for row in table]
    for name, rotation in wanted.items():
        assert quantized.rotations[name].seed == rotation.seed == 7
        assert quantized.rotations[name].origin.endswith("from rotations.safetensors")


def _table_entry(source: Path) -> tuple[Any, Any]:
    from calib.network.checkpoint import load_config

    config = load_config(source)
    return wiring_for(config)
