"""Every reader of rotq as a function of a folder: what a command would ask of it, and no more."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from calib.errors import RotqError


def recipe(folder: Path) -> object:
    """As ``--recipe`` does."""
    from exporter.recipe import load_recipe

    return load_recipe(folder / "recipe.yaml", {"seed": 1}).to_yaml()


def config(folder: Path) -> None:
    """As the plan and the start of a run do."""
    from calib.architectures import wiring_for
    from calib.network.checkpoint import load_config

    _all(lambda: wiring_for(load_config(folder)).sizes, lambda: _planned(folder))


def weights(folder: Path) -> None:
    """As the plan and the start of a run do, and every tensor."""
    from calib.architectures import wiring_for
    from calib.fusing import check_contents
    from calib.network.checkpoint import load_config, open_checkpoint

    def run() -> None:
        wiring = _kept("fuzzed wiring", lambda: wiring_for(load_config(folder)))
        checkpoint = open_checkpoint(folder)
        check_contents(checkpoint, wiring, "it", ignore_unused=False)
        for name in checkpoint:
            checkpoint[name]

    _all(run, lambda: _planned(folder))


def _planned(folder: Path) -> None:
    """A plan, which times this CPU, one time in fifty; else what it reads."""
    from exporter.planning.headers import check_headers, read_headers
    from exporter.planning.plan import plan
    from exporter.planning.sizes import sizes_of
    from exporter.run.options import RunOptions

    if _often(folder, 0.02):
        plan(_recipe(folder), RunOptions(folder / "out"))
    headers = read_headers(str(folder))
    check_headers(headers, ignore_unused=False)
    sizes_of(headers, _recipe(folder))


def network(folder: Path) -> object:
    """As parity does, which has transformers load the original."""
    from calib.network.checkpoint import load_config
    from calib.network.original import load_network

    return load_network(folder, load_config(folder))


def tokenizer(folder: Path) -> None:
    """Text and conversations through it."""
    from calib.network.checkpoint import load_config
    from exporter.run.prefix import sinks
    from exporter.source import load_tokenizer, read_rows

    loaded = load_tokenizer(folder)
    sinks(loaded)
    lines = [f"once upon a time there were {number} foxes" for number in range(40)]
    data = _beside(folder, "text.jsonl", [{"text": line} for line in lines])
    messages = [{"messages": [{"role": "user", "content": line}]} for line in lines]
    chat = _beside(folder, "chat.jsonl", messages)
    settings = {"calibration.seqlen": 8, "calibration.nsamples": 2, "evaluation.nsamples": 1}
    found = load_config(_model())
    recipes = [
        _recipe(folder, **{"calibration.dataset": str(each), **settings}) for each in (data, chat)
    ]
    _all(*(partial(read_rows, each, loaded, found) for each in recipes))


def text(folder: Path) -> None:
    """Every text, by the plan and by the run."""
    from calib.data.corpus import read_corpus
    from calib.data.documents import check_source, read_documents
    from exporter.source import embedded_folder, load_tokenizer

    loaded = _kept("tokenizer", lambda: load_tokenizer(embedded_folder()))
    for path in sorted(folder.iterdir()):
        if path.suffix != ".parquet":
            _all(
                lambda path=path: check_source(str(path)),
                lambda path=path: read_corpus(str(path), loaded),
                lambda path=path: read_documents(str(path), limit=5),
                lambda path=path: read_corpus(str(path), loaded, column="id"),
            )


def parquet(folder: Path) -> None:
    """As other text."""
    from calib.data.corpus import read_corpus
    from calib.data.documents import check_source

    path = str(folder / "text.parquet")
    _all(lambda: check_source(path), lambda: read_corpus(path, None))


def rotations(folder: Path) -> object:
    """As ``--rotations`` does, to the matrices that are folded."""
    from calib.rotations.files import load_rotations
    from calib.rotations.foreign import import_rotations

    _all(lambda: load_rotations(folder), lambda: import_rotations([folder], _wiring()))
    return None


def pickles(folder: Path) -> None:
    """As ``--rotations`` does."""
    from calib.rotations.foreign import import_rotations

    both = [folder / "r1.pt", folder / "r2.pt"]
    _all(
        lambda: import_rotations(both, _wiring()),
        lambda: import_rotations([folder / "R.bin"], _wiring()),
    )


def capture(folder: Path) -> None:
    """As ``--from-capture`` and training loops do."""
    from calib.capture.datasets import R1Dataset, R2Dataset
    from calib.capture.storage import Capture

    def samples(data: Any) -> None:
        for index in range(min(3, len(data))):
            data[index]

    def trained() -> None:
        loaded = Capture.load(folder)
        loaded.held_out("r1")
        loaded.held_out("r2")
        loaded.r1.covariance.double()

    _all(trained, lambda: samples(R1Dataset(folder)), lambda: samples(R2Dataset(folder, 1)))


def artifact(folder: Path) -> None:
    """As ``--from-artifact`` and ``inspect`` do, and every tensor."""
    from calib.artifact import load_artifact
    from exporter.commands.inspect import inspect_folder
    from exporter.planning.headers import read_artifact

    def opened() -> None:
        model = load_artifact(folder)
        for tensor in model.floats.values():
            tensor.dim()
        model.schemes()

    _all(opened, lambda: inspect_folder(folder), lambda: read_artifact(folder))


def prefix(folder: Path) -> object:
    """As an artifact's."""
    from calib.artifact import load_prefix

    return load_prefix(folder)


