"""Whether what rotq writes is the same, byte for byte, before and after a change of its code.

Every run goes through the command line, in a process of its own, so that this file runs unchanged
on both sides of a change. ``--keep`` stores a checksum of every file that the runs write;
``--against`` names those that differ, and exits with 1 where there are any:

    python -m benchmarks.same_bytes --model embedded --keep before.json
    python -m benchmarks.same_bytes --model embedded --against before.json

A model other than the embedded one needs a text, ``--calib-dataset``; the embedded one always has
its own. What is run for each model stands in :func:`runs_of`: with the default recipe and in full
size a direct export to ``ort`` and ``openvino``, one to the four bundles, and from the artifact of
the first one all other targets; then, on few and short rows, what the default does not reach.
A run that rotq refuses is kept with its message, which is compared too; any other failure ends the
comparison. Nothing is verified in a runtime: that costs time and writes no weights.

Sums of floats depend on the number of threads and on the processor, so one thread is used, unless
``OMP_NUM_THREADS`` says otherwise, and both sides need the same machine and the same packages; a
difference in those is printed. Traces are made anew: no cache of an earlier version is read.

A file is hashed as it is, weights and graphs among them, but for these parts of text files:

* what this file itself has put in: paths of the model, of the text and of the work folder,
* ``report.json``, ``rotation_report.json``: the numbers in ``seconds``, the values of
  ``versions``, and ``checksums``, whose keys are kept and whose values must fit the files,
* ``quantized_model.json``: the values of ``provenance.versions``,
* ``rotq_bundle.json``: ``rotq``, the version that wrote it, and the seal over all values,
* ``transformers_version`` in a model's config, and ``quantization_config.version``, the version of
  compressed-tensors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

EMBEDDED = "embedded"
FOLDED = ("modelopt", "transformers")
"""Targets that the default artifact, which rotates while it runs, is not for."""
ONNX, BUNDLES = ("ort", "openvino"), ("tripy", "tensorrt", "modelopt", "vllm", "transformers")
PACKAGES = (
    "torch",
    "transformers",
    "nvidia-modelopt",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "safetensors",
    "scikit-learn",
)
SHORT = ("--nsamples", "16", "--seqlen", "128", "--r1-epochs", "3", "--r2-epochs", "3")
"""Enough to reach every line of a run, in a tenth of the time."""
AWQ = ("--smoothing", "awq", "--block-size", "4")
SHARED = ("--kv-buffer", "shared", "--logits", "last")
MIXED = ("--override", "*.0.*=float", "--observer", "percentile:99.9", "--block-size", "16")
REFUSED = (1, 2)
"""Exit codes of a known failure, which has a message in one line."""
_VOLATILE = "<volatile>"


@dataclass(frozen=True)
class Run:
    """One call of the command line.

    Attributes:
        name: of the folder it writes.
        arguments: all but model, text and output.
        needs: folders of earlier runs, by the option that takes them.
        work: whether it shares the work folder of the model.
    """

    name: str
    arguments: tuple[str, ...]
    needs: Mapping[str, str] = field(default_factory=dict)
    work: bool = False


@dataclass
class Written:
    """What was found: checksums of files, and messages of refused runs, by ``model/run/path``."""

    files: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def runs_of() -> list[Run]:
    """Everything that is run for one model, in order."""
    smooth, asym = ("--smoothing", "smoothquant:auto"), ("--layerwise", "--asym")
    return [
        # the default recipe, in full size
        Run("onnx", ("export", "--backend", "onnx", *_targets(ONNX)), work=True),
        Run("calibrated", ("calibrate", "--backend", "onnx", "--resume"), work=True),
        *(_from_artifact("onnx", target) for target in ("ort", "tensorrt")),
        *(_from_artifact("safetensors", target) for target in BUNDLES if target not in FOLDED),
        Run("bundles", ("export", "--backend", "safetensors", *_targets(BUNDLES))),
        Run("rotated", ("rotate", "--write-dartquant"), {"--from-capture": "work/capture"}),
        # what the default does not reach, small
        _short("float16", "onnx", "tensorrt", "int8", "r1,r2,r4"),
        _short("layerwise", "onnx", "ort", "int8", "r1,r2,r4", "--layerwise"),
        _short("layerwise-asym", "safetensors", "modelopt", "int8", "r1,r2", *asym),
        _short("gptq", "onnx", "ort", "int4-weight-only", "r1,r2", *_weights("gptq")),
        _short("awq", "safetensors", "compressed-tensors", "int4-weight-only", "none", *AWQ),
        _short("smoothquant", "onnx", "ort", "int8", "none", *smooth),
        _short("float8", "onnx", "ort", "float8", "r1,r2,r4"),
        _short("kv-int8", "onnx", "ort", "int8", "r1,r2,r3,r4", "--kv", "int8"),
        _short("shared", "onnx", "ort", "int8-weight-only", "none", *SHARED),
        _short("nvfp4", "onnx", "tensorrt", "nvfp4", "none"),
        _short("mxfp8", "safetensors", "modelopt", "mxfp8", "none", "--kv", "float8"),
        _short("w4a8", "safetensors", "tripy", "w4a8", "none", *MIXED),
        _short("w4a4", "safetensors", "vllm", "w4a4", "r1,r2,r4", *_weights("gptq")),
    ]


def _targets(names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        yield from ("--target", name)


def _from_artifact(backend: str, target: str) -> Run:
    arguments = ("export", "--backend", backend, "--target", target)
    return Run(f"artifact-{backend}-{target}", arguments, {"--from-artifact": "calibrated"})


def _weights(algorithm: str) -> tuple[str, str]:
    return "--weight-algorithm", algorithm


def _short(name: str, backend: str, target: str, scheme: str, rotate: str, *more: str) -> Run:
    place = ("--backend", backend, "--target", target)
    return Run(name, ("export", *place, "--scheme", scheme, "--rotate", rotate, *more, *SHORT))


def main() -> int:
    """Run, keep or compare, and say how it went."""
    arguments = _arguments()
    environment = {"machine": f"{platform.machine()} {processor()}", "threads": threads()} | {
        name: version(name) for name in PACKAGES
    }
    began = time.perf_counter()
    written = Written()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        each = partial(
            write_model, text=arguments.calib_dataset, work=work.resolve(), only=arguments.only
        )
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for one in pool.map(each, arguments.model):
                written.files |= one.files
                written.refused |= one.refused
    seconds = time.perf_counter() - began
    print(f"{len(written.files)} files, {len(written.refused)} refusals, {seconds:.0f} s")
    kept = {"environment": environment, "files": written.files, "refused": written.refused}
    if arguments.keep is not None:
        arguments.keep.write_text(
            json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
    if arguments.against is None:
        return 0
    before = json.loads(arguments.against.read_text(encoding="utf-8"))
    if before["environment"] != environment:
        print(f"another environment: {before['environment']} before, {environment} now")
    labels = [label_of(model) for model in arguments.model]
    known = {part: _of_runs(before[part], labels, arguments.only) for part in ("files", "refused")}
    differing = differences(known, kept)
    print(f"compared with {len(known['files'])} of {len(before['files'])} files kept before")
    print("\n".join(differing) or "all the same")
    return 1 if differing else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=[EMBEDDED], help=f"folders, or '{EMBEDDED}'")
    parser.add_argument(
        "--calib-dataset", type=Path, help="text for all models but the embedded one"
    )
    parser.add_argument("--keep", type=Path, help="JSON file to store the checksums in")
    parser.add_argument(
        "--against", type=Path, help="JSON file of an earlier --keep to compare with"
    )
    parser.add_argument("--work", type=Path, help="empty folder to leave all that is written in")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument(
        "--only", nargs="+", default=[], help="names of runs, with those that they need"
    )
    return parser.parse_args()


def _of_runs(entries: Mapping[str, str], models: list[str], runs: list[str]) -> dict[str, str]:
    """What was found for these models, and in these runs; in all of them if none is named."""
    parts = {key: key.split("/") for key in entries}
    return {
        key: entries[key]
        for key, (model, run, *_) in parts.items()
        if model in models and (not runs or run in runs)
    }


def label_of(model: str) -> str:
    """What a model is called in the results, wherever its folder lies."""
    return model if model == EMBEDDED else Path(model).name


def processor() -> str:
    """What the kernels of torch choose their instructions by, as far as Linux says it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), ""
    )


