"""What a failed parity check advises: every rule by a run that asks for it, every command accepted
by a dry run, and ``--retry`` on a real one.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from calib.errors import OutputError
from calib.network.skeleton import portable_config
from calib.schemes import SCHEMES
from exporter.cli import main
from exporter.commands.export import export
from exporter.commands.retry import export_until_passed
from exporter.recipe import RECIPE_FILE, Recipe, Weights, load_recipe, with_values
from exporter.reporting.report import GateRow, MassiveSummary, ParityRow, Report
from exporter.reporting.summary import remedy_commands
from exporter.run.options import RunOptions
from exporter.run.remedies import remedies_of
from exporter.run.remedy_rules import RULES
from exporter.run.stopwatch import Stopwatch
from tests.census.configs import tiny_config
from tests.checkpoints import write_checkpoint
from tests.exporter.cli_support import LLAMA_CONFIG, llama_shapes, sample_report, write_llama
from tests.torch_backend import install

LINEARS = [
    name.removesuffix(".weight") for name in llama_shapes() if "_proj" in name or "lm_head" in name
]
DOWN = "model.layers.1.mlp.down_proj"


def missed(rung: Any, metric: str, measured: float = 2.0, bound: float = 1.1) -> ParityRow:
    return ParityRow(
        rung=rung, name="x", metric=metric, measured=measured, bound=bound, passed=False
    )


QUALITY = missed(3, "perplexity ratio")
RANGES = missed(0, "share of ranges that do not fit", 0.5, 0.25)
END_TO_END = missed(2, "relative L2", 2e-5, 1e-5)
FLIPS = END_TO_END.model_copy(update={"name": "one-flip floor", "bound": None, "passed": None})
CLIPPED = {"sums of int8 products": "clipped to 16 bits"}
MASSIVE = [MassiveSummary(name=DOWN, ratio=900.0)]


@dataclass(frozen=True)
class Failed:
    """A run whose parity failed."""

    rows: tuple[ParityRow, ...] = (QUALITY,)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


INT4 = {"scheme": "int4-weight-only"}
PLAIN = {**INT4, "weights.algorithm": "rtn", "weights.block_size": 128}
FAILED = {
    "again": Failed((missed(0, "altered", 1, 0),)),
    "unsigned": Failed((END_TO_END.model_copy(update={"session": CLIPPED}),)),
    "auto": Failed(recipe={"rotate": "r1"}),
    "prefix": Failed(recipe={"prefix": "none"}, report={"massive": MASSIVE}),
    "rows": Failed((END_TO_END, FLIPS)),
    "more-text": Failed((RANGES,)),
    "min-max": Failed((RANGES,), {"activations.observer": "percentile:99"}),
    "gptq": Failed(recipe=PLAIN),
    "block-32": Failed(recipe=PLAIN),
    "gptq-block-32": Failed(recipe=PLAIN),
    "smooth": Failed(),
    "awq": Failed(recipe={**INT4, "weights.algorithm": "gptq", "weights.block_size": 32}),
    "wide": Failed(recipe={"widen": "none"}),
    "by-name": Failed(recipe={"overrides": {"lm_head": "float"}}, report={"massive": MASSIVE}),
    "more-rows": Failed((missed(3, "perplexity ratio", 1.11, 1.1),)),
    "kv-int8": Failed(recipe={"kv": "int4", "backend": "safetensors", "target": "tensorrt"}),
    "grown": Failed((END_TO_END,), {"kv_buffer": "shared"}),
    "bfloat16": Failed(
        (missed(2, "share of the range", 1.4, 1.0),),
        {"backend": "safetensors", "target": "transformers", "dtype": "float16"},
        {"dtype": "float16"},
    ),
    "float32": Failed(
        (missed(1, "relative L2"),),
        {"backend": "safetensors", "target": "transformers"},
        {"dtype": "bfloat16"},
    ),
    "unrotated": Failed((missed(1, "relative L2"),)),
    "wider": Failed(recipe=INT4),
}


def advised(failed: Failed, model: Path, folder: Path) -> Report:
    recipe = load_recipe(None, {"model": str(model), **failed.recipe})
    folder.mkdir()
    (folder / RECIPE_FILE).write_text(recipe.to_yaml())
    report = sample_report("failed", parity=list(failed.rows), **failed.report)
    return report.model_copy(
        update={"remedies": remedies_of(report, recipe, LLAMA_CONFIG, LINEARS)}
    )


@pytest.mark.parametrize("name", [rule.name for rule in RULES])
def test_every_rule_has_a_run_that_asks_for_it_and_a_command_that_plans(
    name: str, tmp_path: Path, clean_logging: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out put"
    report = advised(FAILED[name], write_llama(tmp_path / "a model"), folder)
    commands = dict(
        zip((each.name for each in report.remedies), remedy_commands(report, folder), strict=True)
    )
    assert name in commands
    program, *arguments = shlex.split(commands[name])
    assert program == "rotq"
    assert main([*arguments, "--dry-run"]) == 0, capsys.readouterr().err
    planned = tmp_path / "planned.yaml"
    planned.write_text(capsys.readouterr().out.split("\nrecipe:\n")[1])
    change = next(each.change for each in report.remedies if each.name == name)
    assert load_recipe(planned) == with_values(load_recipe(folder / RECIPE_FILE), change)


def test_what_passed_needs_no_remedy_and_what_no_target_takes_is_not_advised(
    tmp_path: Path,
) -> None:
    model = write_llama(tmp_path / "model")
    assert advised(Failed(rows=()), model, tmp_path / "passed").remedies == []
    # ONNX Runtime's graph has no scale for each token of an input, which vLLM has
    found = {}
    for backend, target in (("onnx", "ort"), ("safetensors", "vllm")):
        recipe = {"backend": backend, "target": target, "smoothing": "smoothquant:auto"}
        found[target] = advised(Failed(recipe=recipe), model, tmp_path / target).remedies[-1]
    assert found["ort"].change == {"scheme": "int8-weight-only"}
    assert found["vllm"].change == {"scheme": "int8-dynamic"}


def test_a_wider_scheme_has_no_blocks_or_algorithm_of_the_narrow_one(
    tmp_path: Path, clean_logging: None, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = {**INT4, "weights.algorithm": "gptq", "weights.block_size": 32}
    report = advised(Failed(recipe=saved), write_llama(tmp_path / "model"), tmp_path / "out")
    wider = report.remedies[-1]
    assert wider.name == "wider"
    recipe = with_values(load_recipe(tmp_path / "out" / RECIPE_FILE), wider.change)
    assert (recipe.scheme, recipe.weights) == ("int8-weight-only", Weights())
    line = shlex.split(remedy_commands(report, tmp_path / "out")[-1])
    assert main([*line[1:], "--dry-run"]) == 0, capsys.readouterr().err
    (tmp_path / "planned.yaml").write_text(capsys.readouterr().out.split("\nrecipe:\n")[1])
    assert load_recipe(tmp_path / "planned.yaml") == recipe


def names_of(config: Mapping[str, Any], **values: Any) -> set[str]:
    """Remedies of a run that failed in everything that these rules look at."""
    recipe = load_recipe(
        None, {"rotate": "none", "prefix": "none", "widen": "none", "dtype": "float32", **values}
    )
    report = sample_report("failed", parity=[QUALITY, RANGES], massive=MASSIVE)
    calibration = report.calibration.model_copy(update={"smoothing": "none"})
    report = report.model_copy(update={"calibration": calibration})
    return {remedy.name for remedy in remedies_of(report, recipe, config, LINEARS)}


def test_nothing_is_advised_that_a_family_or_a_mode_refuses_or_ignores() -> None:
    assert {"auto", "prefix"} <= names_of(LLAMA_CONFIG)
    generic = names_of(portable_config(tiny_config("persimmon")))
    assert generic
    assert not generic & {"auto", "prefix", "smooth"}
    blockwise = names_of(LLAMA_CONFIG, **{"layerwise.enabled": True})
    assert blockwise
    assert not blockwise & {"auto", "prefix", "wide"}


def test_those_that_are_expected_to_hold_the_bound_come_first(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    far = Failed((missed(3, "perplexity ratio", 1.6, 1.13),), PLAIN)
    first, *others = advised(far, model, tmp_path / "far").remedies
    assert first.name == "gptq-block-32"
    assert first.expected_ratio is not None
    assert first.expected_ratio <= 1.13
    assert {"gptq", "block-32"} < {remedy.name for remedy in others}
    close = Failed((missed(3, "perplexity ratio", 1.14, 1.13),), PLAIN)
    assert advised(close, model, tmp_path / "close").remedies[0].name == "gptq"


FEW = {
    "backend": "torch",
    "scheme": "int4-weight-only",
    "weights.algorithm": "rtn",
    "weights.block_size": 128,
    "rotate": "none",
    "calibration.nsamples": 8,
    "calibration.seqlen": 48,
    "evaluation.nsamples": 2,
}


def test_retry_keeps_the_first_that_passes_and_nothing_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    install(tmp_path / "site", monkeypatch)
    model = write_checkpoint(tmp_path / "model")
    recipe = load_recipe(None, {**FEW, "model": str(model)})
    # a bound that rounding to nearest misses by a hair
    first = export(recipe, RunOptions(tmp_path / "first")).report
    kl = next(row.measured for row in first.parity if row.metric == "KL")
    assert kl is not None
    strict = replace(SCHEMES["int4-weight-only"], max_perplexity_ratio=1 + (kl - 2e-3) / 3.2)
    monkeypatch.setitem(SCHEMES, "int4-weight-only", strict)

    # longer than the rows either way
    recipe = with_values(recipe, {"weights.block_size": 64})
    profiles: list[Stopwatch] = []
    own = Stopwatch.profile
    monkeypatch.setattr(Stopwatch, "profile", lambda self: (profiles.append(self), own(self))[1])
    profile = tmp_path / "profile.json"
    result = export_until_passed(recipe, RunOptions(tmp_path / "out", profile=profile))
    assert result.report.status == "passed"
    assert result.recipe != recipe
    assert Report.load(tmp_path / "out").status == "passed"
    assert load_recipe(tmp_path / "out" / RECIPE_FILE) == result.recipe.model_copy(
        update={"dtype": load_recipe(tmp_path / "out" / RECIPE_FILE).dtype}
    )
    profile.unlink()
    assert len(profiles) == 1  # of the first attempt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "model", "out", "site"]


def test_retry_resumes_nothing_without_a_work_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="--resume needs the folder to resume from"):
        export_until_passed(Recipe(), RunOptions(tmp_path / "out", resume=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [["--no-verify"], ["--from-artifact", "x"]])
def test_retry_without_a_check_is_wrong_usage(
    option: list[str], clean_logging: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "-o", "out", "--retry", *option]) == 2
    assert "--retry" in capsys.readouterr().err


def test_a_widened_linear_keeps_the_overrides_that_were(tmp_path: Path) -> None:
    failed = replace(
        FAILED["by-name"], report={"massive": MASSIVE, "gate": [GateRow(rotate="none")]}
    )
    report = advised(failed, write_llama(tmp_path / "model"), tmp_path / "out")
    change = next(remedy.change for remedy in report.remedies if remedy.name == "by-name")
    assert change == {"overrides": {"lm_head": "float", DOWN: "int8-weight-only"}}


def test_products_that_nobody_makes_are_not_clipped(tmp_path: Path) -> None:
    """Weights alone in integers are multiplied as floats, whatever the session says of integers."""
    model, row = write_llama(tmp_path / "model"), END_TO_END.model_copy(update={"session": CLIPPED})
    static = advised(Failed((row,)), model, tmp_path / "static")
    alone = advised(Failed((row,), recipe=INT4), model, tmp_path / "alone")
    assert "unsigned" in {each.name for each in static.remedies}
    assert "unsigned" not in {each.name for each in alone.remedies}