def report(folder: Path) -> None:
    """As verify, inspect and eval do, and what verify writes back."""
    from exporter.commands.inspect import inspect_folder
    from exporter.reporting.exported import check_unchanged, read_export, update_export

    def updated() -> None:
        found, written = read_export(folder)
        update_export(folder, found, written)
        check_unchanged(folder, found)

    _all(lambda: inspect_folder(folder), updated)


def listing(folder: Path) -> None:
    """As ``--overwrite`` does."""
    from exporter.output import atomic_folder, check_target

    def replaced() -> None:
        with atomic_folder(folder, overwrite=True) as new:
            (new / "new").write_text("new")

    outside = folder.parent / "outside"
    outside.write_text("mine")
    _all(lambda: check_target(folder, True), replaced)
    if outside.read_text() != "mine":
        raise AssertionError("a file outside the folder was changed")


def work(folder: Path) -> None:
    """As ``--work-dir --resume`` does."""
    from calib.layerwise.shards import ShardStore
    from exporter.output import locked
    from exporter.recipe import load_recipe
    from exporter.run.workdir import WorkDir

    def walk() -> None:
        store = ShardStore(folder, resume=True)
        store.bind({"model": "m", "seed": "0"})
        for name in store.finished():
            store.next_inputs(name)
        store.paths()

    def held() -> None:
        with locked(folder, "the folder", "wait"):
            pass

    _all(walk, held, lambda: WorkDir(folder, load_recipe(None), resume=True))


def graph(folder: Path) -> None:
    """As verify and inspect do; in the runtime, one time in four."""
    from backends.onnx.backend import OnnxBackend

    backend = OnnxBackend()

    def linears() -> None:
        for linear in backend.read_linears(folder, "ort").values():
            linear.weight.dim()

    _all(
        lambda: backend.contents(folder, "ort"),
        lambda: backend.read_cache(folder, "ort"),
        lambda: backend.read_floats(folder, "ort"),
        linears,
    )
    if _often(folder, 0.25):
        _all(
            lambda: backend.load(folder, "ort", exact=True),
            lambda: backend.load_probed(folder, "ort"),
            lambda: backend.fusion(folder, "ort"),
        )


def bundle(target: str) -> Callable[[Path], None]:
    """As verify and inspect do of one layout."""

    def read(folder: Path) -> None:
        from backends.safetensors.backend import SafetensorsBackend, _in_torch
        from backends.safetensors.read import open_bundle

        backend = SafetensorsBackend()
        _all(
            lambda: backend.contents(folder, target),
            lambda: backend.read_linears(folder, target),
            lambda: backend.read_cache(folder, target),
            lambda: [tensor.dim() for tensor in backend.read_floats(folder, target).values()],
        )
        if _often(folder, 0.2):
            _all(
                lambda: _in_torch(open_bundle(folder, target=target, verify=True)),
                lambda: backend.load(folder, target, exact=True),
            )

    return read


