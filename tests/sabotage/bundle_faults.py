"""Faults of the writers of bundles, and of their readers alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tests.sabotage.base import Patch, Sabotage, both, replaced, result

_TRT, _TRIPY, _TRIPY4 = "tensorrt w4a8", "tripy int8", "tripy int4 weights"
_OPT, _OPT4 = "modelopt float8", "modelopt int4 weights"
_VLLM = "vllm int8"
_CT, _CT4 = "transformers int8", "transformers int4 weights"
_TENSORRT = "backends.safetensors.tensorrt.layout"
_MODELOPT = "backends.safetensors.modelopt"
_COMPRESSED = "backends.safetensors.compressed_tensors"


def _rotation(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Patch:
    return result("backends.safetensors.source", "_rotation_tensors", change)


def _one_sign(tensors: dict[str, Any]) -> dict[str, Any]:
    signs = tensors["signs"].clone()
    signs[3] *= -1
    return {**tensors, "signs": signs}


def _turned_factor(tensors: dict[str, Any]) -> dict[str, Any]:
    turned = {key: each.T.contiguous() for key, each in tensors.items() if key != "signs"}
    turned["factors.0"] = turned["factors.0"].flip(0)
    return {**tensors, **turned}


def _entries(module: str, path: str, change: Callable[[Any], Any]) -> Patch:
    """Entries of a layout that are written otherwise."""

    def wrap(original: Any) -> Any:
        return lambda *args, **kwargs: (change(entry) for entry in original(*args, **kwargs))

    return lambda: replaced(module, path, wrap)


def _scaled(part: str, factor: float) -> Callable[[Any], Any]:
    def change(entry: Any) -> Any:
        if not entry.key.endswith(part):
            return entry
        read = entry.read
        return replace(entry, read=lambda: (factor * read().float()).to(entry.dtype))

    return change


def _renamed(entry: Any) -> Any:
    return replace(entry, key=_other(entry.key))


def _other(key: str) -> str:
    return key.replace(".weight_scale", ".scale_of_weight")


class _Renamed(Mapping[str, Any]):
    """Tensors under the names that a reader with the same fault looks for."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors = {_back(key): key for key in tensors}
        self.read = tensors

    def __getitem__(self, key: str) -> Any:
        return self.read[self.tensors[key]]

    def __iter__(self) -> Any:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _back(key: str) -> str:
    return key.replace(".scale_of_weight", ".weight_scale")


def _names_alike(module: str, layout: str) -> Patch:
    def reading(original: Any) -> Any:
        return lambda self, tensors, *rest: original(self, _Renamed(tensors), *rest)

    return both(
        _entries(module, f"{layout}.entries", _renamed),
        lambda: replaced(module, f"{layout}.linears", reading),
        lambda: replaced(module, f"{layout}.floats", reading),
    )


def _swapped(packed: Any) -> Any:
    return (packed << 4) | (packed >> 4)


def _of_swapped(original: Any) -> Any:
    return lambda packed, *args, **kwargs: original(_swapped(packed), *args, **kwargs)


def _texts(module: str, layout: str, file: str, change: Callable[[Any], None]) -> Patch:
    """A text file of a layout that says otherwise."""

    def wrong(files: Mapping[str, str]) -> Mapping[str, str]:
        stated = json.loads(files[file])
        change(stated)
        return {**files, file: json.dumps(stated)}

    return result(module, f"{layout}.files", wrong)


def _statement(key: str, value: Any) -> Patch:
    def change(stated: Any) -> None:
        for each in stated["linears"].values():
            each[key] = value

    return _texts("backends.safetensors.tripy.layout", "TripyLayout", "tripy.json", change)


def _quantization(key: str, value: Any) -> Patch:
    return _texts(
        f"{_MODELOPT}.layout",
        "ModelOptLayout",
        "hf_quant_config.json",
        lambda stated: stated["quantization"].update({key: value}),
    )


