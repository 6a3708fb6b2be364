"""``import rotq``: what a notebook has goes in, and what it shows comes out."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tqdm
import tqdm.auto

import rotq
from backends.safetensors.read import open_bundle
from calib.artifact import load_artifact
from calib.errors import DataError, RecipeError
from exporter.recipe import Recipe
from exporter.source import embedded_folder, load_tokenizer
from rotq.bars import Bars
from rotq.texts import text_source
from tests.checkpoints import write_checkpoint

FEW = {
    "scheme": "int8-weight-only",
    "rotate": "none",
    "nsamples": 4,
    "seqlen": 32,
    "eval_nsamples": 2,
    "gate_nsamples": 1,
}


def test_importing_it_imports_nothing_else() -> None:
    script = (
        "import sys, rotq; assert rotq.__version__; print(set(rotq.__all__) == set(dir(rotq)))"
        "; print([name for name in ('torch', 'exporter', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n[]\n"


def test_every_name_is_there_and_no_other() -> None:
    for name in rotq.__all__:
        assert getattr(rotq, name)
    with pytest.raises(AttributeError, match="no attribute 'exports'"):
        rotq.exports  # noqa: B018


def test_recipes_are_files_presets_mappings_and_keywords(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("scheme: int4-weight-only\nweights: {block_size: 32}\n")
    nested = {"scheme": "int4-weight-only", "weights": {"block_size": 32}}
    expected = Recipe.model_validate({**nested, "seed": 3})
    dotted = {"scheme": "int4-weight-only", "weights.block_size": 32}
    for source in (file, str(file), nested, dotted):
        assert rotq.load_recipe(source, seed=3) == expected
    assert nested["weights"] == {"block_size": 32}
    assert rotq.load_recipe(scheme="int4-weight-only", block_size=32, seed=3) == expected
    assert rotq.load_recipe(expected, {"seed": 4}).seed == 4
    assert rotq.load_recipe("int4-gptq").weights.algorithm == "gptq"
    assert rotq.load_recipe(target="vllm").backend == "safetensors"
    with pytest.raises(TypeError, match="did you mean 'nsamples'"):
        rotq.load_recipe(nsample=3)
    with pytest.raises(RecipeError, match="unknown recipe key 'scheem'"):
        rotq.load_recipe({"scheem": "int8"})


def test_settings_are_read_the_same_wherever_they_are_given() -> None:
    for source in ({"target": "vllm"}, Recipe()):
        found = rotq.load_recipe(source, target="vllm", seed=None)
        assert (found.backend, found.target, found.seed) == ("safetensors", "vllm", 0)
    assert rotq.load_recipe({"target": "vllm"}).backend == "safetensors"
    assert rotq.load_recipe({"target": "vllm"}, target="ort").backend == "onnx"
    assert rotq.load_recipe(Recipe(seed=3), {"seed": None}, nsamples=None).seed == 3
    for source in (None, {}, Recipe()):
        for files in ("r1.pt", Path("r1.pt"), [Path("r1.pt")], ("r1.pt",)):
            assert rotq.load_recipe(source, rotations=files).rotation.files == ["r1.pt"]
    nested = {"rotation": {"files": Path("r1.pt")}, "model": Path("model")}
    assert rotq.load_recipe(nested).rotation.files == ["r1.pt"]
    with pytest.raises(RecipeError, match="recipe key 'target"):
        rotq.load_recipe({"target": 3})


def test_a_bar_is_closed_where_its_stage_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tqdm.auto.tqdm[object]] = []

    def bar(**options: object) -> tqdm.auto.tqdm[object]:
        made.append(tqdm.tqdm(**options, file=io.StringIO()))
        return made[-1]

    monkeypatch.setattr("tqdm.auto.tqdm", bar)
    bars = Bars()
    for stage, done, total in (("a", 1, None), ("b", 1, 3), ("b", 2, 3), ("c", 1, 1), ("c", 1, 2)):
        bars(stage, done, total)
    assert [(each.desc, each.n) for each in made] == [("a", 1), ("b", 2), ("c", 1), ("c", 1)]
    # a closed bar has no display any more
    assert [each.disable for each in made] == [True, True, True, False]
    made[-1].close()


def test_a_hint_is_shown_with_the_error() -> None:
    with pytest.raises(RecipeError) as caught:
        rotq.load_recipe("int4-gptqq")
    assert caught.value.__notes__ == [f"hint: {caught.value.hint}"]
    assert "did you mean 'int4-gptq'?" in caught.value.__notes__[0]


def test_text_in_memory_becomes_a_file_of_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROTQ_CACHE", str(tmp_path))
    tokenizer = load_tokenizer(embedded_folder())
    texts = ["once upon a time", "there was a cat"]
    plain = text_source(texts)
    assert text_source(iter(texts)) == plain == text_source([{"text": text} for text in texts])
    assert Path(plain).read_text().splitlines() == [f'{{"text": "{text}"}}' for text in texts]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert text_source(ids, tokenizer) == text_source(map(torch.tensor, ids), tokenizer) == plain
    chat = [[{"role": "user", "content": "hello"}]]
    assert '"messages"' in Path(text_source(chat)).read_text()
    assert text_source("wikitext2") == "wikitext2"
    for wrong, message in (
        ([], "no rows"),
        ([texts[0], chat[0]], "texts and conversations"),
        ([{"question": "?"}], "none of the columns"),
        (ids, "need the tokenizer"),
        ([3], "row 0 of the data set is a int"),
    ):
        with pytest.raises(DataError, match=message):
            text_source(wrong)


def test_a_model_object_with_texts_is_exported_verified_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("ROTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = write_checkpoint(tmp_path / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder)
    texts = [f"once upon a time there were {count} cats in a house" for count in range(40)]
    seen: list[str] = []
    result = rotq.export(
        model,
        dataset=texts,
        target="modelopt",
        progress=lambda stage, done, total: seen.append(stage),
        **FEW,
    )
    assert result.output == Path("out/tiny-int8-weight-only-modelopt")
    assert "write" in seen
    assert len(repr(result)) < 200
    assert result.report.status in repr(result)
    assert "<table" in result._repr_html_()
    assert open_bundle(str(result.output)).manifest.target == "modelopt"
    assert rotq.verify(str(result.output)).status == result.report.status
    inspection = rotq.inspect(result.output)
    assert inspection.scheme == "int8-weight-only"
    assert len(repr(inspection)) < 200 + len(str(folder))
    assert "<table" in inspection._repr_html_()

    calibrated = rotq.calibrate(folder, dataset=texts, output=tmp_path / "calibrated", **FEW)
    assert load_artifact(str(calibrated.output)).scheme.name == "int8-weight-only"
    written = rotq.export(
        from_artifact=calibrated.output, target="tripy", output=tmp_path / "tripy", verify=False
    )
    assert (written.recipe.model, written.report.target) == (str(folder), "tripy")
    with pytest.raises(RecipeError, match="--retry has no effect with --from-artifact"):
        rotq.export(from_artifact=calibrated.output, retry=True)
    scores = [
        rotq.evaluate(source, texts[:3]).perplexity for source in (model, folder, calibrated.output)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert scores[2] == pytest.approx(scores[1], rel=0.05)
