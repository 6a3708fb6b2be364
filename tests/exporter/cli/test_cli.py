"""The command line as a user meets it: exit codes, what goes to which stream, and what is never
imported.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_support import ROOT, rotq, write_llama

from backends.registry import available
from exporter.cli import main
from exporter.recipe import load_recipe

HEAVY = ("torch", "transformers", "modelopt", "onnx", "onnxruntime", "onnx_ir", "datasets")
COMMANDS = (
    "export",
    "capture",
    "calibrate",
    "rotate",
    "sweep",
    "stats",
    "verify",
    "inspect",
    "report",
    "diff",
    "eval",
    "chat",
    "backends",
    "explain",
    "env",
)


def command_line(value: object) -> str:
    """Name of a parametrised test: its arguments; codes and messages go unnamed."""
    return " ".join(value) if isinstance(value, list) else ""


def imported(*arguments: str, path: str = "") -> tuple[set[str], int]:
    """Heavy modules that a command line imports, and its exit code."""
    script = (
        "import sys; from exporter.cli import main; code = main(sys.argv[1:]); "
        f"print('MODULES', *(name for name in {HEAVY!r} if name in sys.modules)); sys.exit(code)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT)])),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    return set(done.stdout.split("MODULES")[-1].split()), done.returncode


@pytest.fixture(scope="module")
def answered() -> None:
    """The runtimes that are installed have been asked: from now on their answers are at hand."""
    available()


@pytest.mark.usefixtures("answered")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["export", "--help"], 0),
        (["backends"], 0),
        (["env"], 0),
        (["explain", "rung"], 0),
        (["exprot"], 2),
        (["export", "--target", "nowhere"], 2),
        (["export", "--scheme", "int9", "-o", "x"], 2),
        (["export", "--backend", "stub", "-m", "./nowhere", "--dry-run"], 1),
        (["export", "--backend", "stub", "--dry-run"], 0),
        (["rotate", "--rotations", "r1.pt", "--rotations", "r2.pt", "--dry-run"], 0),
        (["export", "--from-artifact", "x", "--rotations", "r1.pt", "-o", "y"], 2),
        (["verify", "./nowhere"], 1),
        (["inspect", "./nowhere"], 1),
        (["inspect"], 2),
    ],
    ids=command_line,
)
def test_what_needs_no_model_imports_no_library(
    arguments: list[str], code: int, plugins: str
) -> None:
    assert imported(*arguments, path=plugins) == (set(), code)


def test_every_command_is_listed_and_has_examples() -> None:
    listed = rotq("--help").stdout
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", listed, re.M)
        text = rotq(command, "--help").stdout
        assert f"\n  rotq {command}" in text.split("Examples:")[1]


def test_an_unknown_command_is_answered_with_the_nearest() -> None:
    done = rotq("exprot")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Did you mean 'export'?" in done.stderr


def test_an_unknown_option_is_answered_with_the_known() -> None:
    done = rotq("export", "--calib_dataset", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Did you mean --calib-dataset" in done.stderr
    assert "--trust-remote-code" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "-o", "x", "--scheme", "int9"], "unknown --scheme 'int9'"),
        (["export", "-o", "x", "--backend", "tflite"], "unknown --backend 'tflite'"),
        (["export", "-o", "x", "--backend", "stub", "--target", "three"], "no --target 'three'"),
        (["export", "-o", "x", "--rotate", "r1,r9"], "--rotate: expected 'auto', 'none'"),
        (["export", "-o", "x", "--nsamples", "0"], "--nsamples: Input should be greater"),
        (["export", "-o", "x", "--device", "gpu"], "unknown --device 'gpu'"),
        (["export", "-o", "x", "--dtype", "float64"], "--dtype"),
        (["export", "-o", "x", "--kv-buffer", "ring"], "--kv-buffer"),
        (["export", "-o", "x", "--r1-lr", "0.1"], "--r1-lr has no effect"),
        (["export", "-o", "x", "--backend", "stub", "--resume"], "--resume needs --work-dir"),
        (
            ["export", "-o", "x", "--from-artifact", "a", "--rotate", "none"],
            "--rotate has no effect",
        ),
        (["export", "-o", "x", "-v", "-q"], "exclude each other"),
        (["eval", "x", "--device", "gpu"], "unknown --device 'gpu'"),
        (["chat", "x", "--top-p", "0"], "--top-p 0 is not above 0"),
        (["chat", "x", "--json"], "--json prints one answer"),
        (["verify"], "FOLDER"),
    ],
    ids=command_line,
)
def test_wrong_usage_is_code_2_and_leaves_stdout_empty(
    arguments: list[str], message: str, plugins: str, tmp_path: Path
) -> None:
    done = rotq(*arguments, path=plugins, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "-m", "./nowhere", "--dry-run"], "the model folder './nowhere' does not exist"),
        (["export", "-m", "org/model", "--dry-run"], "'org/model' is no folder here"),
        (["export", "--recipe", "nothing", "--dry-run"], "cannot read the recipe 'nothing'"),
        (["export", "--recipe", "bad.yaml", "--dry-run"], "unknown recipe key 'scheem'"),
        (["export", "--recipe", "scheme.yaml", "--dry-run"], "unknown scheme 'int9'"),
        (
            ["export", "--scheme", "float8", "--dry-run"],
            "cannot express scheme 'float8': no float8 kernels",
        ),
        (
            ["export", "--target", "two", "--kv-buffer", "shared", "--dry-run"],
            "its caches only grow",
        ),
        (["export", "-o", "exists"], "'exists' exists already"),
        (["capture", "-o", "exists"], "'exists' exists already"),
        (["calibrate", "-o", "bad.yaml"], "is a file"),
        (["verify", "exists"], "it has no report.json"),
        (["eval", "exists", "--text", "nothing.txt"], "'nothing.txt' does not exist"),
    ],
    ids=command_line,
)
def test_known_failures_are_code_1_and_two_lines(
    arguments: list[str], message: str, plugins: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text("scheem: int8")
    (tmp_path / "scheme.yaml").write_text("scheme: int9")
    (tmp_path / "exists").mkdir()
    backend = ["--backend", "stub"] if arguments[0] == "export" else []
    done = rotq(*arguments, *backend, path=plugins, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml", "exists", "scheme.yaml"]


def test_a_dry_run_prints_plan_and_recipe(plugins: str, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    done = rotq(
        "export",
        "--backend",
        "stub",
        "-m",
        folder,
        "--seed",
        "9",
        "-o",
        "out",
        "--dry-run",
        path=plugins,
    )
    assert (done.returncode, done.stderr) == (0, "")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(done.stdout.split("\nrecipe:\n")[1])
    assert load_recipe(recipe) == load_recipe(
        None, {"backend": "stub", "model": str(folder), "seed": 9}
    )
    document = rotq(
        "export",
        "--backend",
        "stub",
        "-m",
        folder,
        "-o",
        "out",
        "--dry-run",
        "--json",
        path=plugins,
    )
    assert json.loads(document.stdout)["model_type"] == "llama"
    assert not Path("out").exists()


def test_the_embedded_model_is_named_as_such(plugins: str) -> None:
    assert (
        "the embedded example model"
        in rotq("export", "--backend", "stub", "--dry-run", path=plugins).stdout
    )


def test_backends_lists_the_able_and_warns_of_the_broken(plugins: str) -> None:
    done = rotq("backends", path=plugins)
    assert done.returncode == 0
    table, _, notes = done.stdout[
        done.stdout.index("stub (stub 1.0), target one unless") :
    ].partition("\n(1)")
    notes = "(1)" + notes.split("\n\n")[0]
    assert re.search(r" one +two +own", table)
    assert re.search(r"\n int8 +yes +yes +yes", table)
    for row, answers in (
        ("w4a8", ("yes", "yes: int4 weights are unpacked first", "yes")),
        ("float8", ("no: no float8 kernels", "yes", "yes")),
        ("KV cache int8", ("yes", "yes", "yes")),
        ("KV cache float8", ("no: no float8 cache",) * 3),
        ("rotation r4", ("yes", "no: it has no place for one", "yes")),
    ):
        found = re.search(rf"\n {row} " + r" +(yes|no)(?: \((\d+)\))?" * 3 + " ", table)
        assert found, row
        numbers = [
            number and re.search(rf"^\({number}\) (.*)$", notes, re.M)
            for number in found.groups()[1::2]
        ]
        said = zip(found.groups()[::2], numbers, strict=True)
        assert tuple(f"{answer}: {note[1]}" if note else answer for answer, note in said) == answers
    # said once, however many schemes it is the reason for
    assert notes.count("no float8 kernels") == 1
    assert "broken" not in done.stdout
    assert "warning: backend 'broken' of stub 1.0 does not load: ModuleNotFoundError" in done.stderr
    found = {
        info["name"]: info for info in json.loads(rotq("backends", "--json", path=plugins).stdout)
    }
    assert found["stub"]["schemes"]["two"]["float8"] is None
    assert found["stub"]["rotations"]["two"]["r4"] == "it has no place for one"
    assert "no_such_module" in found["broken"]["error"]


def test_env_names_versions_without_secrets() -> None:
    done = rotq("env", "--json", HF_TOKEN="hf_secret")
    found = json.loads(done.stdout)
    assert found["versions"]["pydantic"]
    assert found["variables"]["HF_HUB_OFFLINE"] == "1"
    assert "hf_secret" not in done.stdout + rotq("env", HF_TOKEN="hf_secret").stdout


def test_output_that_the_terminal_cannot_encode_does_not_kill_it(plugins: str) -> None:
    done = rotq("backends", path=plugins, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0
    assert done.stdout.isascii()


_STAND_IN = """
import signal, sys, time, types