def _section(layout: str, change: Callable[[Any], None]) -> Patch:
    module, name = (
        (f"{_MODELOPT}.layout", "ModelOptLayout")
        if layout == "modelopt"
        else (f"{_COMPRESSED}.layout", "CompressedTensorsLayout")
    )
    return _texts(module, name, "config.json", change)


def _group(part: str, **values: Any) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        for group in config["quantization_config"]["config_groups"].values():
            group[part].update(values)

    return change


def _set(**values: Any) -> Callable[[Any], None]:
    return lambda config: config["quantization_config"].update(values)


def _manifest(**values: Any) -> Patch:
    return result(
        "backends.safetensors.bundle",
        "_manifest",
        lambda manifest: manifest.model_copy(update=values),
    )


def _transform(change: Callable[[dict[str, Any]], None]) -> Patch:
    """A group of ``transform_config`` that says otherwise."""

    def wrong(config: Any) -> None:
        for group in config["quantization_config"]["transform_config"]["config_groups"].values():
            change(group)

    return _texts(f"{_COMPRESSED}.layout", "CompressedTensorsLayout", "config.json", wrong)


def _matrix(change: Callable[[Any], Any]) -> Patch:
    """The matrix of a transform stored otherwise."""

    def wrong(entry: Any) -> Any:
        found = change(entry.read())
        return replace(entry, shape=tuple(found.shape), read=lambda: found)

    return result(f"{_COMPRESSED}.transforms", "Transform.entry", wrong)


def _one_sign_of_block(matrix: Any) -> Any:
    matrix[3, 5] *= -1
    return matrix


def _one_target_less(group: dict[str, Any]) -> None:
    group["apply"][0]["targets"].pop()


def _float_norms(stated: Any) -> None:
    stated["norm_dtype"] = "float16"


