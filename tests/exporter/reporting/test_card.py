"""The model card tells a stranger everything that matters, and first of all whether the model may
be used.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_support import sample_report
from huggingface_hub import ModelCard

from exporter.recipe import Recipe, load_recipe
from exporter.reporting.card import render_card, source_license, write_card
from exporter.reporting.report import ModelSummary, RotationGateRow


def test_the_metadata_is_what_the_hub_reads() -> None:
    model = sample_report().model.model_copy(update={"source": "some-org/some-model"})
    data = ModelCard(render_card(Recipe(), sample_report(model=model), "mit")).data.to_dict()
    assert data["license"] == "mit"
    assert data["base_model"] == "some-org/some-model"
    assert {"rotq", "quantized", "int8", "onnx"} <= set(data["tags"])
    assert data["pipeline_tag"] == "text-generation"


@pytest.mark.parametrize("source", ["embedded", "/data/models/mine", "./mine"])
def test_a_base_model_that_is_no_hub_id_is_left_out(source: str) -> None:
    report = sample_report(
        model=ModelSummary(source=source, model_type="llama", parameters=1, fingerprint="f")
    )
    card = ModelCard(render_card(Recipe(), report))
    assert "base_model" not in card.data.to_dict()
    assert "license" not in card.data.to_dict()
    assert source == "embedded" or "/data" not in card.text.split("## Recipe")[0]


def test_a_failed_model_says_so_before_anything_else() -> None:
    text = ModelCard(render_card(Recipe(), sample_report("failed"))).text
    banner = text.index("PARITY FAILED. Do not deploy")
    assert banner < text.index("## How to run")
    assert "end to end: relative L2 0.02, bound 0.009" in text
    assert "| **FAIL** |" in text


def test_a_passed_and_an_unverified_model_are_told_apart() -> None:
    assert "Parity passed" in render_card(Recipe(), sample_report())
    unverified = render_card(Recipe(), sample_report("unverified", parity=[]))
    assert "Not verified" in unverified
    assert "Not measured." in unverified


def test_a_runtime_that_did_not_run_it_is_named_beside_what_did() -> None:
    ran = (
        sample_report()
        .parity[1]
        .model_copy(update={"runtime": "torch, from the file", "not_run_in": "vLLM"})
    )
    report = sample_report(target="vllm", backend="safetensors", parity=[ran])
    text = render_card(Recipe(), report)
    assert (
        "**Parity passed, but not in vLLM**: the exported files were run in torch, from the file"
        in text
    )
    assert "* not run in: vLLM" in text
    assert "vllm serve FOLDER" in text
    failed = render_card(Recipe(), report.model_copy(update={"status": "failed"}))
    assert "PARITY FAILED. Do not deploy" in failed
    assert "not run in" not in render_card(Recipe(), sample_report())


def test_folded_and_online_rotations_are_told_apart() -> None:
    text = render_card(Recipe(), sample_report())
    assert "| r1 | residual | 256 | 1 | folded into the weights | trained |" in text
    assert "| r2[*] | value[*] | 32 | 6 | folded into the weights | trained |" in text
    assert "| r4 | ffn | 704 | 1 | online: computed at run time | hadamard |" in text
    assert "must apply them too" in text
    assert "must apply them too" not in render_card(Recipe(), sample_report(rotations=[]))


def test_the_gate_is_shown_with_what_did_not_help() -> None:
    text = render_card(Recipe(), sample_report())
    assert (
        "| **r1,r2,r4** | **0.004** | **0** | **-** | **97.00%** | **14.460** | **chosen** |"
        in text
    )
    assert "| r1,r2 | 0.17 | 0.17 | 0.16 to 0.17 | 80.00% | 17.100 |  |" in text
    assert "r1,r2 did not help: KL 0.17 against 0.16 of the model as it is" in text


def test_the_candidates_of_each_rotation_are_shown_with_what_was_kept() -> None:
    measure = "held-out activations, int8"
    rows = [
        RotationGateRow(
            rotation="R1", candidate="hadamard", error=1e-4, measure=measure, chosen=True
        ),
        RotationGateRow(rotation="R1", candidate="trained", error=3e-4, measure=measure),
    ]
    text = render_card(Recipe(), sample_report(rotation_gate=rows))
    assert "| **R1** | **hadamard** | **1.000e-04** |" in text
    assert "* training R1 gained nothing over hadamard: 3.00 x its error" in text


@pytest.mark.parametrize(
    ("kv_buffer", "first", "next"),
    [
        (
            "grown",
            "(1, heads, 0, size)",
            "feed the `present.*` outputs back as `past_key_values.*`.",
        ),
        (
            "shared",
            "(1, heads, ids.shape[1], size)",
            "bind each `present.*` output to the memory of its input",
        ),
    ],
)
def test_how_to_run_is_told_for_the_buffer_that_was_written(
    kv_buffer: str, first: str, next: str
) -> None:
    text = render_card(load_recipe(None, {"kv_buffer": kv_buffer}), sample_report())
    usage = text.split("## How to run")[1].split("## Layers")[0]
    assert first in usage
    assert next in usage
    assert "$" not in usage


def test_cells_cannot_break_the_table() -> None:
    assert "a\\|b" in render_card(Recipe(), sample_report())


def test_the_recipe_in_the_card_reads_back(tmp_path: Path) -> None:
    recipe = Recipe(seed=11)
    text = render_card(recipe, sample_report())
    (tmp_path / "r.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    assert load_recipe(tmp_path / "r.yaml") == recipe


def test_the_license_of_a_local_checkpoint_travels_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    recipe = Recipe(model=str(source))
    assert source_license(recipe) is None
    (source / "README.md").write_text("---\nlicense: llama3.2\n---\n# A model\n", encoding="utf-8")
    assert source_license(recipe) == "llama3.2"
    write_card(tmp_path, recipe, sample_report())
    assert ModelCard.load(tmp_path / "README.md").data.license == "llama3.2"


def test_a_card_with_broken_metadata_means_no_license(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n: [\n---\n", encoding="utf-8")
    assert source_license(Recipe(model=str(tmp_path))) is None
