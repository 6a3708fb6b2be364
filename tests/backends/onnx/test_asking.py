"""The installed runtimes are asked what they make of a linear, once; what they answered is what
they do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest

import backends.onnx.asking as module
from backends.asking import warnings_of
from backends.facts import ORT, Runtime
from backends.onnx import probes, runner
from backends.onnx.asking import Answer, Asked, Form
from backends.onnx.backend import OnnxBackend
from backends.onnx.targets import ASKED_ORT, FUSED_BLOCKS, TARGETS
from backends.rules import first_reason
from calib.schemes import LINEAR_SCHEMES, LinearScheme
from tests.backends.onnx.single import accepted, preset, schemes, single

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "onnx_ir", "openvino")
SIZES = (2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024)
Ask = Callable[[LinearScheme], Answer]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, of which this process remembers nothing."""
    monkeypatch.setenv("ROTQ_CACHE", str(tmp_path / "cache"))
    module._known.cache_clear()
    return tmp_path / "cache" / "runtimes"


@pytest.fixture
def counted() -> tuple[Asked, list[LinearScheme]]:
    """ONNX Runtime, and what it was asked."""
    questions: list[LinearScheme] = []

    def ask(scheme: LinearScheme) -> Answer:
        questions.append(scheme)
        return Answer("MatMulNBits", fused=True, approximation=0.01, level=4)

    return Asked(ORT, "onnxruntime", ask), questions


Counted = tuple[Asked, list[LinearScheme]]


