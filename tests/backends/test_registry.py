"""Finding backends through entry points, whatever state a plugin is in."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backends.asking import refusal_of
from backends.base import CONTRACT_VERSION, Request
from backends.onnx.backend import OnnxBackend
from backends.registry import available, get_backend, target_of
from calib.errors import BackendError
from calib.process.time_limit import time_limit
from calib.schemes import INT4, LINEAR_SCHEMES, SCHEMES
from tests.plugins import install_plugins


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugins(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_the_built_in_backend_is_found_through_its_entry_point() -> None:
    backend = get_backend("onnx")
    assert isinstance(backend, OnnxBackend)
    info = {entry.name: entry for entry in available()}["onnx"]
    assert info.error is None
    assert info.distribution.startswith("rotq ")
    assert info.targets == backend.targets
    for schemes in info.schemes.values():
        assert list(schemes) == list(SCHEMES)
        assert schemes["float"] is None  # what is not quantized is expressed everywhere


@pytest.mark.usefixtures("plugins")
def test_a_broken_plugin_is_listed_with_its_error_and_stops_nothing() -> None:
    entries = {entry.name: entry for entry in available()}
    assert list(entries) == sorted(entries)
    assert entries["broken"].error is not None
    assert "ModuleNotFoundError" in entries["broken"].error
    assert "no_such_module" in entries["broken"].error
    assert entries["broken"].targets == ()
    assert entries["broken"].distribution == "stub 1.0"
    assert entries["stub"].error is None
    assert entries["stub"].schemes["one"]["float8"] == "no float8 kernels"
    assert entries["stub"].schemes["two"]["float8"] is None
    assert entries["stub"].warnings["one"] == {}
    assert entries["stub"].warnings["two"].keys() == {
        name for name, scheme in LINEAR_SCHEMES.items() if scheme.weight.format == INT4
    }
    assert entries["stub"].caches["own"] == {
        "int8": None,
        "int4": None,
        "float8": "no float8 cache",
    }
    assert entries["stub"].rotations["two"] == {
        "r1": None,
        "r2": None,
        "r3": None,
        "r4": "it has no place for one",
    }
    assert entries["onnx"].error is None


def test_a_plugin_that_exits_when_it_is_imported_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "leaver-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: leaver\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rotq.backends]\nleaver = leaver_plugin:Backend\n")
    (tmp_path / "leaver_plugin.py").write_text("import sys\nprint('bye')\nsys.exit(7)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entries = {entry.name: entry for entry in available()}
    assert entries["leaver"].error == "SystemExit: 7"
    assert entries["onnx"].error is None
    assert "bye" not in capsys.readouterr().out
    with pytest.raises(BackendError, match=r"'leaver' of leaver 1\.0 failed to load: 7"):
        get_backend("leaver")


@pytest.mark.usefixtures("plugins")
def test_getting_a_broken_plugin_names_it_and_its_distribution() -> None:
    with pytest.raises(
        BackendError, match=r"'broken' of stub 1\.0 failed to load: No module named"
    ) as caught:
        get_backend("broken")
    assert caught.value.hint == "reinstall or remove that package"


@pytest.mark.usefixtures("plugins")
def test_an_unknown_backend_lists_those_installed() -> None:
    with pytest.raises(BackendError, match="unknown backend 'onx'") as caught:
        get_backend("onx")
    assert caught.value.hint.startswith("did you mean 'onnx'? installed backends: broken, onnx, ")


@pytest.mark.usefixtures("plugins")
def test_the_first_target_is_the_default_and_an_unknown_one_is_refused() -> None:
    stub = get_backend("stub")
    assert target_of(stub, None) == "one"
    assert target_of(stub, "two") == "two"
    with pytest.raises(BackendError, match="'stub' has no target 'vllm'") as caught:
        target_of(stub, "vllm")
    assert caught.value.hint == "its targets are: one, two, own"


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two backends that speak other versions of the contract."""
    install_plugins(tmp_path, ("Old", "Newer"))
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize(
    ("name", "version", "hint"), [("old", 1, "update that package"), ("newer", 1000, "update rotq")]
)
def test_another_version_of_the_contract_is_refused_in_one_line(
    name: str, version: int, hint: str
) -> None:
    line = (
        f"was written for version {version} of the backend contract, and this rotq takes versions"
        f" 2 to {CONTRACT_VERSION}"
    )
    with pytest.raises(BackendError) as caught:
        get_backend(name)
    assert caught.value.message == f"backend '{name}' of stub 1.0 {line}"
    assert caught.value.hint == hint

    info = {entry.name: entry for entry in available()}[name]
    assert info.error == f"it {line}"
    assert info.targets == ()


