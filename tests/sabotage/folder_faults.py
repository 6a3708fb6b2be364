"""Folders that were good when they were exported and were changed after it, with all checksums made
to fit: what somebody does who edits them with a tool of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calib.files.sealed import digest, seal_of
from exporter.output import sha256_tree
from exporter.reporting.report import REPORT_FILE
from tests.sabotage.base import Sabotage
from tests.sealing import edit_sealed, flipped

_MANIFEST, _ROTATIONS = "rotq_bundle.json", "rotations.json"


def reseal(folder: Path) -> None:
    """Make every checksum in ``folder`` fit what it holds."""
    if (folder / _ROTATIONS).is_file():
        edit_sealed(folder / _ROTATIONS, lambda values: None)
    manifest = folder / _MANIFEST
    if manifest.is_file():
        values = json.loads(manifest.read_text(encoding="utf-8"))
        values.pop("sha256")
        for name in values["files"]:
            if (folder / name).is_file():
                size = (folder / name).stat().st_size
                values["files"][name] = {"sha256": digest(folder / name), "bytes": size}
        manifest.write_text(json.dumps({**values, "sha256": seal_of(values)}), encoding="utf-8")
    report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    (folder / REPORT_FILE).unlink()
    report.pop("sha256")
    report["checksums"] = sha256_tree(folder)
    sealed = {**report, "sha256": seal_of(report)}
    (folder / REPORT_FILE).write_text(json.dumps(sealed), encoding="utf-8")


def _json(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        change(values)
        (folder / name).write_text(json.dumps(values), encoding="utf-8")

    return damage


def _flip(name: str, where: float = 0.5) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(flipped(data, int(len(data) * where), 3))

    return damage


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _first_linear(manifest: Any) -> None:
    first = next(iter(manifest["linears"].values()))
    first["input"]["dynamic"] = not first["input"]["dynamic"]


def _moved(index: Any) -> None:
    index["weight_map"][next(iter(index["weight_map"]))] = "other.safetensors"


def _edited_seed(folder: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        for each in values["rotations"]:
            if each["online"]:
                each["seed"] = 11

    edit_sealed(folder / _ROTATIONS, change)


def _passed(folder: Path) -> None:
    """A folder whose weights are wrong says that it passed."""
    _flip("model.onnx.data")(folder)
    _json(REPORT_FILE, lambda report: report.update(status="passed"))(folder)


_INT8, _TRIPY, _OPT, _CT = "onnx int8", "tripy int8", "modelopt float8", "transformers int8"
_DECODER = "genai_config.json"
FOLDERS = (
    Sabotage("a byte of weights", "flipped", _INT8, damage=_flip("model.onnx.data")),
    Sabotage("a byte of the table", "flipped", _INT8, damage=_flip("model.onnx.data", 0.05)),
    Sabotage("a byte of a bundle", "flipped", _TRIPY, damage=_flip("model.safetensors")),
    Sabotage("a byte of modelopt", "flipped", _OPT, damage=_flip("model.safetensors", 0.9)),
    Sabotage(
        "genai edited",
        "head_size",
        _INT8,
        damage=_json(_DECODER, lambda stated: stated["model"]["decoder"].update(head_size=8)),
    ),
    Sabotage("genai gone", "no file", _INT8, damage=_remove(_DECODER)),
    Sabotage("tokenizer gone", "no file", _INT8, damage=_remove("tokenizer.json")),
    Sabotage("tokenizer edited", "a byte", _CT, damage=_flip("tokenizer.json")),
    Sabotage(
        "config edited",
        "rms_norm_eps",
        _INT8,
        damage=_json("config.json", lambda config: config.update(rms_norm_eps=1e-3)),
    ),
    Sabotage(
        "tripy.json edited",
        "axis",
        _TRIPY,
        damage=_json(
            "tripy.json",
            lambda stated: [each.update(axis=1) for each in stated["linears"].values()],
        ),
    ),
    Sabotage(
        "quant_algo edited",
        "hf_quant_config.json",
        _OPT,
        damage=_json(
            "hf_quant_config.json", lambda stated: stated["quantization"].update(quant_algo="W8A16")
        ),
    ),
    Sabotage(
        "config groups edited",
        "num_bits",
        _CT,
        damage=_json(
            "config.json",
            lambda config: [
                each["weights"].update(num_bits=4)
                for each in config["quantization_config"]["config_groups"].values()
            ],
        ),
    ),
    Sabotage("manifest edited", "a linear", _TRIPY, damage=_json(_MANIFEST, _first_linear)),
    Sabotage(
        "index edited",
        "a tensor elsewhere",
        _TRIPY,
        damage=_json("model.safetensors.index.json", _moved),
    ),
    Sabotage("rotations edited", "a seed", _INT8, damage=_edited_seed),
    Sabotage("said to have passed", "with wrong weights", _INT8, damage=_passed),
)
