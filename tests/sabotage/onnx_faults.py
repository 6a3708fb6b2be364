"""Faults of the ONNX writer, and of its reader alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from tests.sabotage.artifact_faults import row_scaled, rows_zeroed, through_float16
from tests.sabotage.base import Patch, Sabotage, arguments, both, replaced, result

_NODES = "backends.onnx.linear_nodes"
_INT8, _KV, _INT4 = "onnx int8", "onnx int8, kv int8", "onnx int4 weights"
_WEIGHTS = "onnx int8 weights"


def _scales(part: str, factor: float, only: str = "") -> Patch:
    """Scales that are written otherwise."""

    def change(nodes: Any, named: str, tensor: Any, *rest: Any) -> tuple[Any, ...]:
        wrong = named == part and only in nodes.name
        return nodes, named, factor * tensor if wrong else tensor, *rest

    return arguments(_NODES, "LinearNodes.scale", change)


def _stored_weights(change: Callable[[Any], Any], only: str) -> Patch:
    def wrong(nodes: Any, weights: Any, *rest: Any) -> tuple[Any, ...]:
        if only in nodes.name:
            weights = [change(weight.clone()) for weight in weights]
        return nodes, weights, *rest

    return arguments(_NODES, "LinearNodes.weight", wrong)


def _filled(name: str, change: Callable[[Any], Any]) -> Patch:
    def wrong(graph: Any, floats: Mapping[str, Any]) -> tuple[Any, ...]:
        return graph, {
            key: change(tensor.clone()) if key == name else tensor for key, tensor in floats.items()
        }

    return arguments("backends.onnx.write", "fill", wrong)


def _config(**changes: Any) -> Patch:
    """A graph traced from another config."""

    def wrap(original: Any) -> Any:
        return lambda **fields: original(**{**fields, "config": {**fields["config"], **changes}})

    return lambda: replaced("backends.onnx.write", "TraceRequest", wrap)


def _genai(**changes: Any) -> Patch:
    """Other settings for onnxruntime-genai; keys with ``__`` for dots."""

    def wrong(stated: dict[str, Any]) -> dict[str, Any]:
        for key, value in changes.items():
            *path, last = key.split("__")
            inner = stated
            for part in path:
                inner = inner[part]
            inner[last] = value
        return stated

    def wrong_copy(stated: dict[str, Any]) -> dict[str, Any]:
        return wrong(deepcopy(stated))  # parts of it may be constants of the module

    return result("backends.onnx.genai", "genai_config", wrong_copy)


def _softmax(factor: float) -> Patch:
    return result(
        "backends.onnx.attention",
        "attention_placeholders",
        lambda found: [replace(each, scale=factor * each.scale) for each in found],
    )


def _no_bias(nodes: Any, x: Any, weight: Any, bias: Any) -> tuple[Any, ...]:
    return nodes, x, weight, None


def _other_signs(nodes: Any, x: Any, rotation: Any) -> tuple[Any, ...]:
    return nodes, x, replace(rotation, seed=5)


def _unrotated(original: Any) -> Any:
    return lambda nodes, x, rotation: x


def _nibbles_swapped(values: Any, dtype: Any, *rest: Any) -> tuple[Any, ...]:
    if dtype == ir.DataType.INT4:
        values = values.reshape(-1, 2).flip(1).reshape(values.shape)
    return values, dtype, *rest


def _read_swapped(original: Any) -> Any:
    def read(value: Any) -> Any:
        tensor = original(value)
        if value.const_value.dtype == ir.DataType.INT4:
            tensor = tensor.reshape(-1, 2).flip(1).reshape(tensor.shape)
        return tensor

    return read


def _cache_scales(graph: Any, name: str, scale: Any, storage: Any) -> tuple[Any, ...]:
    return graph, name, 1.1 * scale, storage


def _one_step(weight: Any) -> Any:
    weight[0, 0] = weight[0, 0] + 1 if weight[0, 0] < 0 else weight[0, 0] - 1
    return weight


def _last_rows(weight: Any) -> Any:
    weight[-4:] = 0
    return weight


_HEAD, _TABLE = "lm_head", "model.embed_tokens.weight"
ONNX = (
    Sabotage("weight scale", "x 1.02 in a down_proj", _INT8, _scales("weight_scale", 1.02, "down")),
    Sabotage("input scale", "x 1.005", _INT8, _scales("input_scale", 1.005)),
    Sabotage("softmax scale", "x 1.001", _INT8, _softmax(1.001)),
    Sabotage("softmax scale, float", "x 1.001, weight-only", _WEIGHTS, _softmax(1.001)),
    Sabotage(
        "written: biases lost",
        "biases dropped",
        "onnx int8, biases",
        arguments("backends.onnx.lower", "_product", _no_bias),
    ),
    Sabotage(
        "written: cache",
        "scales of the cache x 1.1",
        _KV,
        arguments("backends.onnx.cache", "_quantize", _cache_scales),
    ),
    Sabotage("written: head", "through float16", _INT8, _stored_weights(through_float16, _HEAD)),
    Sabotage("written: row", "an embedding row x 1.05", _INT8, _filled(_TABLE, row_scaled)),
    Sabotage("written: rare rows", "64 rows zeroed", _INT8, _filled(_TABLE, rows_zeroed)),
    Sabotage("written: code", "one weight a step off", _INT8, _stored_weights(_one_step, "up")),
    Sabotage("written: rows", "4 rows zeroed", _WEIGHTS, _stored_weights(_last_rows, "o_proj")),
    Sabotage("eps of norms", "1e-6 becomes 1e-5", _INT8, _config(rms_norm_eps=1e-5)),
    Sabotage(
        "RoPE",
        "theta 10000 becomes 10100",
        _INT8,
        _config(rope_parameters={"rope_type": "default", "rope_theta": 10100.0}),
    ),
    Sabotage("activation", "silu becomes gelu", _INT8, _config(hidden_act="gelu")),
    Sabotage(
        "R4 with signs",
        "signs where none are",
        _INT8,
        arguments("backends.onnx.lower", "rotate", _other_signs),
    ),
    Sabotage(
        "R4 left out",
        "not in the graph",
        _INT8,
        lambda: replaced("backends.onnx.lower", "rotate", _unrotated),
    ),
    Sabotage(
        "nibbles",
        "int4 order swapped in the writer",
        _INT4,
        arguments(_NODES, "_tensor", _nibbles_swapped),
    ),
    Sabotage(
        "nibbles alike",
        "and in the reader",
        _INT4,
        both(
            arguments(_NODES, "_tensor", _nibbles_swapped),
            lambda: replaced("backends.onnx.read", "_tensor", _read_swapped),
        ),
    ),
    Sabotage("genai head_size", "16 becomes 32", _INT8, _genai(model__decoder__head_size=32)),
    Sabotage("genai layers", "one too many", _INT8, _genai(model__decoder__num_hidden_layers=3)),
    Sabotage(
        "genai kv heads", "those of queries", _INT8, _genai(model__decoder__num_key_value_heads=4)
    ),
    Sabotage("genai hidden_size", "doubled", _INT8, _genai(model__decoder__hidden_size=128)),
    Sabotage("genai eos", "another token", _INT8, _genai(model__eos_token_id=7)),
    Sabotage("genai context", "doubled", _INT8, _genai(model__context_length=256)),
    Sabotage("genai file", "another graph", _INT8, _genai(model__decoder__filename="m.onnx")),
    Sabotage(
        "genai names",
        "values called keys",
        _INT8,
        _genai(model__decoder__inputs__past_value_names="past_key_values.%d.key"),
    ),
)


def _side_files(change: Callable[[Any, Any], None]) -> Patch:
    def wrap(original: Any) -> Any:
        def copied(files: Any, folder: Any) -> None:
            original(files, folder)
            change(files, folder)

        return copied

    return lambda: replaced("exporter.reporting.describe", "copy_side_files", wrap)


def _without_tokenizer(files: Any, folder: Any) -> None:
    (folder / "tokenizer.json").unlink()


def _other_tokenizer(files: Any, folder: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b'"model"', b'"model" '))


def _config_file(**changes: Any) -> Patch:
    return result(
        "exporter.reporting.describe", "with_older_keys", lambda config: {**config, **changes}
    )


def _turned_rotations(rotations: Any, *rest: Any) -> tuple[Any, ...]:
    turned = type(rotations)(
        each if each.matrix is None else replace(each, matrix=each.matrix.mT.contiguous())
        for each in rotations.values()
    )
    return turned, *rest


def _unseeded(rotations: Any, *rest: Any) -> tuple[Any, ...]:
    return type(rotations)(
        replace(each, seed=3) if each.online else each for each in rotations.values()
    ), *rest


_SAVE = ("exporter.reporting.describe", "save_rotations")
SIDE_FILES = (
    Sabotage("tokenizer missing", "tokenizer.json", _INT8, _side_files(_without_tokenizer)),
    Sabotage("tokenizer changed", "other bytes", _INT8, _side_files(_other_tokenizer)),
    Sabotage("config: activation", "silu becomes gelu", _INT8, _config_file(hidden_act="gelu")),
    Sabotage("config: vocabulary", "one token less", _INT8, _config_file(vocab_size=2047)),
    Sabotage(
        "rotations turned", "R1 and R2 transposed", _INT8, arguments(*_SAVE, _turned_rotations)
    ),
    Sabotage("rotations with signs", "R4 has a seed", _INT8, arguments(*_SAVE, _unseeded)),
)