# a shell that runs the tests in the background has its children ignore interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
import exporter.cli.session as session
from exporter.output import atomic_folder

session._silence_libraries = lambda: None


def run_capture(recipe, options, *, progress):
    with atomic_folder(options.output) as folder:
        (folder / "half").write_text("x")
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60 if len(sys.argv) == 1 else float(sys.argv[1]))


module = types.ModuleType("exporter.commands.export")
module.run_capture = run_capture
sys.modules["exporter.commands.export"] = module
from exporter.cli import main

sys.exit(main(["capture", "-o", "out", "-q"]))
"""


def ended_by(number: int, folder: Path, *prefix: str, seconds: float = 60) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a run that gets a signal in mid-write."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", _STAND_IN, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # whoever runs the tests may have been told to ignore it
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    with process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "interrupted\n"),
        (signal.SIGTERM, 143, "interrupted by SIGTERM\n"),
        (signal.SIGHUP, 129, "interrupted by SIGHUP\n"),
    ],
    ids=lambda value: str(value).strip(),
)
def test_a_request_to_end_leaves_nothing(tmp_path: Path, number: int, code: int, said: str) -> None:
    assert ended_by(number, tmp_path) == (code, "", said)
    assert list(tmp_path.iterdir()) == []


def test_who_is_told_to_ignore_a_signal_does(tmp_path: Path) -> None:
    assert ended_by(signal.SIGHUP, tmp_path, "nohup", seconds=0.5)[0] == 0
    assert (tmp_path / "out" / "half").is_file()


def test_the_handlers_of_a_caller_are_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--version"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert "rotq" in capsys.readouterr().out


def in_a_shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """``rotq`` with redirections, offline."""
    command = f"{sys.executable} -m exporter.cli {line}"
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("line", ["backends >&-", "eval nothing >&-", "env -q <&- >&-"])
def test_without_stdout_nothing_is_begun(line: str, tmp_path: Path) -> None:
    done = in_a_shell(line, tmp_path)
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error == "error: stdout is closed: there is no place for the result"
    assert "/dev/null" in hint


def test_without_stderr_the_result_is_printed_all_the_same(tmp_path: Path) -> None:
    done = in_a_shell("env --json 2>&-", tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["versions"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_result_that_cannot_be_printed_is_two_lines(tmp_path: Path) -> None:
    done = in_a_shell("env > /dev/full", tmp_path)
    assert done.returncode == 1
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]


def test_a_limit_on_files_is_named(tmp_path: Path) -> None:
    import resource

    script = """
from pathlib import Path
from exporter.cli.errors import exit_code_of
from exporter.output import atomic_folder


def run():
    with atomic_folder(Path("out")) as folder:
        (folder / "weights").write_bytes(bytes(10**6))


raise SystemExit(exit_code_of(run))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5)),
        check=False,
    )
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert "larger than this process may write (ulimit -f): 'out' was not written" in error
    assert "raise the limit" in hint
    assert list(tmp_path.iterdir()) == []
