"""``genai_config.json`` read back: against the inputs and outputs of the graph that it describes,
and the model.

Sizes are taken from the graph's own shapes, not from where the writer took them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from backends.onnx.feeds import CACHE
from backends.onnx.file_names import GENAI_FILE, MODEL_FILE
from backends.onnx.files import read_proto
from backends.stated import differing
from calib.architectures import wiring_of
from calib.artifact import QuantizedModel
from calib.files.reading import read_json, reason_of

_KEY_INPUT = "past_key_values.0.key"
_GENERATION_FILE = "generation_config.json"


def genai_contradictions(folder: Path, model: QuantizedModel) -> list[str]:
    """What ``genai_config.json`` in ``folder`` states otherwise than it is.

    Raises:
        BackendError: the graph is missing or damaged.
    """
    graph = read_proto(folder / MODEL_FILE).graph
    caches = {tuple(_shape(value)[1::2]) for value in graph.input if value.name.startswith(CACHE)}
    if len(caches) > 1 and not (folder / GENAI_FILE).exists():
        return []  # onnxruntime-genai has no words for it
    try:
        stated = read_json(folder / GENAI_FILE)
        generation_file = folder / _GENERATION_FILE
        generation = read_json(generation_file) if generation_file.is_file() else {}
    except (OSError, ValueError) as error:
        return [f"cannot be read: {reason_of(error)}"]
    return [
        *differing(stated, _sizes(graph, model)),
        *_names(stated, graph, model),
        *_ends(stated, generation, model),
    ]


def _sizes(graph: onnx.GraphProto, model: QuantizedModel) -> dict[str, Any]:
    """What is certain of the sizes; a dimension that the graph leaves open is not."""
    wiring = wiring_of(model.config)
    table = wiring.embeddings[0]
    embedding = (
        model.linears[table.name].weight
        if table.name in model.linears
        else model.floats[table.weight]
    )
    certain: dict[str, Any] = {
        "model.decoder.filename": MODEL_FILE,
        "model.decoder.num_attention_heads": wiring.config.num_attention_heads,
        "model.decoder.num_hidden_layers": len(wiring.layers),
        "model.decoder.hidden_size": embedding.shape[1],
    }
    positions = getattr(wiring.config, "max_position_embeddings", None)
    if positions is not None:  # they may have no limit
        room = positions - model.prefix_length
        certain |= {"model.context_length": room, "search.max_length": room}
    shapes = {value.name: _shape(value) for value in (*graph.input, *graph.output)}
    from_graph = {"model.vocab_size": shapes.get("logits", [0])[-1]}
    if _KEY_INPUT in shapes:
        _, heads, _, size = shapes[_KEY_INPUT]
        from_graph["model.decoder.num_key_value_heads"] = heads
        from_graph["model.decoder.head_size"] = size
    return certain | {key: size for key, size in from_graph.items() if size}


def _names(
    stated: Mapping[str, Any], graph: onnx.GraphProto, model: QuantizedModel
) -> Iterator[str]:
    """Inputs and outputs of the graph that no name leads to."""
    decoder = stated.get("model", {}).get("decoder", {})
    layers = wiring_of(model.config).layers
    for kind, values in (("inputs", graph.input), ("outputs", graph.output)):
        patterns = decoder.get(kind, {}).values()
        named = {
            pattern.replace("%d", str(layer))
            for pattern in patterns
            for layer in (layers if "%d" in pattern else (0,))
        }
        for value in values:
            if value.name not in named:
                yield f"no name among 'model.decoder.{kind}' leads to '{value.name}'"


def _ends(
    stated: Mapping[str, Any], generation: Mapping[str, object], model: QuantizedModel
) -> Iterator[str]:
    """Tokens that end a text: those of the generation config, or else of the config."""
    config = wiring_of(model.config).config
    ends = generation.get("eos_token_id")
    ends = getattr(config, "eos_token_id", None) if ends is None else ends
    known = [token for token in _listed(ends) if 0 <= token < config.vocab_size]
    found = _listed(stated.get("model", {}).get("eos_token_id"))
    if known != found:
        yield f"'model.eos_token_id' is {found} instead of {known}"


def _listed(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    """Sizes; 0 where one is open."""
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]