def cache(folder: Path) -> None:
    """As a trace and a question to a runtime do."""
    import onnx_ir as ir

    from backends.onnx import asking, trace_cache

    for path in sorted(folder.glob("*.json")):
        for answer in asking._read(path).values():
            answer.approximation > 1e-4  # noqa: B015 -- as whoever asked does
            answer.refused.strip()
    for path in sorted(folder.glob("*.trace")):
        proto = trace_cache._read(path)
        if proto is not None:
            ir.from_proto(proto)


def plugins(folder: Path) -> None:
    """As ``rotq backends`` and ``--backend`` do."""
    from backends.asking import refusal_of
    from backends.base import Request
    from backends.registry import available, get_backend, target_of
    from exporter.cli import main

    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        for info in available():
            str(info.error)
        backend = get_backend("stub")
        _all(lambda: refusal_of(backend, Request(target_of(backend, None))))
        if _often(folder, 0.1):
            main(["backends", "--json"])
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if name.endswith("_backend"):
                del sys.modules[name]
        sys.path_importer_cache.pop(str(folder), None)


def command_line(folder: Path) -> None:
    """One command on a damaged folder, as a user gives it."""
    from exporter.cli import main

    out = folder / "out"
    commands: tuple[tuple[object, ...], ...] = (
        ("inspect", folder / "export"),
        ("inspect", folder / "artifact", "--json"),
        ("verify", folder / "export", "-m", folder / "model"),
        ("eval", folder / "export", "--nsamples", 1),
        ("export", "--dry-run", "-m", folder / "model", "--backend", "onnx"),
        ("export", "--dry-run", "--recipe", folder / "recipe" / "recipe.yaml"),
        ("export", "--dry-run", "--from-artifact", folder / "artifact", "--backend", "onnx"),
        ("export", "--from-artifact", folder / "artifact", "--no-verify", "-o", out),
        ("stats", "--dry-run", "-m", folder / "model"),
        ("calibrate", "--dry-run", "-m", folder / "model", "--rotations", folder / "pickles"),
        (
            *("export", "-m", folder / "model", "--no-verify", "-o", out, "--backend", "onnx"),
            *("--scheme", "int8-weight-only", "--rotate", "none", "--nsamples", 2),
            *("--seqlen", 16, "--calib-dataset", folder / "text" / "text.jsonl"),
        ),
    )
    chosen = commands[int(_chance(folder) * len(commands))]
    code = main([str(part) for part in chosen])
    if code not in (0, 1, 2, 3):
        raise AssertionError(f"exit code {code} of {chosen[0]}")


def _all(*reads: Callable[[], object]) -> None:
    """Each of them, whatever becomes of the one before; in the end what the last one refused."""
    refused: RotqError | None = None
    for read in reads:
        try:
            read()
        except RotqError as error:
            if "\n" in error.message:
                raise
            refused = error
    if refused is not None:
        raise refused


_memo: dict[str, Any] = {}


def _kept(key: str, make: Callable[[], Any]) -> Any:
    if key not in _memo:
        _memo[key] = make()
    return _memo[key]


def _wiring() -> Any:
    from calib.architectures import wiring_for
    from calib.network.checkpoint import load_config

    return _kept("wiring", lambda: wiring_for(load_config(_model())))


def _model() -> Path:
    """The pristine checkpoint, which a run of the fuzzer names."""
    return Path(os.environ["ROTQ_FUZZ_PRISTINE"]) / "model"


def _recipe(folder: Path, **changes: object) -> Any:
    from exporter.recipe import load_recipe

    return load_recipe(None, {"model": str(folder), "rotate": "r1,r2", **changes})


def _beside(folder: Path, name: str, rows: Sequence[object]) -> Path:
    path = folder.parent / name
    if not path.exists():
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def _chance(folder: Path) -> float:
    """The same number for the same input: what a reader does must not depend on anything else."""
    return Random((folder.parent / "input").read_text()).random()


def _often(folder: Path, share: float) -> bool:
    return _chance(folder) < share


def remove(folder: Path) -> None:
    """Remove an input, whatever lies in it."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


def settings() -> Mapping[str, str]:
    """The environment in which inputs are read."""
    return {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "ROTQ_PLUGIN_SECONDS": "5"}
