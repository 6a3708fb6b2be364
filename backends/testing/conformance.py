"""The conformance suite: what every backend must do, whatever it writes.

Subclass :class:`BackendConformance` in a test module and say which backend; pytest then runs each
test for each target and for each scheme that the backend says it can express. A backend that passes
can be exported to, verified and inspected by ``rotq`` like the built-in ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from fnmatch import filter as filter_names
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from backends.altered import altered_cache, altered_parts, same_either_way
from backends.asking import expressible
from backends.base import (
    CONTRACT_VERSION,
    OLDEST_CONTRACT,
    Backend,
    Fusion,
    ListsFiles,
    ReadsFloats,
    Request,
    RuntimeMissing,
)
from backends.testing.cases import (
    Case,
    cases,
    linear_schemes,
    one_per_target,
    state_of,
    tree,
    write,
)
from backends.testing.damage import DAMAGE, openers
from backends.testing.models import FAMILIES, token_rows
from backends.testing.questions import check_reasons, requests
from backends.testing.running import (
    LINEAR,
    check_close,
    decode,
    padded,
    prefill,
    reference_logits,
)
from backends.testing.written import Written
from calib.errors import BackendError
from calib.measure.reference import ReferenceLinear
from calib.schemes import LINEAR_SCHEMES

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "onnx_ir", "modelopt")
"""What listing backends must not import: each of them takes seconds."""
_METHODS = (
    "refusals",
    "compute_dtype",
    "write",
    "load",
    "load_probed",
    "fusion",
    "read_linears",
    "read_cache",
    "contents",
)
_OF_EVERY_EXPORT = ("rotations.json", "rotations.safetensors")
"""Files that a backend may write and need not list."""


class BackendConformance:
    """Subclass it as ``Test...``, and give it :meth:`create`.

    Example:
        .. code-block:: python

            class TestMine(BackendConformance):
                @staticmethod
                def create() -> Backend:
                    return MyBackend()
    """

    families: ClassVar[tuple[str, ...]] = tuple(FAMILIES)
    """Model families to try; those that the backend refuses are left out."""
    targets: ClassVar[tuple[str, ...] | None] = None
    """Targets to write for, where some of them need a package that may be missing; ``None``: all.
    """
    online: ClassVar[bool] = True
    """Whether to try rotations that run online, R3 and R4."""
    _made: ClassVar[dict[tuple[type, Case], Written]] = {}

    @staticmethod
    def create() -> Backend:
        """The backend that is tried; called without arguments, as its entry point is."""
        raise NotImplementedError("a conformance test overrides create()")

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        """One test for each case that the backend accepts."""
        if "case" in metafunc.fixturenames and cls is not BackendConformance:
            tried = list(cases(cls.create(), cls.families, online=cls.online, targets=cls.targets))
            metafunc.parametrize("case", tried, ids=[case.id for case in tried])

    @pytest.fixture
    def backend(self) -> Backend:
        """A fresh backend: it holds no state."""
        return self.create()

    @pytest.fixture
    def written(
        self, case: Case, backend: Backend, tmp_path_factory: pytest.TempPathFactory
    ) -> Written:
        """The case, written once for all tests that only look at it."""
        key = (type(self), case)
        if key not in self._made:
            folder = tmp_path_factory.mktemp(case.id)
            self._made[key] = Written(backend, case, folder, write(backend, case, folder))
        return self._made[key]

    def test_it_is_a_backend(self, backend: Backend) -> None:
        """Name, targets and methods are there."""
        assert isinstance(backend.name, str)
        assert backend.name
        assert isinstance(backend.targets, tuple), "targets are a tuple; the first is the default"
        assert backend.targets
        assert all(isinstance(target, str) and target for target in backend.targets)
        assert len(set(backend.targets)) == len(backend.targets)
        missing = [name for name in _METHODS if not callable(getattr(backend, name, None))]
        assert not missing
        for target in backend.targets:
            assert backend.compute_dtype(target) in (None, *LINEAR)

    def test_it_was_written_for_this_contract(self, backend: Backend) -> None:
        """``contract`` is a number of a version that this rotq takes."""
        assert OLDEST_CONTRACT <= backend.contract <= CONTRACT_VERSION

    def test_nothing_speaks_against_nothing(self, backend: Backend) -> None:
        """Of what is not asked, nothing is said."""
        for target in backend.targets:
            assert list(backend.refusals(Request(target))) == []

    def test_reasons_are_one_line_and_always_the_same(self, backend: Backend) -> None:
        """``rotq backends`` prints them in a table. Each is about something that was asked."""
        for target in backend.targets:
            for request in requests(target):
                check_reasons(backend, self.create(), request)

            linears = {"a": LINEAR_SCHEMES["int8"]}
            for family in self.families:
                config = FAMILIES[family]().to_dict()
                check_reasons(
                    backend, self.create(), Request(target, linears=linears, config=config)
                )

    def test_reasons_are_given_without_importing_a_framework(self, backend: Backend) -> None:
        """``rotq backends`` asks every installed backend, and answers at once: what a backend has
        to ask a runtime, it asks once, here.
        """
        for target in backend.targets:
            backend.refusals(Request(target, linears=LINEAR_SCHEMES))

        kind = type(backend)
        code = "\n".join(
            [
                "import sys",
                f"from {kind.__module__} import {kind.__qualname__} as B",
                "from backends.base import Request",
                "from calib.schemes import KV_SCHEMES, LINEAR_SCHEMES",
                "backend = B()",
                "for target in backend.targets:",
                "    backend.refusals(Request(target, linears=LINEAR_SCHEMES))",
                "    for cache in KV_SCHEMES.values():",
                "        backend.refusals(Request(target, cache=cache))",
                "    backend.refusals(Request(target, rotations=('r1', 'r2', 'r3', 'r4')))",
                "    backend.refusals(Request(target, logits='last', kv_buffer='shared'))",
                "    backend.refusals(Request(target, dtype='bfloat16'))",
                "    getattr(backend, 'files', lambda request, nbytes: ())(Request(target), 0)",
                f"sys.exit(', '.join(set({HEAVY}) & set(sys.modules)) or 0)",
            ]
        )
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"it imports {done.stderr.strip()}"

    def test_it_expresses_something(self, backend: Backend) -> None:
        """Every target accepts at least one scheme: what accepts none has passed everything else
        here for nothing.
        """
        for target in backend.targets:
            assert any(
                expressible(backend, target, [scheme], None) for scheme in linear_schemes().values()
            ), target

    def test_writing_touches_nothing_else(
        self, case: Case, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not the model, no file outside the folder; and the same model gives the same bytes."""
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        before = state_of(case.model(backend.compute_dtype(case.target)))

        trees = []
        for name in ("one", "two"):
            folder = tmp_path / name
            folder.mkdir()
            model = write(backend, case, folder)
            trees.append(tree(folder))
        assert state_of(model) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "one", "two"]
        assert not list((tmp_path / "elsewhere").iterdir())
        assert trees[0] == trees[1], "the same model must give the same bytes"

    def test_files_are_those_that_it_lists(self, written: Written) -> None:
        """Where the backend lists its files beforehand, all are there and no others are; rotations,
        which every export has, are not counted.
        """
        if not isinstance(written.backend, ListsFiles):
            return
        model = written.model
        request = Request(
            written.case.target,
            linears=model.schemes(),
            cache=None if model.cache is None else model.cache.scheme,
            rotations=tuple(model.rotations.kinds()),
        )
        size = sum(path.stat().st_size for path in written.folder.rglob("*") if path.is_file())
        listed = written.backend.files(request, size)

        names = tree(written.folder).keys() - {*_OF_EVERY_EXPORT}
        assert all(any(fnmatchcase(name, pattern) for pattern in listed) for name in names), names
        missing = [pattern for pattern in listed if not filter_names(names, pattern)]
        assert not missing

    def test_linears_are_read_back_to_the_last_bit(self, written: Written) -> None:
        """Stored values as they are; scales in the dtype that the target has them in."""
        linears = written.backend.read_linears(written.folder, written.case.target)
        assert list(linears) == list(written.model.linears)
        for name, expected in written.model.linears.items():
            assert altered_parts(linears[name], expected) == [], name

    def test_the_cache_is_read_back(self, written: Written) -> None:
        """Scales by layer, or ``None`` where the cache is in float."""
        cache = written.backend.read_cache(written.folder, written.case.target)
        assert altered_cache(cache, written.model.cache) == []

    def test_floats_are_read_back(self, written: Written) -> None:
        """Where the backend can: what it finds is what the artifact has."""
        if not isinstance(written.backend, ReadsFloats):
            pytest.skip("it does not read them")
        floats = written.backend.read_floats(written.folder, written.case.target)
        assert floats
        for name, tensor in floats.items():
            assert same_either_way(tensor, written.model.floats[name]), name

    def test_contents_are_everything(self, written: Written) -> None:
        """What ``rotq inspect`` counts is all there is, and no more than the files hold."""
        contents = written.backend.contents(written.folder, written.case.target)
        assert len({tensor.name for tensor in contents}) == len(contents)
        size = sum(path.stat().st_size for path in written.folder.rglob("*") if path.is_file())
        assert sum(tensor.nbytes for tensor in contents) <= size
        quantized = [tensor for tensor in contents if tensor.kind == "quantized weight"]
        parts = written.model.linears.values()
        bits = sum(part.weight.numel() * part.weight_scheme.format.bits for part in parts)
        assert sum(tensor.nbytes for tensor in quantized) * 8 >= bits
        floats = sum(prod(tensor.shape) for tensor in contents if tensor.kind == "float weight")
        assert floats >= sum(tensor.numel() for tensor in written.model.floats.values())

    def test_fusion_names_linears(self, written: Written) -> None:
        """Where the runtime tells how it executes them, the count is right and the names are those
        of the model.
        """
        fusion = written.backend.fusion(written.folder, written.case.target)
        assert fusion is None or isinstance(fusion, Fusion)
        if fusion is not None:
            assert fusion.quantized == len(written.model.linears)
            assert set(fusion.unfused) <= written.model.linears.keys()

    def test_each_linear_computes_what_the_artifact_says(self, written: Written) -> None:
        """On identical inputs, taken from the runtime itself."""
        try:
            probed = written.backend.load_probed(written.folder, written.case.target)
        except RuntimeMissing as error:
            pytest.skip(error.message)
        names = list(written.model.linears)
        probes = probed.probe(token_rows(12)[0][None], names)
        assert list(probes) == names
        for name, (entering, leaving) in probes.items():
            linear = written.reference.get_submodule(name)
            assert isinstance(linear, ReferenceLinear)
            expected = linear.matmul(linear.quantize(entering.float()))
            check_close(leaving, expected, LINEAR[written.dtype], name)

    def test_prefill_is_the_reference(self, written: Written) -> None:
        """A batch of whole rows."""
        ids = torch.stack(token_rows(12, 12))
        logits = prefill(written.runtime, ids)
        assert logits.dtype == torch.float32
        check_close(logits, reference_logits(written.reference, ids), written.bound, "prefill")
        assert isinstance(written.runtime.runtime, str)
        assert written.runtime.note == "", "what was asked to be exact has nothing to note"

    def test_decoding_with_the_cache_is_the_reference(self, written: Written) -> None:
        """A short prefill, then token by token."""
        ids = torch.stack(token_rows(11, 11, seed=1))
        expected = reference_logits(written.reference, ids)
        check_close(decode(written.runtime, ids, 4), expected, written.bound, "decoding")

    def test_padding_changes_nothing(self, written: Written) -> None:
        """Rows of different lengths in one left-padded batch are the rows alone."""
        rows = token_rows(11, 7, 4, seed=2)
        for row, logits in zip(rows, padded(written.runtime, rows), strict=True):
            expected = reference_logits(written.reference, row[None])
            check_close(logits[None], expected, written.bound, f"padded row of {row.numel()}")

    @pytest.mark.parametrize("damage", ["empty", "truncated", "missing"])
    def test_a_damaged_folder_is_refused(
        self, backend: Backend, tmp_path: Path, damage: str
    ) -> None:
        """With an error that has a hint, by whatever opens the folder first."""
        for case in one_per_target(
            cases(backend, self.families, online=False, targets=self.targets)
        ):
            folder = tmp_path / case.target
            folder.mkdir()
            write(backend, case, folder)
            DAMAGE[damage](folder)

            for name, opener in openers(backend, folder, case.target).items():
                with pytest.raises(BackendError) as caught:
                    opener()
                assert not isinstance(caught.value, RuntimeMissing), name
                assert caught.value.hint, f"{name} says what is wrong and not what to do"
                assert "\n" not in caught.value.message, f"{name} says it in more than one line"
