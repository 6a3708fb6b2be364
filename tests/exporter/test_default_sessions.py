"""What a default session does of its own accord sets its bound: it is asked, reported, and held to
a floor in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.base import DescribedModel, WriteOptions
from backends.onnx.backend import OnnxBackend
from backends.torch_model import TorchModel
from calib.artifact import QuantizedLinear, QuantizedModel
from calib.measure.reference import build_reference
from calib.process.progress import silent
from exporter.parity import Subject, check_parity
from exporter.parity.bounds import NAIVE_FACTOR
from exporter.reporting.report import ParityRow, parity_status
from tests.backends.onnx.whole import quantized
from tests.tiny import CONFIGS, token_rows

FAMILIES = ("llama", "qwen2", "gpt2")
SCHEMES: dict[str, tuple[str, str | None]] = {
    "int8": ("int8", None),
    "int8 and KV": ("int8", "int8"),
    "weight-only": ("int8-weight-only", None),
}
HINTS = ("f32", "bf16", "default")
EXACT = ("each linear", "exact session", "decode with cache", "left-padded")
"""Rows that are run with arithmetic as written."""


@pytest.fixture(scope="module")
def artifact() -> Callable[[str, str], QuantizedModel]:
    """A tiny model, quantized; made on first use."""
    made: dict[tuple[str, str], QuantizedModel] = {}

    def get(family: str, scheme: str) -> QuantizedModel:
        if (family, scheme) not in made:
            name, kv = SCHEMES.get(scheme, (scheme, None))
            made[family, scheme] = quantized(CONFIGS[family](), ("r1", "r2", "r4"), name, kv=kv)
        return made[family, scheme]

    return get


Artifact = Callable[[str, str], QuantizedModel]


def scale_off(model: QuantizedModel) -> QuantizedModel:
    """The scale of one output channel of one linear is too large by a twentieth."""
    return _changed(model, lambda linear: {"weight_scale": linear.weight_scale * _one(linear)})


def rolled(model: QuantizedModel) -> QuantizedModel:
    """The weights of one linear are rolled by a row."""
    return _changed(model, lambda linear: {"weight": linear.weight.roll(1, 0)})


SABOTAGE: dict[str, Callable[[QuantizedModel], QuantizedModel]] = {
    "scale": scale_off,
    "rolled": rolled,
}


def _one(linear: Any) -> Tensor:
    factors = torch.ones_like(linear.weight_scale)
    factors[3] = 1.05
    return factors


def _changed(model: QuantizedModel, change: Callable[[Any], dict[str, Tensor]]) -> QuantizedModel:
    name = next(name for name in model.linears if "mlp" in name)
    linear = model.linears[name]
    return replace(model, linears={**model.linears, name: replace(linear, **change(linear))})


@dataclass(frozen=True)
class Rows:
    """A parity table."""

    rows: Sequence[ParityRow]

    def one(self, name: str) -> ParityRow:
        (found,) = [row for row in self.rows if name in row.name]
        return found

    @property
    def failed(self) -> list[str]:
        return [row.name for row in self.rows if row.passed is False]


def parity(written: QuantizedModel, folder: Path, meant: QuantizedModel | None = None) -> Rows:
    """What the parity check says of ``written`` in OpenVINO, without rungs 1 and 3."""
    OnnxBackend().write(written, folder, WriteOptions("openvino"))
    rows = token_rows((24, 20, 17, 24), seed=7)
    subject = Subject(
        meant or written, OnnxBackend(), "openvino", folder, rows, source=None, fused=None
    )
    return checked(subject)


def checked(subject: Subject) -> Rows:
    """But for metadata, which is missing: nothing but a graph is written here."""
    rows = check_parity(subject, silent)
    return Rows([row for row in rows if not row.name.startswith("metadata")])


@pytest.mark.runtimes
class TestOpenVino:
    """With the hints that its CPU plugin takes, so that every CPU shows what those with bfloat16 do
    by themselves."""

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("openvino", reason="OpenVINO is not installed")

    @pytest.fixture(params=HINTS)
    def hint(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        """The precision that the default session computes in."""
        from backends.onnx import openvino_options

        asked: str = request.param
        own = {} if asked == "default" else {"INFERENCE_PRECISION_HINT": asked}
        found = openvino_options.chosen(own)["INFERENCE_PRECISION_HINT"]
        if asked not in (found, "default"):
            pytest.skip(f"this CPU computes in {found} where {asked} is asked for")
        monkeypatch.setattr(openvino_options, "AS_A_USER", own)
        return found

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_a_healthy_export_passes(
        self, artifact: Artifact, family: str, scheme: str, hint: str, tmp_path: Path
    ) -> None:
        found = parity(artifact(family, scheme), tmp_path)
        assert found.failed == []
        assert parity_status(list(found.rows)) == "passed"
        default = found.one("default session")
        assert default.session["INFERENCE_PRECISION_HINT"] == hint
        assert found.one("exact session").session["INFERENCE_PRECISION_HINT"] == "f32"
        if scheme == "weight-only":
            groups = default.session["DYNAMIC_QUANTIZATION_GROUP_SIZE"]
            assert default.note.startswith("quantizes what enters weight-only linears")
            assert f"groups of {groups} " in default.note
            assert default.bound is None
        elif hint == "bf16":
            floor = found.one("naive floor in bfloat16").measured
            assert floor is not None
            assert default.measured is not None
            assert default.bound == pytest.approx(NAIVE_FACTOR * floor)
            exact = found.one("exact session").bound
            assert exact is not None
            assert default.measured > exact  # by the bound of float32 it would have failed
        else:
            assert default.bound == found.one("exact session").bound

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("what", SABOTAGE)
    @pytest.mark.usefixtures("hint")
    def test_a_sabotaged_one_fails_in_the_exact_session(
        self, artifact: Artifact, family: str, scheme: str, what: str, tmp_path: Path
    ) -> None:
        meant = artifact(family, scheme)
        found = parity(SABOTAGE[what](meant), tmp_path, meant)
        assert found.one("each linear").passed is False
        if what == "rolled":
            assert found.one("prefill, exact session").passed is False
        exact = {row.name for row in found.rows if any(name in row.name for name in EXACT)}
        assert exact.intersection(found.failed)

    def test_linears_are_known_by_the_operator_that_they_end_in(
        self, artifact: Artifact, tmp_path: Path
    ) -> None:
        """The constant of a short last block is computed anew while compiling, and loses its
        name."""
        found = parity(artifact("gpt2", "int4-weight-only"), tmp_path)
        assert found.one("dequantize at run time").measured == 0


class Short(TorchModel):
    """The reference in bfloat16, which says so."""

    precision = "bfloat16"
    session = {"precision": "bf16"}  # noqa: RUF012 - a constant of a test

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__(model)
        self._network = build_reference(model, dtype=torch.bfloat16)


class Silent(TorchModel):
    """The same, which does not say so: what a runtime that is not asked looks like."""

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__(model)
        self._network = build_reference(model, dtype=torch.bfloat16)


class ShortBackend(OnnxBackend):
    """An export whose default session is the reference in bfloat16, and whose exact one is the
    reference."""

    default: type[TorchModel] = Short

    def __init__(self, model: QuantizedModel) -> None:
        self._model = model

    def load(self, folder: Path, target: str, *, exact: bool) -> Any:
        return TorchModel(self._model) if exact else self.default(self._model)

    def load_probed(self, folder: Path, target: str) -> Any:
        return TorchModel(self._model)

    def load_unrounded(self, folder: Path, target: str) -> None:
        return None

    def contradictions(
        self, folder: Path, target: str, model: QuantizedModel
    ) -> Mapping[str, Sequence[str]]:
        return {}

    def fusion(self, folder: Path, target: str) -> None:
        return None

    def read_linears(self, folder: Path, target: str) -> Mapping[str, QuantizedLinear]:
        return self._model.linears

    def read_cache(self, folder: Path, target: str) -> None:
        return None

    def read_floats(self, folder: Path, target: str) -> Mapping[str, Tensor]:
        return self._model.floats


@pytest.mark.parametrize("scheme", ["int8", "int8-weight-only", "float"])
def test_any_runtime_that_says_what_it_computes_in_is_held_to_a_floor_in_that(
    artifact: Artifact, scheme: str, tmp_path: Path
) -> None:
    model = artifact("llama", scheme)
    subject = Subject(
        model, ShortBackend(model), "ort", tmp_path, token_rows((24, 20), seed=7), None, None
    )
    found = checked(subject)
    default, floor = found.one("default session"), found.one("naive floor in bfloat16")
    assert found.failed == []
    assert floor.measured == pytest.approx(default.measured)  # this runtime *is* the naive path
    assert default.session == {"precision": "bf16"}
    assert isinstance(Short(model), DescribedModel)
    assert not isinstance(TorchModel(model), DescribedModel)


def test_one_that_does_not_say_so_is_held_to_the_bound_of_the_file(
    artifact: Artifact, tmp_path: Path
) -> None:
    """Which it misses: the wider bound is for what was asked, and nobody else gets it."""
    model = artifact("llama", "int8-weight-only")

    class Unasked(ShortBackend):
        default = Silent

    rows = token_rows((24, 20), seed=7)
    found = checked(Subject(model, Unasked(model), "ort", tmp_path, rows, None, None))
    assert found.failed == ["end to end: prefill, default session"]
