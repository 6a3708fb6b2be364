"""Large embeddings and heads are quantized by default, small ones and named ones are left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from calib.quantizing.plan import KEPT_BY_OVERRIDE
from calib.schemes import LINEAR_SCHEMES, linear_words
from exporter.commands.export import calibrate, export
from exporter.commands.verify import verify
from exporter.recipe import RECIPE_FILE, load_recipe
from exporter.reporting.report import ParityRow
from exporter.run import tables
from exporter.run.destination import Destination
from exporter.run.options import RunOptions
from exporter.run.tables import LEAST_ELEMENTS, TABLE_SCHEME, Tables, with_tables

CONFIG = transformers.LlamaConfig().to_dict()
LARGE = Tables("model.embed_tokens", "lm_head", LEAST_ELEMENTS, 2 * LEAST_ELEMENTS)
WORDS = linear_words(LINEAR_SCHEMES[TABLE_SCHEME])
BOTH = {"model.embed_tokens": TABLE_SCHEME, "lm_head": TABLE_SCHEME}
FEW = {
    "calibration.nsamples": 8,
    "calibration.seqlen": 64,
    "evaluation.nsamples": 2,
    "rotate": "none",
}


def agrees(rows: list[ParityRow]) -> bool:
    """The runtime computes what was quantized; what that loses is another question (rung 3)."""
    judged = [row.passed for row in rows if row.rung < 3 and row.bound is not None]
    return bool(judged) and all(judged)


def overrides(which: Tables = LARGE, **settings: Any) -> dict[str, str]:
    recipe = load_recipe(None, {key.replace("__", "."): value for key, value in settings.items()})
    return with_tables(recipe, which, Destination.of(recipe), CONFIG).overrides


def test_large_is_a_share_and_a_size() -> None:
    assert LARGE.large
    assert not replace(LARGE, elements=LEAST_ELEMENTS - 1).large
    assert not replace(LARGE, parameters=7 * LEAST_ELEMENTS).large  # 14 %


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, BOTH),
        ({"scheme": "int4-weight-only"}, BOTH),
        ({"target": ["ort", "openvino", "tensorrt"]}, BOTH),
        ({"scheme": "float"}, {}),
        ({"layerwise__enabled": True, "rotate": "none"}, BOTH),
        # transformers and vLLM have no quantized embedding
        ({"backend": "safetensors", "target": "modelopt"}, {}),
        ({"backend": "safetensors", "target": "tensorrt"}, BOTH),
        ({"overrides": {"lm_head": "float"}}, {**BOTH, "lm_head": "float"}),
        ({"overrides": {"*.mlp.*": "w4a8"}}, {**BOTH, "*.mlp.*": "w4a8"}),
    ],
    ids=str,
)
def test_what_is_added_to_a_recipe(settings: dict[str, Any], expected: dict[str, str]) -> None:
    assert overrides(**settings) == expected
    assert overrides(replace(LARGE, elements=1), **settings) == settings.get("overrides", {})


@pytest.fixture
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of the example model are a fifth of it, but of no size."""
    monkeypatch.setattr(tables, "LEAST_ELEMENTS", 0)


@pytest.mark.usefixtures("however_small")
def test_an_export_has_them_and_says_so_in_its_recipe(tmp_path: Path) -> None:
    result = export(load_recipe(None, FEW), RunOptions(tmp_path / "out"))
    saved = load_recipe(tmp_path / "out" / RECIPE_FILE)
    assert saved.overrides == BOTH
    report = result.report
    assert agrees(report.parity)
    assert report.layers.schemes[WORDS] == 2
    assert [kept.name for kept in report.layers.kept] == []
    # 2048 rows of 256 twice, 3 bytes less for each and a scale for each row
    plain = export(
        load_recipe(None, {**FEW, "overrides": dict.fromkeys(BOTH, "float")}),
        RunOptions(tmp_path / "plain"),
    ).report
    assert plain.layers.bytes_after - report.layers.bytes_after == 2 * 2048 * (256 * 3 - 4)
    assert agrees(verify(tmp_path / "out").parity)


@pytest.mark.usefixtures("however_small")
def test_one_that_is_named_stays_in_float(tmp_path: Path) -> None:
    recipe = load_recipe(None, {**FEW, "overrides": {"lm_head": "float"}})
    report = export(recipe, RunOptions(tmp_path / "out", verify=False)).report
    assert report.layers.schemes[WORDS] == 1
    assert [kept.name for kept in report.layers.kept] == ["lm_head"]
    assert report.layers.kept[0].reason != KEPT_BY_OVERRIDE  # that is of linears of the decoder


@pytest.mark.usefixtures("however_small")
def test_an_artifact_that_is_for_any_target_has_them_in_float(tmp_path: Path) -> None:
    recipe = load_recipe(None, FEW)
    made = calibrate(recipe, RunOptions(tmp_path / "artifact"))
    assert made.recipe == recipe
    assert not BOTH.keys() & made.quantized.linears.keys()


def test_the_example_model_is_too_small(tmp_path: Path) -> None:
    recipe = load_recipe(None, FEW)
    assert export(recipe, RunOptions(tmp_path / "out", verify=False)).recipe == recipe
