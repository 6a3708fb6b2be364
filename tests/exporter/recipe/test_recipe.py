"""Recipes: precedence, refusal of what is unknown, and what a saved recipe means."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from calib.errors import RecipeError
from calib.rotations.rotate import Rotate
from calib.rotations.train_config import TrainConfig
from exporter.recipe import Recipe, load_recipe, presets, recipe_of_artifact, with_values
from exporter.recipe.schema import NEVER_IN_FILES, Weights


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_options_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\ncalibration:\n  nsamples: 16\n  seqlen: 64\n")
    recipe = load_recipe(path, {"calibration.nsamples": 8, "rotation.r1.epochs": 2, "scheme": None})
    assert (recipe.seed, recipe.calibration.nsamples, recipe.calibration.seqlen) == (3, 8, 64)
    assert (recipe.rotation.r1.epochs, recipe.rotation.r2.epochs) == (
        2,
        Recipe().rotation.r2.epochs,
    )
    assert recipe.scheme == "int8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheem: int8", "unknown recipe key 'scheem'"),
        ("calibration: {rows: 3}", "unknown recipe key 'calibration.rows'"),
        ("rotation: {r1: {learning_rate: 1}}", r"unknown recipe key 'rotation.r1.learning_rate'"),
        ("calibration: {nsamples: 0}", r"'calibration.nsamples': .* \(got 0\)"),
        ("rotate: r1,r9", "expected 'auto', 'none' or distinct names"),
        ("rotate: r1,r1", "distinct"),
        ("dtype: float64", "'dtype'"),
        (
            "int8_weights: either",
            "'int8_weights': Input should be 'auto', 'signed' or 'unsigned'",
        ),
        ("kv_buffer: ring", "'kv_buffer': Input should be 'grown' or 'shared'"),
        ("- a\n- b", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("seed: 1\nseed: 2", "not valid YAML.*seed"),
        ("rotation:\n  r1: &shared {epochs: 5}\n  r2: *shared", r"'\*shared' repeats a value"),
        ("[" * 50_000, "not valid YAML"),
        ("seed: " + "9" * 10_000, "recipe"),
        ("seed: 2001-99-99", "not valid YAML.*month"),
        ("? [a]\n: 1", "not valid YAML"),
        ("scheme: " + "x" * 2**20, "larger than"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(write(tmp_path, text))
    assert "\n" not in caught.value.message


def test_a_missing_recipe_lists_the_presets() -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe 'int9'") as caught:
        load_recipe("int9")
    assert "int8-reference" in str(caught.value.hint)


def test_an_override_below_something_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'calibration' must be a mapping"):
        load_recipe(write(tmp_path, "calibration: 3"), {"calibration.seqlen": 4})


def test_aliases_of_aliases_end_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(RecipeError, match="repeats a value") as caught:
        load_recipe(write(tmp_path, "\n".join(lines)))
    assert len(caught.value.message) < 500


def test_a_pipe_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match="no regular file"):
        load_recipe(tmp_path / "recipe.yaml")


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    # YAML 1.1 reads 1e-3 as a string.
    assert load_recipe(write(tmp_path, "rotation: {r1: {lr: 1e-3}}")).rotation.r1.lr == 0.001


def test_a_saved_recipe_reads_back_equal_and_complete(tmp_path: Path) -> None:
    recipe = load_recipe(
        "int8-reference", {"model": "some/model", "rotate": "R4, r1", "kv_buffer": "shared"}
    )
    assert str(recipe.rotate) == "r1,r4"
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert set(yaml.safe_load(recipe.to_yaml())) == set(Recipe.model_fields) - set(NEVER_IN_FILES)


def test_no_file_decides_whether_code_of_a_model_is_run(tmp_path: Path) -> None:
    for said in ("true", "1", "yes please", "null"):
        with pytest.raises(RecipeError, match="'trust_remote_code', which no file may decide"):
            load_recipe(write(tmp_path, f"trust_remote_code: {said}"))
    path = write(tmp_path, "trust_remote_code: false")
    assert not load_recipe(path).trust_remote_code
    trusting = load_recipe(path, {"trust_remote_code": True})
    assert trusting.trust_remote_code
    assert "trust" not in trusting.to_yaml()


def test_presets_load_and_int8_is_the_default() -> None:
    assert {"int8", "int8-reference"} <= set(presets())
    assert load_recipe("int8") == Recipe()


@pytest.mark.parametrize("kind", ["r1", "r2"])
def test_the_reference_preset_holds_the_published_values(kind: str) -> None:
    published = TrainConfig.reference(rotation=kind)
    preset = getattr(load_recipe("int8-reference").rotation, kind)
    assert preset.model_dump() == {
        name: getattr(published, name) for name in type(preset).model_fields
    }


def settings(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from settings(kind, f"{prefix}{name}.")


def test_what_an_artifact_and_a_work_folder_fix_is_said_by_the_recipe() -> None:
    """The whole list, so that a new field is a decision."""
    free = {key for key in settings() if not Recipe.scope(key).fixed_by_artifact}
    running = {"model", "revision", "device", "dtype"}
    how = {"logits", "kv_buffer", "int8_weights", "max_shard_size"}
    writing = {"trust_remote_code", "backend", "target", *how}
    assert free == running | writing
    unkept = {key for key in settings() if not Recipe.scope(key).fixed_by_work_dir}
    assert unkept == writing | {"layerwise.max_memory", "ignore_unused"}
    # an artifact takes or leaves a section as a whole
    assert all(("." not in key) or key.split(".")[0] in free for key in free)


def test_a_pattern_with_points_is_no_path_into_the_recipe() -> None:
    assert Recipe.scope("overrides.*.0.mlp") == Recipe.scope("overrides")


def test_an_artifact_keeps_its_recipe_but_for_what_each_run_says(tmp_path: Path) -> None:
    artifact = load_recipe(None, {"model": "a/b", "revision": "old", "scheme": "w4a8"})
    run = load_recipe(None, {"model": "c/d", "revision": "new", "scheme": "int8", "target": "ort"})
    merged = recipe_of_artifact(artifact.model_dump(mode="json"), run, tmp_path)
    assert (merged.model, merged.revision, merged.target) == ("c/d", "new", "ort")
    assert merged.scheme == "w4a8"


def test_rotate_is_text_in_files_and_a_value_in_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(None, {"rotate": "r4,r1"})
    assert recipe.rotate == Rotate.of({"r1", "r4"})
    assert "\nrotate: r1,r4\n" in recipe.to_yaml()
    assert "\nrotate: none\n" in load_recipe(None, {"rotate": "none"}).to_yaml()
    with pytest.raises(RecipeError, match=r"'rotate': expected text .* \(got 3\)"):
        load_recipe(write(tmp_path, "rotate: 3"))


@pytest.mark.parametrize(
    ("said", "algorithm"),
    [
        ({"scheme": "int4-weight-only"}, "gptq"),
        ({"scheme": "int4-weight-only", "model": "a"}, "rtn"),  # the text is not the model's own
        (
            {"scheme": "int4-weight-only", "model": "a", "calibration": {"dataset": "a.txt"}},
            "gptq",
        ),
        ({"scheme": "int4-weight-only", "weights": {"algorithm": "rtn"}}, "rtn"),
        ({"scheme": "int8"}, "rtn"),
    ],
    ids=str,
)
def test_what_is_decided_for_the_user_does_not_depend_on_what_was_said_first(
    said: dict[str, Any], algorithm: str
) -> None:
    recipe = Recipe.model_validate(said)
    assert recipe.weights.algorithm == algorithm
    others = (Recipe(), Recipe(scheme="int4-weight-only"), Recipe(weights=Weights(block_size=32)))
    for before in others:
        assert with_values(before, said).weights.algorithm == algorithm
