"""A slice of ``make fuzz`` with a fixed seed, and that it sees what it is there to see."""

from __future__ import annotations

import logging
import os
import pickle  # noqa: TID251 -- what rotq must not do is done here, to be seen
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from calib.errors import DataError
from tests.fuzz import pristine, readers
from tests.fuzz.examine import SENTINEL, examine
from tests.fuzz.kinds import KINDS, Kind, kind_named
from tests.fuzz.mutations import mutate_json, mutate_safetensors
from tests.fuzz.pickles import mutate_pickle
from tests.fuzz.worker import Inputs, Tally, run

INPUTS = 15
"""Of each kind."""
SLOW = {"command line": 3, "report": 5, "plugins": 6, "generation config": 8, "ONNX graph": 10}

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about what they are given


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pristine folders."""
    root = tmp_path_factory.mktemp("pristine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROTQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        pristine.build(root)
    return root


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Readers may configure logging, and payloads leave their mark where they run."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROTQ_FUZZ_PRISTINE", "")
    for name, value in readers.settings().items():
        monkeypatch.setenv(name, value)
    yield
    root.handlers, root.level = before, level
    for name in ("exporter", "calib", "backends"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_slice_of_every_kind(kind: Kind, folders: Path, tmp_path: Path) -> None:
    if kind.needs:
        pytest.importorskip(kind.needs)
    inputs = Inputs(kind, folders, tmp_path, seed=1)
    tally = run(
        inputs,
        Tally(kind.name),
        until=time.monotonic() + 300,
        most=SLOW.get(kind.name, INPUTS),
        failures=tmp_path / "failures",
    )
    assert not tally.distinct, [
        path.read_text() for path in (tmp_path / "failures").glob("*/failure.json")
    ]


FAILED_BEFORE = (
    (11, "ONNX graph", 570),
    (11, "artifact", 103),
    (11, "bundle modelopt", 67),
    (11, "bundle modelopt", 2714),
    (11, "bundle tensorrt", 3474),
    (11, "bundle vllm", 3612),
    (11, "bundle vllm", 331),
    (11, "config.json", 595),
    (11, "plugins", 27),
    (11, "plugins", 72),
    (11, "plugins", 119),
    (11, "plugins", 229),
    (11, "plugins", 247),
    (11, "tokenizer", 588),
    (12, "ONNX graph", 245),
    (12, "ONNX graph", 747),
    (12, "generation config", 17),
    (13, "report", 147),
    (13, "bundle compressed-tensors", 2891),
)
"""Inputs on which a reader once failed, by seed, kind and number."""


@pytest.mark.parametrize(("seed", "name", "number"), FAILED_BEFORE)
def test_inputs_that_failed_before(
    seed: int, name: str, number: int, folders: Path, tmp_path: Path
) -> None:
    inputs = Inputs(kind_named(name), folders, tmp_path, seed=seed)
    inputs.make(number)
    failure = inputs.examine()
    assert failure is None, failure.told


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.name != "text"], ids=lambda kind: kind.name
)
def test_what_is_not_damaged_is_read(kind: Kind, folders: Path, tmp_path: Path) -> None:
    """Else a reader would be fuzzed that refuses everything at its first step."""
    if kind.needs:
        pytest.importorskip(kind.needs)
    inputs = Inputs(kind, folders, tmp_path, seed=1)
    assert inputs.make(0)
    inputs._restore()
    (tmp_path / "input").write_text("1 0")
    kind.repair(inputs.folder)
    kind.read(inputs.folder)


def _payload(folder: Path) -> None:
    pickle.loads(pickle.dumps(_Payload()))  # noqa: S301


class _Payload:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (SENTINEL,)


def _refuses(folder: Path) -> None:
    raise DataError("it is empty", hint="give another one")


def _refuses_without_a_word(folder: Path) -> None:
    raise DataError(" ")


def _stumbles(folder: Path) -> None:
    raise KeyError("weight_map")


def _leaves(folder: Path) -> None:
    sys.exit(3)


def _sleeps(folder: Path) -> None:
    try:
        time.sleep(60)
    except Exception:
        return


def _fills(folder: Path) -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (_refuses, None),
        (_refuses_without_a_word, "traceback"),
        (_stumbles, "traceback"),
        (_leaves, "traceback"),
        (_sleeps, "hang"),
        (_fills, "memory"),
        (_payload, "code run"),
    ],
)
def test_what_counts_as_a_failure(
    read: Callable[[Path], object], what: str | None, tmp_path: Path
) -> None:
    found = examine(read, tmp_path, seconds=1)
    assert (None if found is None else found.what) == what


def test_a_failure_is_made_smaller_and_kept(folders: Path, tmp_path: Path) -> None:
    def needs_a_letter(folder: Path) -> None:
        if b"t" in (folder / "config.json").read_bytes():
            raise KeyError("t")

    whole = kind_named("config.json")
    kind = Kind("letters", whole.folder, whole.files, needs_a_letter)
    found = run(
        Inputs(kind, folders, tmp_path, seed=4),
        Tally(kind.name),
        until=time.monotonic() + 60,
        most=1,
        failures=tmp_path / "failures",
    )
    assert (found.inputs, found.found["traceback"]) == (1, 1)
    (kept,) = (tmp_path / "failures").iterdir()
    assert len((kept / "config.json").read_bytes()) < 20
    assert '"number": 0' in (kept / "failure.json").read_text()


def test_a_seed_and_a_number_make_an_input(folders: Path, tmp_path: Path) -> None:
    made = []
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
        inputs = Inputs(kind_named("recipe"), folders, tmp_path / place, seed=7)
        inputs.make(3)
        changed = inputs.make(5)
        made.append({name: path.read_bytes() for name, path in changed.items()})
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("mutate", "data"),
    [
        (mutate_json, b'{"a": [1, {"b": null}]}'),
        (mutate_safetensors, b"\x02\0\0\0\0\0\0\0{}"),
        (mutate_pickle, b"no archive"),
    ],
)
def test_any_input_can_be_damaged(mutate: Callable[[bytes, Random], bytes], data: bytes) -> None:
    made = {mutate(data, Random(seed)) for seed in range(200)}
    assert len(made) > 50
