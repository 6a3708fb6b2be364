"""The conformance suite itself: a sound backend passes it, and each thing that can be wrong with
one fails a test.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from backends.base import (
    Backend,
    Fusion,
    Reason,
    Request,
    RuntimeMissing,
    StoredTensor,
    WriteOptions,
)
from backends.testing import BackendConformance
from backends.testing.cases import Case, cases, write
from backends.testing.written import Written
from backends.torch_model import TorchModel
from calib.artifact import QuantizedLinear, QuantizedModel

PACKAGE = Path(__file__).parents[1] / "third_party_backend"


@pytest.fixture(scope="module", autouse=True)
def on_the_path() -> Iterator[None]:
    """The third-party backend stands in for a sound one; nothing of it is installed here."""
    sys.path.insert(0, str(PACKAGE))
    yield
    sys.path.remove(str(PACKAGE))


def sound() -> Any:
    from rotq_npz.backend import NpzBackend

    return NpzBackend()


class Wrapped:
    """The sound backend; what is wrong with it is overridden."""

    def __init__(self) -> None:
        self.inner = sound()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Answers(Wrapped):
    """Adds to what the sound one says of linears."""

    @staticmethod
    def reason(name: str) -> Reason:
        raise NotImplementedError

    def refusals(self, request: Request) -> list[Reason]:
        reasons: list[Reason] = self.inner.refusals(request)
        return [*map(self.reason, request.linears), *reasons]


class SaysItInTwoLines(Answers):
    @staticmethod
    def reason(name: str) -> Reason:
        return Reason("no\nreason", about="linear", name=name)


class ChangesItsMind(Answers):
    count = 0

    @staticmethod
    def reason(name: str) -> Reason:
        ChangesItsMind.count += 1
        return Reason(f"reason {ChangesItsMind.count}", about="linear", name=name)


class SpeaksOfAStranger(Answers):
    @staticmethod
    def reason(name: str) -> Reason:
        return Reason("it is too wide", about="linear", name="a.stranger")


class SpeaksOfTheModel(Answers):
    @staticmethod
    def reason(name: str) -> Reason:
        return Reason("it has too many linears", "choose a smaller one")


class SaysItTwice(Wrapped):
    def refusals(self, request: Request) -> list[Reason]:
        reasons: list[Reason] = self.inner.refusals(request)
        return [*reasons, *reasons]


class RefusesR4(Wrapped):
    def refusals(self, request: Request) -> list[Reason]:
        reasons: list[Reason] = self.inner.refusals(request)
        if "r4" not in request.rotations:
            return reasons
        return [*reasons, Reason("nothing runs before a linear", about="rotation", name="r4")]


class RefusesAll(Answers):
    @staticmethod
    def reason(name: str) -> Reason:
        return Reason("never", about="linear", name=name)


class RefusesOfItself(Wrapped):
    def refusals(self, request: Request) -> list[Reason]:
        return [Reason("it is not for you", "use another one")]


class SpeaksAnOlderContract(Wrapped):
    contract = 1


class ListsTooFew(Wrapped):
    def files(self, request: Request, nbytes: int) -> Sequence[str]:
        return ("model.npz",)


class ListsTooMany(Wrapped):
    def files(self, request: Request, nbytes: int) -> Sequence[str]:
        return (*self.inner.files(request, nbytes), "model.txt")


class HasNoTargets(Wrapped):
    targets = ()


class LacksAMethod(Wrapped):
    contents = None


class ChangesTheModel(Wrapped):
    def write(self, model: QuantizedModel, folder: Path, options: WriteOptions) -> None:
        self.inner.write(model, folder, options)
        next(iter(model.floats.values())).add_(1)


class LeavesFiles(Wrapped):
    def write(self, model: QuantizedModel, folder: Path, options: WriteOptions) -> None:
        self.inner.write(model, folder, options)
        Path("left.tmp").write_text("")


class WritesTheTime(Wrapped):
    def write(self, model: QuantizedModel, folder: Path, options: WriteOptions) -> None:
        self.inner.write(model, folder, options)
        (folder / "when.txt").write_text(str(time.time_ns()))


def changed(
    linears: Mapping[str, QuantizedLinear], **parts: Callable[[Any], Any]
) -> dict[str, QuantizedLinear]:
    """The linears with parts of the last one changed."""
    last = list(linears)[-1]
    values = {part: change(getattr(linears[last], part)) for part, change in parts.items()}
    return {**linears, last: dataclasses.replace(linears[last], **values)}


class Reads(Wrapped):
    parts: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}

    def read_linears(self, folder: Path, target: str) -> Mapping[str, QuantizedLinear]:
        return changed(self.inner.read_linears(folder, target), **self.parts)


class ReadsOneBitOff(Reads):
    parts: ClassVar = {"weight": lambda weight: weight ^ torch.ones(1, 1, dtype=weight.dtype)}


class ReadsAnotherScale(Reads):
    parts: ClassVar = {"weight_scale": lambda scale: scale * (1 + 2e-7)}


class LosesTheInputScale(Reads):
    parts: ClassVar = {"input_scale": lambda scale: None}


class ReadsInAnotherOrder(Wrapped):
    def read_linears(self, folder: Path, target: str) -> Mapping[str, QuantizedLinear]:
        return dict(reversed(self.inner.read_linears(folder, target).items()))


class Counts(Wrapped):
    @staticmethod
    def keep(tensor: StoredTensor) -> bool:
        raise NotImplementedError

    def contents(self, folder: Path, target: str) -> Sequence[StoredTensor]:
        return [tensor for tensor in self.inner.contents(folder, target) if self.keep(tensor)]


class ForgetsTheEmbedding(Counts):
    @staticmethod
    def keep(tensor: StoredTensor) -> bool:
        return "embed" not in tensor.name


class ForgetsALinear(Counts):
    @staticmethod
    def keep(tensor: StoredTensor) -> bool:
        return not (tensor.kind == "quantized weight" and "layers.1.mlp.down" in tensor.name)


class CountsMoreThanThereIs(Wrapped):
    def contents(self, folder: Path, target: str) -> Sequence[StoredTensor]:
        found = self.inner.contents(folder, target)
        return [dataclasses.replace(tensor, nbytes=4 * tensor.nbytes) for tensor in found]


class Fuses(Wrapped):
    def fusion(self, folder: Path, target: str) -> Fusion:
        return Fusion(1, ["a.stranger"], {})


class Runtime:
    """The sound runtime; what is wrong with it is overridden."""

    def __init__(self, model: TorchModel) -> None:
        self.inner = model
        self.runtime = model.runtime
        self.note = ""

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, past: Any = None
    ) -> tuple[Tensor, list[Tensor]]:
        return self.inner.forward(ids, mask, positions, past)

    def probe(self, ids: Tensor, names: Collection[str]) -> Mapping[str, tuple[Tensor, Tensor]]:
        return self.inner.probe(ids, list(names))


class Runs(Wrapped):
    kind: type[Runtime] = Runtime

    def load(self, folder: Path, target: str, *, exact: bool) -> Any:
        return self.kind(self.inner.load(folder, target, exact=exact))

    def load_probed(self, folder: Path, target: str) -> Any:
        return self.load(folder, target, exact=True)


class ScalesItsLogits(Runs):
    class kind(Runtime):
        def forward(self, *args: Any) -> tuple[Tensor, list[Tensor]]:
            logits, past = super().forward(*args)
            return logits * 1.1, past


class ForgetsTheCache(Runs):
    class kind(Runtime):
        def forward(
            self, ids: Tensor, mask: Tensor, positions: Tensor, past: Any = None
        ) -> tuple[Tensor, list[Tensor]]:
            return super().forward(ids, mask[:, -ids.shape[1] :], positions, None)


class IgnoresTheMask(Runs):
    class kind(Runtime):
        def forward(
            self, ids: Tensor, mask: Tensor, positions: Tensor, past: Any = None
        ) -> tuple[Tensor, list[Tensor]]:
            return super().forward(ids, torch.ones_like(mask), positions, past)


class ApproximatesALinear(Runs):
    class kind(Runtime):
        def probe(self, ids: Tensor, names: Collection[str]) -> Mapping[str, tuple[Tensor, Tensor]]:
            found = dict(super().probe(ids, names))
            name, (entering, leaving) = found.popitem()
            return {**found, name: (entering, leaving * (1 + 1e-4))}


class IsNotExact(Runs):
    class kind(Runtime):
        def __init__(self, model: TorchModel) -> None:
            super().__init__(model)
            self.note = "rounds at will"


class Opens(Wrapped):
    error: Exception = Exception()

    def contents(self, folder: Path, target: str) -> Sequence[StoredTensor]:
        try:
            found: Sequence[StoredTensor] = self.inner.contents(folder, target)
        except Exception:
            raise self.error from None
        return found


class LeaksItsErrors(Opens):
    error = KeyError("x")


class BlamesTheMachine(Opens):
    error = RuntimeMissing("no such runtime", hint="install it")


BACKEND_TESTS: dict[str, list[type[Wrapped]]] = {
    "test_it_is_a_backend": [HasNoTargets, LacksAMethod],
    "test_it_was_written_for_this_contract": [SpeaksAnOlderContract],
    "test_nothing_speaks_against_nothing": [RefusesOfItself],
    "test_reasons_are_one_line_and_always_the_same": [
        SaysItInTwoLines,
        ChangesItsMind,
        SaysItTwice,
        SpeaksOfAStranger,
        SpeaksOfTheModel,
    ],
    "test_it_expresses_something": [RefusesAll],
}
FOLDER_TESTS: dict[str, list[type[Wrapped]]] = {
    "test_files_are_those_that_it_lists": [ListsTooFew, ListsTooMany],
    "test_linears_are_read_back_to_the_last_bit": [
        ReadsOneBitOff,
        ReadsAnotherScale,
        LosesTheInputScale,
        ReadsInAnotherOrder,
    ],
    "test_contents_are_everything": [ForgetsTheEmbedding, ForgetsALinear, CountsMoreThanThereIs],
    "test_fusion_names_linears": [Fuses],
    "test_each_linear_computes_what_the_artifact_says": [ApproximatesALinear],
    "test_prefill_is_the_reference": [ScalesItsLogits, IsNotExact],
    "test_decoding_with_the_cache_is_the_reference": [ForgetsTheCache],
    "test_padding_changes_nothing": [IgnoresTheMask],
}
WRITING_TESTS = [ChangesTheModel, LeavesFiles, WritesTheTime]
CASE = Case("numpy", "int8", "llama")


def suite_of(kind: type[Any]) -> BackendConformance:
    class Suite(BackendConformance):
        @staticmethod
        def create() -> Backend:
            backend: Backend = kind()
            return backend

    return Suite()


def pairs(table: Mapping[str, list[type[Wrapped]]]) -> list[Any]:
    return [
        pytest.param(test, kind, id=kind.__name__)
        for test, kinds in table.items()
        for kind in kinds
    ]


@pytest.mark.parametrize(("test", "wrong"), pairs(BACKEND_TESTS))
def test_a_backend_that_promises_wrongly_fails(test: str, wrong: type[Wrapped]) -> None:
    getattr(suite_of(Wrapped), test)(Wrapped())  # the sound one passes
    with pytest.raises(AssertionError):
        getattr(suite_of(wrong), test)(wrong())


LIGHT = """
from rotq_npz.backend import NpzBackend

