"""What the command line makes of a run, with the pipeline replaced by a known result or a known
failure.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_support import sample_report

from calib.errors import BackendError
from calib.process.progress import Progress
from exporter.cli import main
from exporter.cli.results import targets_for
from exporter.recipe import Recipe, load_recipe
from exporter.reporting.report import ParityRow, Report
from exporter.run.options import RunOptions
from exporter.run.results import ExportResult


def result_of(output: Path, recipe: Recipe, report: Report) -> ExportResult:
    return ExportResult(output, recipe, {report.target: report})


def succeed(report: Report) -> object:
    def export(recipe: Recipe, options: RunOptions, *, progress: Progress) -> ExportResult:
        print("a library's chatter")  # noqa: T201
        progress("calibrate", 0, 1)
        progress("calibrate", 1, 1)
        return result_of(options.output, recipe, report)

    return export


def calibrated(*kinds: str) -> object:
    """A calibration that ends with rotations of ``kinds``."""

    def calibrate(
        recipe: Recipe, options: RunOptions, *, progress: Progress
    ) -> types.SimpleNamespace:
        rotations = types.SimpleNamespace(kinds=lambda: set(kinds))
        quantized = types.SimpleNamespace(rotations=rotations)
        return types.SimpleNamespace(output=options.output, recipe=recipe, quantized=quantized)

    return calibrate


def fail(error: BaseException) -> object:
    def export(recipe: Recipe, options: RunOptions, *, progress: Progress) -> ExportResult:
        raise error

    return export


ARGUMENTS = ["export", "--backend", "stub", "-o", "out dir"]


def test_a_run_puts_the_summary_on_stdout_and_the_rest_on_stderr(
    pipeline: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.export = succeed(sample_report())  # type: ignore[attr-defined]
    assert main(ARGUMENTS) == 0
    out, err = capsys.readouterr()
    assert "parity passed" in out
    assert "chatter" not in out
    for expected in (
        "the embedded example model (no -m/--model given)",
        "calibrate: ",
        "rotq verify 'out dir'",
    ):
        assert expected in err
        assert expected not in out


@pytest.mark.parametrize(("kv_buffer", "shown"), [("grown", False), ("shared", True)])
def test_a_shared_buffer_is_among_the_settings(
    pipeline: types.ModuleType, capsys: pytest.CaptureFixture[str], kv_buffer: str, shown: bool
) -> None:
    pipeline.export = succeed(sample_report())  # type: ignore[attr-defined]
    assert main([*ARGUMENTS, "--kv-buffer", kv_buffer]) == 0
    assert ("one that goes in and out, written in place" in capsys.readouterr().err) == shown


def test_json_is_one_document_and_nothing_else(
    pipeline: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.export = succeed(sample_report())  # type: ignore[attr-defined]
    assert main([*ARGUMENTS, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.pop("output") == "out dir"
    assert len(document.pop("export_sha256")) == 64
    assert Report.model_validate(document) == sample_report()


def test_several_targets_are_one_document_and_fail_together(
    pipeline: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Recipe] = []

    def export(recipe: Recipe, options: RunOptions, *, progress: Progress) -> ExportResult:
        seen.append(recipe)
        return ExportResult(
            options.output, recipe, {"one": sample_report(), "two": sample_report("failed")}
        )

    pipeline.export = export  # type: ignore[attr-defined]
    assert (
        main([*ARGUMENTS, "--target", "one", "--target", "two", "--dtype", "float32", "--json"])
        == 3
    )
    assert seen[0].targets == ("one", "two")
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["output"] == "out dir"
    assert [entry["output"] for entry in document["targets"]] == ["out dir/one", "out dir/two"]
    assert [entry["status"] for entry in document["targets"]] == ["passed", "failed"]
    assert "hint: 'out dir/two' is kept and marked failed" in err


def test_what_could_not_be_run_is_warned_of_and_is_no_failure(
    pipeline: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    row = ParityRow(
        rung=2,
        name="x",
        metric="relative L2",
        measured=None,
        bound=None,
        passed=None,
        note="not run: no GPU here",
    )
    report = sample_report("unverified", parity=[row])
    pipeline.export = succeed(report)  # type: ignore[attr-defined]
    assert main(ARGUMENTS) == 0
    out, err = capsys.readouterr()
    assert "parity not checked" in out
    assert "warning: 'out dir' was not verified: not run: no GPU here; run 'rotq verify'" in err


def test_quiet_prints_the_path_only(
    pipeline: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.export = succeed(sample_report())  # type: ignore[attr-defined]
    assert main([*ARGUMENTS, "-q"]) == 0
    out, err = capsys.readouterr()
    assert out == "out dir\n"
    assert err == ""


@pytest.mark.parametrize("flag", ["-v", None])
def test_other_libraries_are_heard_only_under_v(
    pipeline: types.ModuleType, capsys: pytest.CaptureFixture[str], flag: str | None
) -> None:
    def export(recipe: Recipe, options: RunOptions, *, progress: Progress) -> ExportResult:
        print("exported to graph")  # noqa: T201
        logging.getLogger("onnxscript").warning("opset is old")
        logging.getLogger("calib.data").warning("three documents were empty")
        if flag is None:
            warnings.warn("numpy moved something", DeprecationWarning, stacklevel=1)
        return result_of(options.output, recipe, sample_report())

    # an earlier run in this process has silenced it
    logging.getLogger("onnxscript").setLevel(logging.NOTSET)
    pipeline.export = export  # type: ignore[attr-defined]
    assert main([*ARGUMENTS, *([flag] if flag else [])]) == 0
    err = capsys.readouterr().err
    assert ("opset is old" in err) == ("exported to graph" in err) == (flag == "-v")
    assert "three documents were empty" in err
    assert "numpy moved" not in err


def test_v_shows_where_a_known_failure_happened(
    pipeline: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.export = fail(BackendError("cyclic"))  # type: ignore[attr-defined]
    assert main([*ARGUMENTS, "-v"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: cyclic\n")


def test_failed_parity_is_code_3_with_the_figures(
    pipeline: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.export = succeed(sample_report("failed"))  # type: ignore[attr-defined]
    assert main([*ARGUMENTS, "--json"]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["status"] == "failed"
    assert "error: parity failed: end to end: relative L2 0.02, bound 0.009" in err


class OutOfMemoryError(RuntimeError):
    """Named as torch's, and like it no MemoryError."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            BackendError("the graph\nis cyclic", hint="cut it"),
            1,
            "error: the graph is cyclic\nhint: cut it\n",
        ),
        (MemoryError(), 1, "error: out of memory\nhint: lower --batch-size"),
        (
            OutOfMemoryError("CUDA out of memory"),
            1,
            "error: out of memory\nhint: lower --batch-size",
        ),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            1,
            "error: the disk is full\nhint: free some space",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=["known", "memory", "device memory", "disk", "interrupt"],
)
def test_failures_of_a_run_have_their_code(
    pipeline: types.ModuleType,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    pipeline.export = fail(error)  # type: ignore[attr-defined]
    assert main([*ARGUMENTS, "-q"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)


def test_an_interrupted_run_says_how_to_go_on(
    pipeline: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.export = fail(KeyboardInterrupt())  # type: ignore[attr-defined]
    assert main([*ARGUMENTS, "-q", "--work-dir", "my work"]) == 130
    said = "add --resume to the same command, with --work-dir 'my work', to go on from there"
    assert capsys.readouterr().err == f"interrupted\nhint: what is finished is kept: {said}\n"
    assert main([*ARGUMENTS, "-q"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("bug"), OSError(errno.EIO, "bad disk"), AssertionError("x")]
)
def test_an_unforeseen_exception_keeps_its_traceback(
    pipeline: types.ModuleType, error: Exception
) -> None:
    pipeline.export = fail(error)  # type: ignore[attr-defined]
    with pytest.raises(type(error)) as caught:
        main([*ARGUMENTS, "-q"])
    assert caught.value is error


def test_options_become_recipe_values_over_the_recipe_file(
    pipeline: types.ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: list[tuple[Recipe, RunOptions]] = []

    def export(recipe: Recipe, options: RunOptions, *, progress: Progress) -> ExportResult:
        seen.append((recipe, options))
        return result_of(options.output, recipe, sample_report())

    pipeline.export = export  # type: ignore[attr-defined]
    file = tmp_path / "recipe.yaml"
    file.write_text("seed: 5\ncalibration: {nsamples: 9, seqlen: 33}\n")
    arguments = (
        "export -m some/model --revision v1 --backend stub --target own --scheme int8-weight-only"
        f" --rotate r2,r1 --recipe {file} --calib-dataset c4 --eval-dataset ptb --nsamples 7"
        " --batch-size 2 --device cpu --dtype bfloat16 --logits last --kv-buffer shared"
        " --max-shard-size 5GB --trust-remote-code --rotation-optimizer qr --r1-lr 0.5 --r1-epochs"
        " 3 --r2-lr 0.25 --r2-epochs 4 --work-dir w --resume --from-capture c --overwrite"
        " --no-verify -o out -q"
    )
    assert main(arguments.split()) == 0
    recipe, options = seen[0]
    assert recipe == load_recipe(
        None,
        {
            "model": "some/model",
            "revision": "v1",
            "backend": "stub",
            "target": "own",
            "scheme": "int8-weight-only",
            "rotate": "r1,r2",
            "calibration": {"dataset": "c4", "nsamples": 7, "seqlen": 33, "batch_size": 2},
            "evaluation": {"dataset": "ptb"},
            "seed": 5,
            "device": "cpu",
            "dtype": "bfloat16",
            "logits": "last",
            "kv_buffer": "shared",
            "max_shard_size": "5GB",
            "trust_remote_code": True,
            "rotation": {
                "r1": {"optimizer": "qr", "lr": 0.5, "epochs": 3},
                "r2": {"optimizer": "qr", "lr": 0.25, "epochs": 4},
            },
        },
    )
    assert options == RunOptions(
        output=Path("out"),
        overwrite=True,
        verify=False,
        work_dir=Path("w"),
        resume=True,
        from_capture=Path("c"),
    )


def test_an_artifact_brings_its_recipe(pipeline: types.ModuleType, tmp_path: Path) -> None:
    seen: list[Recipe] = []

    def export(recipe: Recipe, options: RunOptions, *, progress: Progress) -> ExportResult:
        seen.append(recipe)
        return result_of(options.output, recipe, sample_report())

    pipeline.export = export  # type: ignore[attr-defined]
    (tmp_path / "rotq.yaml").write_text(Recipe(model="some/model", seed=4).to_yaml())
    assert main([*ARGUMENTS, "-q", "--from-artifact", str(tmp_path)]) == 0
    assert (seen[0].model, seen[0].seed, seen[0].backend) == ("some/model", 4, "stub")


def test_the_original_of_an_artifact_may_be_named_with_its_revision(
    pipeline: types.ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Where the original is found is no matter of the artifact; what it was made by is."""
    recipes: list[Recipe] = []

    def export(recipe: Recipe, options: RunOptions, *, progress: Progress) -> ExportResult:
        recipes.append(recipe)
        return result_of(options.output, recipe, sample_report())

    pipeline.export = export  # type: ignore[attr-defined]
    (tmp_path / "rotq.yaml").write_text(Recipe(model="some/model", revision="old").to_yaml())
    again = [*ARGUMENTS, "-q", "--from-artifact", str(tmp_path)]
    assert main([*again, "-m", "mirror/model", "--revision", "new"]) == 0
    assert (recipes[0].model, recipes[0].revision) == ("mirror/model", "new")
    for option, value in (("--seed", "3"), ("--eval-dataset", "own.txt")):
        assert main([*again, option, value]) == 2
        assert f"{option} has no effect with --from-artifact" in capsys.readouterr().err


def test_capture_and_calibrate_print_their_folder(
    pipeline: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run_capture = (  # type: ignore[attr-defined]
        lambda recipe, options, *, progress: options.output
    )
    pipeline.calibrate = calibrated()  # type: ignore[attr-defined]
    assert main(["capture", "-m", "some/model", "-o", "cap"]) == 0
    out, err = capsys.readouterr()
    assert out == "cap\n"
    assert "rotq export -m some/model --from-capture cap -o OUT" in err
    assert main(["calibrate", "--backend", "stub", "-o", "cal", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": "cal"}


@pytest.mark.parametrize(
    ("options", "suggested"),
    [
        (
            ["--scheme", "int8"],
            "rotq export --from-artifact cal --backend stub --target one -o OUT",
        ),
        (
            ["--scheme", "float8"],
            "rotq export --from-artifact cal --backend stub --target two -o OUT",
        ),
        (
            ["--scheme", "float", "--target", "own"],
            "rotq export --from-artifact cal --backend stub --target own -o OUT",
        ),
    ],
)
def test_what_can_be_done_with_an_artifact_is_said_after_calibrating(
    pipeline: types.ModuleType,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    suggested: str,
) -> None:
    pipeline.calibrate = calibrated()  # type: ignore[attr-defined]
    assert main(["calibrate", "--backend", "stub", "-o", "cal", *options]) == 0
    assert suggested in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kinds", "target"), [((), "two"), (("r1",), "two"), (("r1", "r4"), "one")]
)
def test_a_target_that_cannot_express_what_was_chosen_is_not_suggested(
    pipeline: types.ModuleType,
    capsys: pytest.CaptureFixture[str],
    kinds: tuple[str, ...],
    target: str,
) -> None:
    pipeline.calibrate = calibrated(*kinds)  # type: ignore[attr-defined]
    assert main(["calibrate", "--backend", "stub", "--target", "two", "-o", "cal"]) == 0
    assert f"--backend stub --target {target} -o OUT" in capsys.readouterr().err


@pytest.mark.usefixtures("pipeline")
def test_rotations_that_a_target_cannot_express_are_refused_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # a stand-in has no export to call
    assert main([*ARGUMENTS, "--target", "two", "--rotate", "r1,r4"]) == 1
    assert "cannot express R4: it has no place for one" in capsys.readouterr().err


@pytest.mark.usefixtures("pipeline")
def test_ways_of_writing_that_a_target_has_not_are_refused_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*ARGUMENTS, "--target", "two", "--logits", "last"]) == 1
    assert "cannot be written with --logits last: it computes them all" in capsys.readouterr().err
    assert main([*ARGUMENTS, "--target", "two", "--kv-buffer", "shared"]) == 1
    assert (
        "cannot be written with --kv-buffer shared: its caches only grow" in capsys.readouterr().err
    )


def test_what_no_target_takes_is_not_suggested_to_be_exported(
    plugins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(plugins)
    recipe = load_recipe(None, {"backend": "stub", "kv": "float8", "scheme": "float8"})
    assert ("stub", "two") not in targets_for(recipe, ["r1"])
    assert targets_for(recipe.model_copy(update={"kv": None}), ["r1"])[0] == ("stub", "two")


def test_verify_repeats_the_verdict(
    pipeline: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    sample_report().save(tmp_path)
    module = types.ModuleType("exporter.commands.verify")
    module.verify = (  # type: ignore[attr-defined]
        lambda folder, **settings: sample_report("failed")
    )
    monkeypatch.setitem(sys.modules, "exporter.commands.verify", module)
    assert main(["verify", str(tmp_path), "-q"]) == 3
    assert capsys.readouterr().out == f"{tmp_path}\n"


def test_eval_prints_a_perplexity(
    pipeline: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True)
    class EvalResult:
        perplexity: float = 14.5
        nll: float = 2.674
        tokens: int = 1000
        runtime: str = "onnxruntime"
        nbytes: int | None = None
        divergence: None = None

    module = types.ModuleType("exporter.commands.evaluate")
    module.evaluate = lambda source, text, **settings: EvalResult()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "exporter.commands.evaluate", module)
    assert main(["eval", "out"]) == 0
    assert (
        capsys.readouterr().out
        == "perplexity 14.5000 (nll 2.67400 nats per token, 1,000 tokens, in onnxruntime)\n"
    )
    assert main(["eval", "out", "-q"]) == 0
    assert capsys.readouterr().out == "14.5\n"
    assert main(["eval", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == 14.5