class TestTheAnswers:
    """Of ONNX Runtime, in whichever version is installed."""

    @pytest.mark.parametrize("words", accepted("ort"))
    def test_the_graph_that_is_asked_about_is_the_graph_that_is_written(self, words: str) -> None:
        """Operators, and types of what they read: what kernels are chosen by."""
        scheme = schemes()[words]
        asked = probes.linear_graph(scheme, TARGETS["ort"].form(scheme))
        written = onnx.load_from_string(single(scheme).bytes("ort"))
        assert _operators(asked) == _operators(written)

    @pytest.mark.parametrize("size", SIZES)
    def test_sizes_of_blocks_are_those_of_its_version(self, size: int) -> None:
        """1.31.1 has no kernel for blocks of 512, 1.32.0 has."""
        version = onnxruntime.__version__
        if version not in FUSED_BLOCKS:
            pytest.skip(f"nobody wrote down what ONNX Runtime {version} fuses: it is asked")
        answer = probes.ask_ort(preset(f"int4/{size}"), Form(unsigned_inputs=True))
        assert answer.fused == FUSED_BLOCKS[version](size)
        assert (answer.kernel, answer.level) == (
            ("MatMulNBits", 4) if answer.fused else ("MatMul", 0)
        )

    def test_the_warning_is_that_of_the_installed_version(self) -> None:
        scheme = preset("int4/512")
        warned = warnings_of(OnnxBackend(), "ort", {"linear": scheme})
        expected = {"1.31.1": True, "1.32.0": False}.get(onnxruntime.__version__)
        if expected is None:
            pytest.skip("what another version does is not known beforehand")
        assert bool(warned) == expected
        assert all(
            f"ONNX Runtime {onnxruntime.__version__} has no kernel" in text for text in warned
        )

    @pytest.mark.parametrize("words", accepted("ort"))
    def test_what_is_said_without_the_runtime_is_what_its_last_seen_version_does(
        self, words: str
    ) -> None:
        if onnxruntime.__version__ != ORT.seen[-1]:
            pytest.skip(f"ONNX Runtime {ORT.seen[-1]} is not installed")
        target, scheme = TARGETS["ort"], schemes()[words]
        table = first_reason(target.warnings, scheme)
        asked = target.warning(scheme)
        assert (table is None) == (asked is None)
        if table is not None and asked is not None:
            assert asked.replace(f" {ORT.seen[-1]} ", " ") == table

    def test_rounding_of_inputs_is_seen_by_the_numbers(self) -> None:
        """Weight-only linears are rounded to int8 on a CPU that has products of them; integers
        never are."""
        weights = probes.ask_ort(preset("int4-weight-only"), Form(unsigned_inputs=True))
        static = probes.ask_ort(preset("int8"), Form(unsigned_inputs=True))
        assert weights.approximation > runner._ROUNDED
        assert static.approximation == 0

    def test_a_session_without_the_approximation_has_no_note(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on a CPU whose MatMulNBits multiplies floats at any accuracy level."""
        assert runner.approximates()
        monkeypatch.setattr(
            ASKED_ORT, "_ask", lambda scheme: Answer("MatMulNBits", fused=True, level=4)
        )
        monkeypatch.setattr(module, "_known", lambda path: {})
        monkeypatch.setattr(module, "_keep", lambda *given: None)
        assert not runner.approximates()

    def test_sums_are_exact_where_there_are_wide_ones(self) -> None:
        found = probes.ask_ort_saturation()
        assert found.fused
        extensions = module.cpu_words()
        if "vnni" not in extensions and "amx_int8" not in extensions:
            pytest.skip("this CPU may add pairs of products in 16 bits")
        assert found.approximation == 0

    def test_what_the_runtime_does_not_load_is_refused_beforehand(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            ASKED_ORT, "_ask", lambda scheme: Answer("", fused=False, refused="no such type")
        )
        monkeypatch.setattr(module, "_known", lambda path: {})
        monkeypatch.setattr(module, "_keep", lambda *given: None)
        reason = TARGETS["ort"].refusal(preset("int8"))
        assert reason is not None
        assert reason.startswith(f"ONNX Runtime {onnxruntime.__version__} does not load")
        assert reason.endswith("no such type")

    def test_a_graph_that_does_not_load_is_an_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = probes.linear_graph

        def unknown(scheme: LinearScheme, form: Form) -> onnx.ModelProto:
            graph = real(scheme, form)
            graph.graph.node[0].op_type = "NoSuchOperator"
            return graph

        monkeypatch.setattr(probes, "linear_graph", unknown)
        answer = probes.ask_ort(preset("int8"), Form(unsigned_inputs=True))
        assert "NoSuchOperator" in answer.refused
        assert "\n" not in answer.refused


def _operators(
    model: onnx.ModelProto,
) -> list[tuple[str, tuple[tuple[int, int], ...], tuple[str, ...]]]:
    """What each node is, type and rank of its constants, and its attributes but for sizes."""
    constants = {
        tensor.name: (tensor.data_type, len(tensor.dims)) for tensor in model.graph.initializer
    }
    return [
        (
            node.op_type,
            tuple(constants[name] for name in node.input if name in constants),
            tuple(sorted(attribute.name for attribute in node.attribute)),
        )
        for node in model.graph.node
        if node.op_type != "Pad"
    ]


class TestTheCache:
    """Asked once for a version and a CPU."""

    def test_a_question_is_asked_once_in_all_processes(
        self, folder: Path, counted: Counted
    ) -> None:
        asked, questions = counted
        first = asked.about(preset("int8"))
        module._known.cache_clear()  # as in the next process
        assert asked.about(preset("int8")) == first
        assert len(questions) == 1
        assert asked.about(preset("w4a8")) is not None
        assert len(questions) == 2
        (entry,) = folder.iterdir()
        assert entry.name.startswith(f"onnx-runtime-{onnxruntime.__version__}-")

    def test_another_version_and_another_cpu_are_asked_again(
        self, folder: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked, questions = counted
        asked.about(preset("int8"))
        monkeypatch.setattr(Runtime, "installed", lambda self: "9.9")
        asked.about(preset("int8"))
        monkeypatch.setattr(module, "cpu_words", lambda: "another CPU")
        asked.about(preset("int8"))
        assert len(questions) == len(list(folder.iterdir())) == 3

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: data[: len(data) // 2],
            lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
            lambda data: b"",
        ],
        ids=["short", "flipped", "empty"],
    )
    def test_a_damaged_cache_is_asked_again(
        self, folder: Path, counted: Counted, damage: Callable[[bytes], bytes]
    ) -> None:
        asked, questions = counted
        first = asked.about(preset("int8"))
        (entry,) = folder.iterdir()
        whole = entry.read_bytes()
        entry.write_bytes(damage(whole))
        module._known.cache_clear()
        assert asked.about(preset("int8")) == first
        assert len(questions) == 2
        assert entry.read_bytes() == whole

    def test_answers_of_another_shape_are_asked_again(self, folder: Path, counted: Counted) -> None:
        asked, questions = counted
        asked.about(preset("int8"))
        (entry,) = folder.iterdir()
        module.write_entry(entry, json.dumps({"q": {"unknown": 1}}).encode(), "it", kept=9)
        module._known.cache_clear()
        assert asked.about(preset("int8")) is not None
        assert len(questions) == 2

    def test_what_another_process_added_meanwhile_is_kept(
        self, folder: Path, counted: Counted
    ) -> None:
        asked, questions = counted
        asked.about(preset("int8"))
        remembered = dict(module._known(next(folder.iterdir())))
        module._known.cache_clear()
        asked.about(preset("w4a8"))  # the other process
        module._known.cache_clear()
        module._known(next(folder.iterdir())).clear()
        module._known(next(folder.iterdir())).update(remembered)
        asked.about(preset("float8"))
        module._known.cache_clear()
        for name in ("int8", "w4a8", "float8"):
            asked.about(preset(name))
        assert len(questions) == 3

    def test_a_cache_that_cannot_be_written_costs_only_time(
        self, folder: Path, counted: Counted, caplog: pytest.LogCaptureFixture
    ) -> None:
        asked, questions = counted
        folder.parent.write_text("in the way")
        assert asked.about(preset("int8")) is not None
        assert asked.about(preset("int8")) is not None
        assert "cannot be kept" in caplog.text
        assert len(questions) == 1  # within one process

    def test_nobody_is_asked_where_nothing_is_installed(
        self, folder: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked, questions = counted
        nobody = replace(ORT, packages=("no-such-package",))
        assert Asked(nobody, "onnxruntime", asked._ask).about(preset("int8")) is None
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        assert asked.about(preset("int8")) is None
        assert questions == []
        assert not folder.exists()

    def test_one_that_does_not_load_is_nobody(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(scheme: LinearScheme) -> Answer:
            raise ImportError("libfoo.so.1: cannot open shared object file")

        assert Asked(ORT, "onnxruntime", broken).about(preset("int8")) is None
        assert "does not load: libfoo" in caplog.text


def test_listing_backends_asks_without_torch_and_then_imports_no_runtime(tmp_path: Path) -> None:
    code = (
        "import sys; from backends.registry import available; available();"
        f"print(*(name for name in {HEAVY!r} if name in sys.modules))"
    )
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**_environment(), "ROTQ_CACHE": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(set(done.stdout.split()))
    assert {"onnx", "onnxruntime"} <= found[0]
    assert not found[0] & {"torch", "transformers", "onnx_ir"}
    assert found[1] == set()


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


@pytest.mark.parametrize("name", LINEAR_SCHEMES)
@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_texts_name_a_version(name: str, target: str) -> None:
    """Each says of which it speaks: the one that was asked, or one of those seen, if another or
    none is installed."""
    scheme = LINEAR_SCHEMES[name]
    runtime = TARGETS[target].runtime
    if TARGETS[target].refusal(scheme) is not None:
        return
    warning = TARGETS[target].warning(scheme)
    if warning is not None:
        version = runtime.installed() or runtime.seen[-1]
        assert f"{runtime.name} {version}" in warning


@pytest.mark.runtimes
class TestOpenVino:
    """The same questions, in OpenVINO."""

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("openvino", reason="OpenVINO is not installed")

    @pytest.mark.parametrize("words", accepted("openvino"))
    def test_the_graph_that_is_asked_about_is_the_graph_that_is_written(self, words: str) -> None:
        scheme = schemes()[words]
        asked = probes.linear_graph(scheme, TARGETS["openvino"].form(scheme))
        written = onnx.load_from_string(single(scheme).bytes("openvino"))
        assert _operators(asked) == _operators(written)

    @pytest.mark.parametrize("words", accepted("openvino"))
    @pytest.mark.parametrize("hint", ["f32", "bf16"])
    def test_what_is_said_without_the_runtime_is_what_its_last_seen_version_does(
        self, words: str, hint: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In either precision: which kernels there are for weights does not depend on it."""
        from backends.onnx import openvino_options

        target, scheme = TARGETS["openvino"], schemes()[words]
        if target.runtime.installed() != target.runtime.seen[-1]:
            pytest.skip(f"OpenVINO {target.runtime.seen[-1]} is not installed")
        monkeypatch.setattr(openvino_options, "AS_A_USER", {"INFERENCE_PRECISION_HINT": hint})
        answer = probes.ask_openvino(scheme, target.form(scheme, "signed"))
        assert answer.fused == (first_reason(target.warnings, scheme) is None)
        if not answer.fused:
            assert target.told is not None
            table = first_reason(target.warnings, scheme)
            assert table is not None
            assert target.told(scheme, answer) in table
