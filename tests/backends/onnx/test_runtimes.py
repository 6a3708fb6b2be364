"""Which runtime opens a folder, what it says of itself, and what it does without the one that the
folder is for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from backends.base import ProbedModel, RuntimeMissing, RuntimeModel, WriteOptions
from backends.onnx.backend import OnnxBackend
from backends.onnx.file_names import MODEL_FILE
from calib.artifact import cast_model
from calib.errors import BackendError
from calib.measure.reference import ReferenceLinear
from tests.backends.onnx.conftest import Exported
from tests.tiny import relative_l2, token_rows
from tests.tolerances import FLIPS, LINEAR, WEIGHT_ONLY

ORT = f"ONNX Runtime {onnxruntime.__version__} (CPU)"
STATIC, WEIGHTS = "llama", "short-block"
"""Cases with int8 activations, and with 4-bit weights alone, in blocks of which the last is short.
"""
Export = Callable[[str], Exported]


@pytest.fixture(scope="module")
def written(
    export_of: Export, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Exported]:
    """A case, written for a target; made on first use."""
    made: dict[tuple[str, str], Exported] = {}

    def get(name: str, target: str) -> Exported:
        if (name, target) not in made:
            case = export_of(name)
            folder = tmp_path_factory.mktemp(f"{name}-{target}")
            OnnxBackend().write(case.quantized, folder, WriteOptions(target))
            made[name, target] = Exported(case.quantized, case.reference, folder)
        return made[name, target]

    return get


Written = Callable[[str, str], Exported]


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where it is not installed."""
    monkeypatch.setitem(sys.modules, "openvino", None)


def prefill(runtime: RuntimeModel, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    return runtime.forward(ids, torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids))


def check_linears(found: ProbedModel, case: Exported) -> None:
    names = list(case.quantized.linears)
    probes = found.probe(token_rows((12,))[0][None], names)
    assert list(probes) == names
    for name, (entering, leaving) in probes.items():
        linear = case.reference.get_submodule(name)
        assert isinstance(linear, ReferenceLinear)
        assert relative_l2(leaving, linear.matmul(linear.quantize(entering))) <= LINEAR, name


def test_what_is_approximated_is_noted(export_of: Export) -> None:
    backend = OnnxBackend()
    static, weights = export_of(STATIC).folder, export_of(WEIGHTS).folder
    assert backend.load(static, "ort", exact=True).note == ""
    assert backend.load(static, "ort", exact=False).note == ""
    assert backend.load(weights, "ort", exact=True).note == ""
    assert "MatMulNBits" in backend.load(weights, "ort", exact=False).note
    assert backend.load(weights, "ort", exact=False).runtime == ORT


def test_the_note_is_true(export_of: Export) -> None:
    """Where there is one, the default session computes other numbers than the file says; where
    there is none, not.
    """
    ids = token_rows((12,))[0][None]
    for name, differs in ((STATIC, False), (WEIGHTS, True)):
        exact, default = (
            prefill(OnnxBackend().load(export_of(name).folder, "ort", exact=e), ids)[0]
            for e in (1, 0)
        )
        assert (relative_l2(default, exact) > 10 * WEIGHT_ONLY) == differs, name


@pytest.mark.usefixtures("without_openvino")
def test_without_openvino_its_folders_run_in_onnx_runtime(written: Written) -> None:
    case = written(STATIC, "openvino")
    runtime = OnnxBackend().load(case.folder, "openvino", exact=True)
    assert runtime.runtime == f"{ORT}; OpenVINO is not installed"
    ids = token_rows((12,))[0][None]
    assert relative_l2(prefill(runtime, ids)[0], case.logits(ids)) <= FLIPS
    assert OnnxBackend().fusion(case.folder, "openvino") is None
    check_linears(OnnxBackend().load_probed(case.folder, "openvino"), case)


