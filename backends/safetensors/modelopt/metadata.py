"""``hf_quant_config.json`` and the ``quantization_config`` of ``config.json`` read back, against
the tensors that a reader of the stated format would look for.

What each ``quant_algo`` stores is spelled out here once more, as its readers have it (vLLM's
``modelopt.py``, TensorRT-LLM's ``linear.py``), and not taken from the tables of the writer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from backends.safetensors.file_names import CONFIG_FILE, QUANT_CONFIG_FILE, WEIGHTS_FILE
from backends.safetensors.names import Names
from backends.safetensors.read import Bundle
from calib.artifact import QuantizedModel
from calib.files.reading import read_json, reason_of
from calib.schemes import FLOAT4, INT4


@dataclass(frozen=True)
class _Stored:
    """What a format stores of a linear."""

    weight: str
    """Dtype of ``weight``."""
    scale: str
    """Dtype of ``weight_scale``."""
    rank: int
    """Of ``weight_scale``."""
    input_scale: bool = False
    second: bool = False
    """Whether there is a ``weight_scale_2``."""
    bits: tuple[int, str] = (8, "int")
    """``num_bits`` and ``type`` of the weights."""
    inputs: tuple[int, str] | None = None
    """The same of the inputs."""


_FORMATS = {
    "FP8": _Stored(
        "float8_e4m3fn", "float32", 0, input_scale=True, bits=(8, "float"), inputs=(8, "float")
    ),
    "FP8_PER_CHANNEL_PER_TOKEN": _Stored(
        "float8_e4m3fn", "float32", 1, bits=(8, "float"), inputs=(8, "float")
    ),
    "W8A8_SQ_PER_CHANNEL": _Stored("int8", "float32", 1, input_scale=True, inputs=(8, "int")),
    "W8A16": _Stored("int8", "float32", 1),
    "W4A16_AWQ": _Stored("uint8", "float32", 2, bits=(4, "int")),
    "W4A8_AWQ": _Stored(
        "uint8", "float32", 2, True, second=True, bits=(4, "float"), inputs=(8, "float")
    ),
    "NVFP4": _Stored(
        "uint8", "float8_e4m3fn", 2, True, second=True, bits=(4, "float"), inputs=(4, "float")
    ),
    "W4A16_NVFP4": _Stored("uint8", "float8_e4m3fn", 2, second=True, bits=(4, "float")),
    "MXFP8": _Stored("float8_e4m3fn", "uint8", 2, bits=(8, "float"), inputs=(8, "float")),
}


def contradictions(bundle: Bundle, model: QuantizedModel) -> Mapping[str, Sequence[str]]:
    """See :meth:`backends.safetensors.targets.Target.contradictions`."""
    found: dict[str, list[str]] = {WEIGHTS_FILE: list(_nibbles(bundle, model))}
    try:
        config = read_json(bundle.folder / CONFIG_FILE)
        found[CONFIG_FILE] = []
        if model.linears:
            quantization = read_json(bundle.folder / QUANT_CONFIG_FILE)["quantization"]
            found[QUANT_CONFIG_FILE] = list(_of_quantization(quantization, bundle, model))
            section = config["quantization_config"]
            found[CONFIG_FILE] += _of_section(section, quantization, model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found.setdefault(QUANT_CONFIG_FILE, []).append(f"cannot be read: {reason_of(error)}")
    return found


def _of_quantization(
    stated: Mapping[str, Any], bundle: Bundle, model: QuantizedModel
) -> Iterator[str]:
    names = Names.of(model.config)
    excluded = stated.get("exclude_modules", ())
    layers = stated.get("quantized_layers")
    for name in model.linears:
        for module in names.modules(name):
            # experts are one entry
            entry = stated if layers is None else _entry_of(layers, module)
            if any(fnmatchcase(module, pattern) for pattern in excluded):
                yield f"'exclude_modules' names '{module}', which is quantized"
            elif entry is None:
                yield f"'quantized_layers' lacks '{module}'"
            else:
                yield from _of_linear(entry, module, bundle)
    if layers is None:
        for name in model.kept.keys() - names.experts.keys():
            module = names.published(name)
            if not any(fnmatchcase(module, pattern) for pattern in excluded):
                yield f"'exclude_modules' lacks '{module}', which is in float"
    cache = stated.get("kv_cache_quant_algo")
    if cache != (None if model.cache is None else "FP8"):
        yield f"'kv_cache_quant_algo' is {cache!r}"


def _entry_of(layers: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    return next(
        (layers[name] for name in layers if module == name or module.startswith(f"{name}.")), None
    )


def _of_linear(entry: Mapping[str, object], module: str, bundle: Bundle) -> Iterator[str]:
    algorithm, tensors = entry.get("quant_algo"), bundle.manifest.tensors
    stored = _FORMATS.get(str(algorithm))
    weight, scale = tensors.get(f"{module}.weight"), tensors.get(f"{module}.weight_scale")
    if stored is None or weight is None or scale is None:
        yield f"'quant_algo' of '{module}' is {algorithm!r}, and its weight and scale are not that"
        return
    if (weight.dtype, scale.dtype, len(scale.shape)) != (stored.weight, stored.scale, stored.rank):
        yield (
            f"'quant_algo' of '{module}' is {algorithm!r}, and it holds {weight.dtype} with scales"
            f" in {scale.dtype} of rank {len(scale.shape)}"
        )
        return
    for part, wanted in (("input_scale", stored.input_scale), ("weight_scale_2", stored.second)):
        if (f"{module}.{part}" in tensors) != wanted:
            yield f"'quant_algo' of '{module}' is {algorithm!r}, {part}: {not wanted}"
    size = entry.get("group_size")
    if stored.rank == 2 and stored.weight != "float8_e4m3fn":
        # packed by two: along the outputs (AWQ) or the inputs (NVFP4)
        width = weight.shape[1] * (2 if stored.scale == "float8_e4m3fn" else 1)
        if size != width // scale.shape[1]:
            yield f"'group_size' of '{module}' is {size} instead of {width // scale.shape[1]}"


def _of_section(
    section: Mapping[str, Any], stated: Mapping[str, Any], model: QuantizedModel
) -> Iterator[str]:
    """``quantization_config`` says in other words what ``hf_quant_config.json`` does."""
    if section.get("quant_algo") != stated["quant_algo"]:
        yield f"'quant_algo' is {section.get('quant_algo')!r} instead of {stated['quant_algo']!r}"
    if section.get("quant_method") != "modelopt":
        yield f"'quant_method' is {section.get('quant_method')!r} instead of 'modelopt'"
    if sorted(section.get("ignore", ())) != sorted(stated.get("exclude_modules", ())):
        yield "'ignore' is not the 'exclude_modules' of hf_quant_config.json"
    if (section.get("kv_cache_scheme") is None) != (model.cache is None):
        yield f"'kv_cache_scheme' is {section.get('kv_cache_scheme')!r}"
    stored = _FORMATS.get(str(stated["quant_algo"]))
    if stored is None:  # of several formats, or one that is complained of already
        return
    for name, group in section.get("config_groups", {}).items():
        for part, numbers in (("weights", stored.bits), ("input_activations", stored.inputs)):
            found = group.get(part)
            if (None if found is None else (found["num_bits"], found["type"])) != numbers:
                yield f"'{part}' of '{name}' are {found}"


def _nibbles(bundle: Bundle, model: QuantizedModel) -> Iterator[str]:
    """Two values a byte, the first in the low half: of INT4 two outputs, of E2M1 two inputs."""
    names = Names.of(model.config)
    for name, linear in model.linears.items():
        if linear.weight_scheme.format not in (INT4, FLOAT4) or names.parameter(name):
            continue
        (module,) = names.modules(name)
        codes = linear.weight[:2].to(torch.int16) % 16
        stored = bundle.tensors[f"{module}.weight"]
        if linear.weight_scheme.format == INT4:
            same = torch.equal(stored[0].to(torch.int16), codes[0] + 16 * codes[1])
        else:
            same = torch.equal(stored[:2].to(torch.int16), codes[:, 0::2] + 16 * codes[:, 1::2])
        if not same:
            yield f"the four-bit values of '{module}' are not in the order of the layout"