def threads() -> str:
    """How many threads the runs compute with."""
    return os.environ.get("OMP_NUM_THREADS", "1")


def write_model(model: str, text: Path | None, work: Path, only: list[str]) -> Written:
    """Everything that is written for one model.

    Args:
        model: its folder, or :data:`EMBEDDED`.
        text: what other models than the embedded one are calibrated on.
        work: folder for what is written.
        only: runs to do; all of them if empty.
    """
    written = Written()
    label = label_of(model)
    folder = work / label
    folder.mkdir(parents=True)
    common = ["--model", model]
    replaced = {str(folder): "<work>"}
    if model != EMBEDDED:
        if text is None:
            raise SystemExit("--calib-dataset is needed for models other than the embedded one")
        common += ["--calib-dataset", str(text)]
        replaced |= {model: "<model>", str(text): "<text>"}
    for run in runs_of():
        if only and run.name not in only:
            continue
        began = time.perf_counter()
        refusal = write(run, common, folder)
        name = f"{label}/{run.name}"
        if refusal is not None:
            written.refused[name] = _without(refusal, replaced)
        elif run.work and (kept := folder / "work" / "capture").is_dir():
            written.files |= {
                f"{name}/work/capture/{key}": value for key, value in checksums(kept, replaced)
            }
        written.files |= {
            f"{name}/{key}": value for key, value in checksums(folder / run.name, replaced)
        }
        outcome = "written" if refusal is None else f"refused: {refusal.splitlines()[0]}"
        print(f"{name:<52} {time.perf_counter() - began:>6.1f} s  {outcome}", flush=True)
    return written