@pytest.mark.runtimes
class TestOpenVino:
    """The same in OpenVINO itself."""

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("openvino", reason="OpenVINO is not installed")

    @pytest.mark.parametrize("name", [STATIC, WEIGHTS])
    def test_prefill_is_the_reference(self, written: Written, name: str) -> None:
        case = written(name, "openvino")
        runtime = OnnxBackend().load(case.folder, "openvino", exact=True)
        assert runtime.runtime.startswith("OpenVINO 20")
        assert runtime.note == ""
        ids = torch.stack(token_rows((12, 12)))
        logits, present = prefill(runtime, ids)
        assert logits.dtype == torch.float32
        assert relative_l2(logits, case.logits(ids)) <= (FLIPS if name == STATIC else WEIGHT_ONLY)
        assert {tuple(tensor.shape[::2]) for tensor in present} == {(2, 12)}

    @pytest.mark.parametrize("name", [STATIC, WEIGHTS])
    def test_each_linear_on_the_same_input_is_the_reference(
        self, written: Written, name: str
    ) -> None:
        case = written(name, "openvino")
        check_linears(OnnxBackend().load_probed(case.folder, "openvino"), case)

    def test_step_by_step_with_the_cache_is_the_prefill(self, written: Written) -> None:
        runtime = OnnxBackend().load(written(WEIGHTS, "openvino").folder, "openvino", exact=True)
        ids = torch.stack(token_rows((9, 9)))
        whole, cache = prefill(runtime, ids)
        logits, past = prefill(runtime, ids[:, :4])
        steps = [logits]
        for step in range(4, 9):
            mask = torch.ones(2, step + 1, dtype=torch.long)
            logits, past = runtime.forward(
                ids[:, step : step + 1], mask, torch.full((2, 1), step), past
            )
            steps.append(logits)
        assert relative_l2(torch.cat(steps, dim=1), whole) <= WEIGHT_ONLY
        assert all(relative_l2(a, b) <= WEIGHT_ONLY for a, b in zip(past, cache, strict=True))

    def test_results_do_not_change_under_the_next_run(self, written: Written) -> None:
        """The runtime reuses its own memory for outputs."""
        runtime = OnnxBackend().load(written(WEIGHTS, "openvino").folder, "openvino", exact=True)
        first, second = (row[None] for row in token_rows((8, 8)))
        logits, _ = prefill(runtime, first)
        kept = logits.clone()
        prefill(runtime, second)
        assert torch.equal(logits, kept)

    def test_what_is_approximated_is_noted(self, written: Written) -> None:
        static, weights = (
            OnnxBackend().load(written(name, "openvino").folder, "openvino", exact=False)
            for name in (STATIC, WEIGHTS)
        )
        assert static.note == ""
        assert "dynamic quantization" in weights.note

    @pytest.mark.parametrize("name", [STATIC, WEIGHTS])
    def test_every_linear_multiplies_by_integers(
        self, export_of: Export, name: str, tmp_path: Path
    ) -> None:
        """Signed ones, on every CPU; unsigned ones it multiplies as floats."""
        case = export_of(name)
        options = WriteOptions("openvino", int8_weights="signed")
        OnnxBackend().write(case.quantized, tmp_path, options)
        found = OnnxBackend().fusion(tmp_path, "openvino")
        assert found is not None
        assert found.quantized == len(case.quantized.linears)
        assert found.unfused == []
        precision = {STATIC: "i8", WEIGHTS: "i4"}[name]
        assert found.kernels[f"FullyConnected {precision}"] == found.quantized

    def test_a_damaged_graph_is_named(self, written: Written, tmp_path: Path) -> None:
        """One that ONNX can read and OpenVINO cannot."""
        model = onnx.load(written(STATIC, "openvino").folder / MODEL_FILE)
        product = next(node for node in model.graph.node if node.name.endswith("down_proj/MatMul"))
        product.op_type = "NoSuchOperator"
        onnx.save(model, tmp_path / MODEL_FILE)
        with pytest.raises(BackendError, match=r"OpenVINO .*NoSuchOperator") as caught:
            OnnxBackend().load(tmp_path, "openvino", exact=True)
        assert "\n" not in caught.value.message


def test_tensorrts_graphs_run_in_onnx_runtime(half: Exported) -> None:
    runtime = OnnxBackend().load(half.folder, "tensorrt", exact=True)
    assert runtime.runtime == f"{ORT}; TensorRT runs on GPUs only"
    assert OnnxBackend().fusion(half.folder, "tensorrt") is None
    ids = token_rows((12,))[0][None]
    logits, present = prefill(runtime, ids)
    assert {tensor.dtype for tensor in present} == {torch.float16}
    assert relative_l2(logits, half.logits(ids)) <= FLIPS


@pytest.fixture(scope="module")
def half(export_of: Export, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The static Llama in float16, for TensorRT."""
    case = export_of(STATIC)
    folder = tmp_path_factory.mktemp("half")
    OnnxBackend().write(cast_model(case.quantized, torch.float16), folder, WriteOptions("tensorrt"))
    return Exported(case.quantized, case.reference, folder)


FOREIGN = (
    '<ir_version: 10, opset_import: ["": 21, "trt": 1]> g (float[n] x) => (float[n] y) { y ='
    " trt.TRT_Any(x) }"
)
FLOAT4 = """<ir_version: 11, opset_import: ["": 23]> g (float[n] x) => (float[2] y)
    <float4e2m1[2] w = {1, 2}, float s = {0.5}> { y = DequantizeLinear(w, s) }"""


@pytest.mark.parametrize(("graph", "what"), [(FOREIGN, "trt::TRT_Any"), (FLOAT4, "4-bit floats")])
def test_what_only_tensorrt_runs_is_said_to_be_missing(
    tmp_path: Path, graph: str, what: str
) -> None:
    onnx.save(onnx.parser.parse_model(graph), tmp_path / MODEL_FILE)
    with pytest.raises(RuntimeMissing, match=what) as caught:
        OnnxBackend().load(tmp_path, "tensorrt", exact=True)
    assert caught.value.hint


def test_operators_of_a_custom_library_are_refused(tmp_path: Path) -> None:
    """Nothing registers such a library, even if one lies in the folder."""
    graph = (
        '<ir_version: 10, opset_import: ["": 21, "mine": 1]> g (float[n] x) => (float[n] y) { y ='
        " mine.Own(x) }"
    )
    onnx.save(onnx.parser.parse_model(graph), tmp_path / MODEL_FILE)
    (tmp_path / "libmine.so").write_bytes(b"\x7fELF")
    with pytest.raises(BackendError, match=r"mine:Own"):
        OnnxBackend().load(tmp_path, "ort", exact=True)