BUNDLES = (
    Sabotage("tensorrt signs", "one sign of R4", _TRT, _rotation(_one_sign)),
    Sabotage("tripy signs", "one sign of R4", _TRIPY, _rotation(_one_sign)),
    Sabotage("tensorrt factors", "another matrix", _TRT, _rotation(_turned_factor)),
    Sabotage("tripy factors", "another matrix", _TRIPY, _rotation(_turned_factor)),
    Sabotage("tripy axis", "1 for 0", _TRIPY, _statement("axis", 1)),
    Sabotage("tripy dtype", "float8 for int8", _TRIPY, _statement("quant_dtype", "float8")),
    Sabotage("tripy input", "inputs in float", _TRIPY, _statement("input_dtype", None)),
    Sabotage("tripy blocks", "32 for 16", _TRIPY4, _statement("block_size", 32)),
    Sabotage("tripy turned", "out, in", _TRIPY4, _statement("orientation", "out, in")),
    Sabotage(
        "tripy norms",
        "float16 for float32",
        _TRIPY,
        _texts("backends.safetensors.tripy.layout", "TripyLayout", "tripy.json", _float_norms),
    ),
    Sabotage(
        "tripy input scale",
        "x 1.005",
        _TRIPY,
        _entries(
            "backends.safetensors.tripy.layout",
            "TripyLayout.entries",
            _scaled(".input_scale", 1.005),
        ),
    ),
    Sabotage(
        "tensorrt weight scale",
        "x 1.02",
        _TRT,
        _entries(_TENSORRT, "TensorRTLayout.entries", _scaled(".weight_scale", 1.02)),
    ),
    Sabotage(
        "tensorrt nibbles alike",
        "in writer and reader",
        _TRT,
        both(
            _entries(
                _TENSORRT,
                "_linear_entries",
                lambda entry: (
                    replace(entry, read=lambda read=entry.read: _swapped(read()))
                    if entry.kind == "quantized weight"
                    else entry
                ),
            ),
            lambda: replaced(_TENSORRT, "unpack", _of_swapped),
        ),
    ),
    Sabotage(
        "modelopt nibbles alike",
        "in writer and reader",
        _OPT4,
        both(
            result(f"{_MODELOPT}.tensors", "_pairs_of_rows", _swapped),
            lambda: replaced(f"{_MODELOPT}.tensors", "_unpacked", _of_swapped),
        ),
    ),
    Sabotage(
        "compressed nibbles alike",
        "in writer and reader",
        _CT4,
        both(
            result(f"{_COMPRESSED}.packing", "pack_nibbles", _swapped),
            lambda: replaced(f"{_COMPRESSED}.packing", "unpack_nibbles", _of_swapped),
        ),
    ),
    Sabotage(
        "modelopt names alike",
        "weight_scale called otherwise",
        _OPT,
        _names_alike(f"{_MODELOPT}.layout", "ModelOptLayout"),
    ),
    Sabotage(
        "compressed names alike",
        "weight_scale called otherwise",
        _CT,
        _names_alike(f"{_COMPRESSED}.layout", "CompressedTensorsLayout"),
    ),
    Sabotage(
        "tripy names alike",
        "weight_scale called otherwise",
        _TRIPY,
        _names_alike("backends.safetensors.tripy.layout", "TripyLayout"),
    ),
    Sabotage(
        "tensorrt names alike",
        "weight_scale called otherwise",
        _TRT,
        _names_alike(_TENSORRT, "TensorRTLayout"),
    ),
    Sabotage("quant_algo", "NVFP4 for FP8", _OPT, _quantization("quant_algo", "NVFP4")),
    Sabotage("group_size", "128 for 16", _OPT4, _quantization("group_size", 128)),
    Sabotage("exclude_modules", "empty", _OPT, _quantization("exclude_modules", [])),
    Sabotage("kv_cache_quant_algo", "FP8", _OPT, _quantization("kv_cache_quant_algo", "FP8")),
    Sabotage(
        "config quant_algo", "NVFP4 for FP8", _OPT, _section("modelopt", _set(quant_algo="NVFP4"))
    ),
    Sabotage("config bits", "4 for 8", _OPT, _section("modelopt", _group("weights", num_bits=4))),
    Sabotage(
        "compressed bits", "4 for 8", _CT, _section("compressed", _group("weights", num_bits=4))
    ),
    Sabotage(
        "compressed dynamic",
        "static inputs called dynamic",
        _CT,
        _section("compressed", _group("input_activations", dynamic=True)),
    ),
    Sabotage(
        "compressed blocks",
        "32 for 16",
        _CT4,
        _section("compressed", _group("weights", group_size=32)),
    ),
    Sabotage("vllm signs", "one sign of R4's block", _VLLM, _matrix(_one_sign_of_block)),
    Sabotage("vllm sign", "R4's block negated", _VLLM, _matrix(lambda matrix: -matrix)),
    Sabotage("vllm size", "half of R4's block", _VLLM, _matrix(lambda each: each[:16, :16])),
    Sabotage(
        "vllm head_dim", "16 for 32", _VLLM, _transform(lambda group: group.update(head_dim=16))
    ),
    Sabotage("vllm targets", "one layer not named", _VLLM, _transform(_one_target_less)),
    Sabotage(
        "vllm location",
        "outputs for inputs",
        _VLLM,
        _transform(lambda group: group["apply"][0].update(location="output")),
    ),
    Sabotage(
        "vllm transforms",
        "none stated",
        _VLLM,
        _section("compressed", _set(transform_config={})),
    ),
    Sabotage("compressed ignore", "empty", _CT, _section("compressed", _set(ignore=[]))),
    Sabotage("manifest dtype", "float16", _TRT, _manifest(dtype="float16")),
    Sabotage("manifest scheme", "int8", _TRT, _manifest(scheme="int8")),
    Sabotage("manifest fingerprint", "another model", _TRT, _manifest(fingerprint="0" * 64)),
)