def test_listing_backends_imports_neither_torch_nor_a_runtime() -> None:
    available()  # asks the runtimes that are installed; from then on their answers are at hand
    code = "\n".join(
        [
            "import sys",
            "from backends.asking import check",
            "from backends.base import Request",
            "from backends.registry import available, get_backend",
            "from calib.schemes import LINEAR_SCHEMES",
            "available()",
            "check(get_backend('onnx'), Request('ort', linears={'it': LINEAR_SCHEMES['int8']}))",
            "heavy = {'torch', 'transformers', 'modelopt', 'onnx', 'onnxruntime', 'onnx_ir',"
            " 'onnxscript'}",
            "sys.exit(', '.join(heavy & set(sys.modules)) or 0)",
        ]
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


HEAD = "class Backend:\n    name = 'odd'\n    targets = ('one',)\n    contract = 2\n"


def _plugin(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Install a distribution whose backend is the class ``Backend`` of ``module``."""
    info = folder / "odd-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rotq.backends]\nodd = odd_plugin:Backend\n")
    (folder / "odd_plugin.py").write_text(module)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "odd_plugin", raising=False)


@pytest.mark.parametrize(
    "module",
    [
        "import time\ntry:\n    time.sleep(60)\nexcept Exception:\n    pass\n",
        "while True:\n    pass\n",
    ],
)
def test_a_plugin_that_takes_too_long_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    _plugin(tmp_path, monkeypatch, module)
    monkeypatch.setenv("ROTQ_PLUGIN_SECONDS", "0.2")
    entries = {entry.name: entry for entry in available()}
    assert entries["odd"].error == "TooLongError: it takes longer than 0.2 seconds"
    assert entries["onnx"].error is None
    with pytest.raises(BackendError, match=r"longer than 0\.2 seconds") as caught:
        get_backend("odd")
    assert caught.value.hint is not None
    assert "ROTQ_PLUGIN_SECONDS" in caught.value.hint


@pytest.mark.parametrize("when", ["refusals", "__init__"])
def test_a_plugin_that_sleeps_when_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    asked = f"    def {when}(self, *request):\n        import time\n        time.sleep(60)\n"
    _plugin(tmp_path, monkeypatch, f"{HEAD}{asked}")
    monkeypatch.setenv("ROTQ_PLUGIN_SECONDS", "0.2")
    entries = {entry.name: entry for entry in available()}
    assert "longer than 0.2 seconds" in str(entries["odd"].error)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("contract = '2'", "failed to load: TypeError"),
        ("contract = None", "failed to load: TypeError"),
        ("targets = None", "'targets' is no tuple"),
        ("targets = ()", "'targets' is no tuple"),
        ("def __init__(self): raise GeneratorExit", "failed to load: GeneratorExit"),
        ("def __init__(self): raise ValueError('a\\nb')", "failed to load: a b"),
    ],
)
def test_a_plugin_that_is_no_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    _plugin(tmp_path, monkeypatch, f"{HEAD}    {line}\n")
    assert {entry.name: entry for entry in available()}["odd"].error
    with pytest.raises(BackendError, match=said):
        get_backend("odd")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("return ['text']", "gives a str where a Reason belongs"),
        ("return None", "fails when it is asked"),
        ("raise RuntimeError('a\\nb')", "fails when it is asked what it can express: a b"),
    ],
)
def test_a_plugin_that_gives_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, said: str
) -> None:
    _plugin(tmp_path, monkeypatch, f"{HEAD}    def refusals(self, request):\n        {answer}\n")
    with pytest.raises(BackendError, match=said) as caught:
        refusal_of(get_backend("odd"), Request("one"))
    assert "\n" not in caught.value.message


def test_a_timer_of_somebody_else_goes_on() -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with time_limit(10):
            pass
        time.sleep(0.6)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert rung == [signal.SIGALRM]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("entry_points.txt", b"[rotq.backends]\nodd = \xff\n"),
        ("entry_points.txt", b"[rotq.backends]\nodd\n"),
        ("METADATA", b"Name: \xff\n"),
    ],
)
def test_a_distribution_whose_files_are_damaged_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: bytes
) -> None:
    _plugin(tmp_path, monkeypatch, f"{HEAD}    refusals = list\n")
    (tmp_path / "odd-1.0.dist-info" / file).write_bytes(content)
    assert "onnx" in {entry.name for entry in available()}
    assert isinstance(get_backend("onnx"), OnnxBackend)
