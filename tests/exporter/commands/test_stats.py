"""``rotq stats``: real runs on a tiny model and on the embedded one, and what their files hold."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from exporter.cli import main
from exporter.commands.stats import TENSORS_FILE, StatsResult, stats
from exporter.console.show_stats import damage_table, show_stats
from exporter.output import LIST_FILE
from exporter.recipe import RECIPE_FILE, Recipe, load_recipe
from exporter.reporting.stats import STATS_FILE, TABLE_FILE, StatsReport
from exporter.run.options import RunOptions
from tests.checkpoints import TINY, write_checkpoint

SMALL = {
    "calibration.nsamples": 4,
    "calibration.seqlen": 64,
    "gate.nsamples": 1,
    "evaluation.nsamples": 1,
    "rotation.r1_tokens": 256,
    "rotation.r2_tokens": 64,
    "rotation.r1.epochs": 2,
    "rotation.r2.epochs": 2,
    "device": "cpu",
}
LINEARS = 7 * TINY["num_hidden_layers"]
STATISTICS = ("min", "max", "mean", "std", "skewness", "kurtosis")


def recipe(model: Path, **changes: Any) -> Recipe:
    return load_recipe(
        None,
        {**SMALL, "model": str(model), **{k.replace("__", "."): v for k, v in changes.items()}},
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def rotated(source: Path, tmp_path_factory: pytest.TempPathFactory) -> StatsResult:
    """Rotated by R4 alone, which needs no training, and clustered jointly."""
    output = tmp_path_factory.mktemp("stats") / "out"
    changes = {"rotate": "r4", "activations__granularity": "cluster:3"}
    return stats(recipe(source, **changes), RunOptions(output), jointly=True)


def test_rows_are_sorted_by_damage_after_rotation(rotated: StatsResult) -> None:
    rows = rotated.report.linears
    assert len(rows) == len({row.linear for row in rows}) == LINEARS
    after = [row.after.damage for row in rows if row.after is not None]
    assert len(after) == LINEARS
    assert after == sorted(after, reverse=True)


def test_r4_changes_what_it_rotates_and_nothing_else(rotated: StatsResult) -> None:
    """Of a down projection the input and the weight, not the output; of the other linears
    nothing.
    """
    for row in rotated.report.linears:
        before, after = row.before, row.after
        assert after is not None
        if row.reads == "ffn":
            assert after.input.kurtosis != before.input.kurtosis
            assert after.weight.absmax != before.weight.absmax
            # x R4 (W R4)ᵀ in float32, rotated factor by factor: a few eps (1.2e-7) for each of 48
            # terms.
            assert after.output.std == pytest.approx(before.output.std, rel=1e-5)
        elif row.linear.startswith("model.layers.0"):  # later layers see the rounding of the first
            assert after == before  # to the last bit


def test_the_tensors_are_those_of_every_channel(rotated: StatsResult) -> None:
    tensors = load_file(rotated.output / TENSORS_FILE)
    for row in rotated.report.linears:
        for phase, figures in (("before", row.before), ("after", row.after)):
            assert figures is not None
            found = {
                key: value
                for key, value in tensors.items()
                if key.startswith(f"{phase}/{row.linear}/")
            }
            assert len(found) == 4 * len(STATISTICS) + 1
            prefix = f"{phase}/{row.linear}"
            for part, width in (
                ("input", row.in_features),
                ("output", row.out_features),
                ("weight_in", row.in_features),
                ("weight_out", row.out_features),
            ):
                shapes = {tuple(found[f"{prefix}/{part}/{name}"].shape) for name in STATISTICS}
                assert shapes == {(width,)}
            for part, name in (("input", "input"), ("output", "output"), ("weight_out", "weight")):
                reach = max(
                    float(found[f"{prefix}/{part}/{end}"].abs().max()) for end in ("min", "max")
                )
                assert reach == getattr(figures, name).absmax
            labels = found[f"{prefix}/clusters"]
            assert (labels.dtype, labels.shape) == (torch.int64, (row.in_features,))
    assert len(tensors) == 2 * LINEARS * (4 * len(STATISTICS) + 1)


def test_clusters_are_shared_by_the_readers_of_the_residual(rotated: StatsResult) -> None:
    tensors = load_file(rotated.output / TENSORS_FILE)
    reads = {row.linear: row.reads for row in rotated.report.linears}
    residual = [
        tensors[f"before/{name}/clusters"] for name, space in reads.items() if space == "residual"
    ]
    assert len(residual) == 5 * TINY["num_hidden_layers"]
    assert all(torch.equal(labels, residual[0]) for labels in residual)
    assert sorted(set(residual[0].tolist())) == [0, 1, 2]
    summary = rotated.report.clusters
    assert summary is not None
    assert (summary.clusters, summary.jointly) == (3, True)
    assert "no fused kernel" in summary.warning


def test_the_files_say_the_same(rotated: StatsResult) -> None:
    folder = rotated.output
    assert {path.name for path in folder.iterdir()} == {
        STATS_FILE,
        TABLE_FILE,
        TENSORS_FILE,
        RECIPE_FILE,
        LIST_FILE,
    }
    assert StatsReport.model_validate_json((folder / STATS_FILE).read_text()) == rotated.report
    assert load_recipe(folder / RECIPE_FILE) == rotated.recipe
    with (folder / TABLE_FILE).open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["linear"] for line in table] == [row.linear for row in rotated.report.linears]
    for line, row in zip(table, rotated.report.linears, strict=True):
        assert row.after is not None
        assert float(line["before_damage"]) == row.before.damage
        assert float(line["after_input_kurtosis"]) == row.after.input.kurtosis


def test_without_rotation_there_is_no_after(source: Path, tmp_path: Path) -> None:
    changes = {
        "rotate": "none",
        "overrides": {"*.down_proj": "float", "*.o_proj": "int8-weight-only"},
    }
    report = stats(recipe(source, **changes), RunOptions(tmp_path / "out")).report
    assert (report.rotate, report.rotations, report.clusters) == ("none", [], None)
    assert all(row.after is None for row in report.linears)
    damages = {row.linear.rpartition(".")[2]: row.before for row in report.linears}
    assert damages["down_proj"].damage == 0  # left in float by the override
    assert damages["o_proj"].input_error == 0 < damages["o_proj"].weight_error
    assert damages["o_proj"].damage > 0
    assert damages["q_proj"].input_error > 0
    assert {key.partition("/")[0] for key in load_file(tmp_path / "out" / TENSORS_FILE)} == {
        "before"
    }
    assert not any("after" in name for name in damage_table(report, report.linears).header)


def test_the_console_shows_the_most_damaged(
    rotated: StatsResult, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(width=200)
    show_stats(console, rotated.report, rotated.output, 2)
    text = capsys.readouterr().out
    assert [row.linear in text for row in rotated.report.linears] == [True] * 2 + [False] * (
        LINEARS - 2
    )
    assert f"{LINEARS - 2} more in " in text
    assert "activations by 3 clusters" in text


def test_the_embedded_model_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clean_logging: None
) -> None:
    arguments = [
        "stats",
        "--nsamples",
        "4",
        "--seqlen",
        "64",
        "--clusters",
        "4",
        "--r1-epochs",
        "1",
        "--json",
    ]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document.pop("output") == str(tmp_path / "out")
    report = StatsReport.model_validate(document)
    assert StatsReport.model_validate_json((tmp_path / "out" / STATS_FILE).read_text()) == report
    assert report.rotate == "r1,r2,r4"
    assert "no fused kernel" in err
    assert "rotate       r1,r2,r4, as far as the model takes them" in err
    for row in report.linears:
        assert row.after is not None
        if row.reads == "ffn":  # the inputs that no folded rotation reaches, and that R4 is for
            assert row.after.input.kurtosis < row.before.input.kurtosis / 10
            assert row.after.input_error < row.before.input_error


def test_an_existing_folder_is_replaced_only_if_asked(
    source: Path, tmp_path: Path, clean_logging: None
) -> None:
    arguments = [
        "stats",
        "-m",
        str(source),
        "--rotate",
        "none",
        "--nsamples",
        "2",
        "--seqlen",
        "16",
        "-q",
    ]
    arguments += ["--device", "cpu", "-o", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert main(arguments) == 1
    assert main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-m", "./nowhere", "-o", "out"], 1, "nowhere"),
        (
            ["--cluster-jointly", "-o", "out"],
            2,
            "--cluster-jointly has no effect without --clusters",
        ),
        (["--clusters", "0", "-o", "out"], 2, "--clusters"),
        (
            ["--clusters", "4", "--scheme", "int4-weight-only", "-o", "out"],
            1,
            "leaves activations in float",
        ),
        (["--scheme", "int9", "-o", "out"], 2, "unknown --scheme 'int9'"),
        (["--rotate", "r5", "-o", "out"], 2, "--rotate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_and_unknown_models_are_refused(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    clean_logging: None,
) -> None:
    assert main(["stats", *arguments]) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_more_clusters_than_channels_write_nothing(
    source: Path, tmp_path: Path, clean_logging: None
) -> None:
    arguments = [
        "stats",
        "-m",
        str(source),
        "--rotate",
        "none",
        "--nsamples",
        "2",
        "--seqlen",
        "16",
        "-q",
    ]
    assert (
        main([*arguments, "--device", "cpu", "--clusters", "40", "-o", str(tmp_path / "out")]) == 1
    )
    assert list(tmp_path.iterdir()) == []