class Light(NpzBackend):
    pass

class Heavy(NpzBackend):
    def refusals(self, request):
        import torch
        return super().refusals(request)
"""


def test_a_backend_that_imports_torch_to_give_a_reason_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "light_backend.py").write_text(LIGHT)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("light_backend")
    suite = suite_of(Wrapped)
    suite.test_reasons_are_given_without_importing_a_framework(module.Light())
    with pytest.raises(AssertionError, match="it imports torch"):
        suite.test_reasons_are_given_without_importing_a_framework(module.Heavy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write(sound(), CASE, folder)
    return folder


@pytest.mark.parametrize(("test", "wrong"), pairs(FOLDER_TESTS))
def test_a_backend_that_reads_or_runs_wrongly_fails(
    test: str, wrong: type[Any], folder: Path
) -> None:
    model = CASE.model("float32")
    getattr(suite_of(Wrapped), test)(Written(sound(), CASE, folder, model))
    with pytest.raises(AssertionError):
        getattr(suite_of(wrong), test)(Written(wrong(), CASE, folder, model))


@pytest.mark.parametrize("wrong", WRITING_TESTS)
def test_a_backend_that_writes_wrongly_fails(
    wrong: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = dataclasses.replace(CASE, family="qwen2")  # a model of its own, which one of them spoils
    for kind, name in ((Wrapped, "sound"), (wrong, "wrong")):
        root = tmp_path / name
        root.mkdir()
        if kind is Wrapped:
            suite = suite_of(kind)
            suite.test_writing_touches_nothing_else(
                case,
                Wrapped(),  # type: ignore[arg-type]
                root,
                monkeypatch,
            )
        else:
            with pytest.raises(AssertionError):
                suite_of(kind).test_writing_touches_nothing_else(case, wrong(), root, monkeypatch)


@pytest.mark.parametrize("wrong", [LeaksItsErrors, BlamesTheMachine])
def test_a_backend_that_answers_damage_wrongly_fails(wrong: type[Any], tmp_path: Path) -> None:
    (tmp_path / "sound").mkdir()
    suite_of(Wrapped).test_a_damaged_folder_is_refused(
        Wrapped(),  # type: ignore[arg-type]
        tmp_path / "sound",
        "truncated",
    )
    (tmp_path / "wrong").mkdir()
    with pytest.raises((AssertionError, KeyError)):
        suite_of(wrong).test_a_damaged_folder_is_refused(wrong(), tmp_path / "wrong", "truncated")


def test_every_scheme_that_is_accepted_is_tried() -> None:
    backend = sound()
    tried = {case.scheme for case in cases(backend, ("llama", "gpt2"), online=True)}
    assert tried == {
        "float",
        "int8",
        "int8-dynamic",
        "int8-weight-only",
        "int4-weight-only",
        "w4a8",
        "w4a4",
    } | {
        "int8-clusters",
        "int4-blocks-of-32",
    }
    families = {case.family for case in cases(backend, ("llama", "gpt2"), online=True)}
    assert families == {"llama", "gpt2"}
    assert any(case.rotate[-1] == "r4" for case in cases(backend, ("llama",), online=True))
    assert not any(case.rotate[-1] == "r4" for case in cases(backend, ("llama",), online=False))
    assert not any(case.rotate[-1] == "r4" for case in cases(RefusesR4(), ("llama",), online=True))