def write(run: Run, common: list[str], folder: Path) -> str | None:
    """Do one run; the message where it was refused.

    Raises:
        SystemExit: it failed in another way.
    """
    command = [
        sys.executable,
        "-m",
        "exporter.cli",
        *run.arguments,
        "--quiet",
        "--output",
        str(folder / run.name),
    ]
    command += [*common] if "--from-artifact" not in run.needs else []
    command += [part for option, need in run.needs.items() for part in (option, str(folder / need))]
    command += ["--work-dir", str(folder / "work")] if run.work else []
    command += ["--no-verify"] if run.arguments[0] == "export" else []
    environment = os.environ | {
        "OMP_NUM_THREADS": threads(),
        "ROTQ_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    message = done.stderr[done.stderr.find("error:") :].strip()
    if done.returncode not in REFUSED or "error:" not in done.stderr or "Traceback" in done.stderr:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr}")
    return message


def checksums(folder: Path, replaced: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """SHA-256 of every file in ``folder`` by relative path, but for what is volatile."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield (
                path.relative_to(folder).as_posix(),
                hashlib.sha256(content(path, replaced)).hexdigest(),
            )


def content(path: Path, replaced: Mapping[str, str]) -> bytes:
    """The bytes of a file, without what the module's description names as volatile."""
    if path.suffix not in (".json", ".yaml", ".md"):
        return path.read_bytes()
    text = _without(path.read_text(encoding="utf-8"), replaced)
    if path.name not in _JSON:
        return text.encode()
    values = json.loads(text)
    layout = [indent for indent in (1, 2) if json.dumps(values, indent=indent) + "\n" == text]
    for forget in _JSON[path.name]:
        forget(values, path.parent)
    return f"{layout} {json.dumps(values)}".encode()  # in the order of the file


def _without(text: str, replaced: Mapping[str, str]) -> str:
    for old in sorted(replaced, key=len, reverse=True):  # one path may begin with another
        text = text.replace(old, replaced[old])
    return text


def _times(values: dict[str, Any], folder: Path) -> None:
    values["seconds"] = dict.fromkeys(values["seconds"], _VOLATILE)


def _versions(values: dict[str, Any], folder: Path) -> None:
    values["versions"] = dict.fromkeys(values["versions"], _VOLATILE)


def _provenance(values: dict[str, Any], folder: Path) -> None:
    _versions(values["provenance"], folder)


def _sums(values: dict[str, Any], folder: Path) -> None:
    """The files themselves are compared; here only that the report speaks of them."""
    values["checksums"] = {
        name: "fits"
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() == value
        else "does not fit"
        for name, value in values["checksums"].items()
    }


def _seal(values: dict[str, Any], folder: Path) -> None:
    values |= {"rotq": _VOLATILE, "sha256": _VOLATILE}


def _inner_config(values: dict[str, Any], folder: Path) -> None:
    _config(values["config"], folder)


def _config(values: dict[str, Any], folder: Path) -> None:
    if "transformers_version" in values:
        values["transformers_version"] = _VOLATILE
    if "version" in values.get("quantization_config", {}):
        values["quantization_config"]["version"] = _VOLATILE


_JSON: dict[str, tuple[Callable[[dict[str, Any], Path], None], ...]] = {
    "report.json": (_times, _versions, _sums),
    "rotation_report.json": (_times, _versions),
    "quantized_model.json": (_provenance, _inner_config),
    "rotq_bundle.json": (_seal, _inner_config),
    "config.json": (_config,),
    "generation_config.json": (_config,),
}
"""What is volatile in which file."""


def differences(
    before: Mapping[str, Mapping[str, str]], after: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """A line for each file and each refusal that is not the same, with what is wrong with it."""
    found = []
    for part, one in (("files", "file"), ("refused", "refusal")):
        old, new = before[part], after[part]
        for key in sorted({*old, *new}):
            if key not in new:
                found.append(f"{one} gone: {key}")
            elif key not in old:
                found.append(f"{one} new: {key}")
            elif old[key] != new[key]:
                found.append(f"{one} differs: {key}")
    return found


if __name__ == "__main__":
    sys.exit(main())
