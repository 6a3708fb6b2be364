"""``genai_config.json``, with which onnxruntime-genai generates text from a written folder.

It says how the graph calls its inputs and outputs and which tokens end a text. Everything else that
the runtime needs, the tokenizer above all, is among the files of the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.onnx.file_names import GENAI_FILE
from calib.architectures import wiring_of
from calib.artifact import QuantizedModel
from calib.errors import CheckpointError
from calib.files.reading import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_KNOWN_TYPES = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
_PLAIN_DECODER = "llama"
"""For types that onnxruntime-genai does not know, and for GPT-2, of which it expects keys and
values in one tensor. What it takes from the type of a decoder is no more than which inputs there
are, and these are spelled out."""
_INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
_OUTPUTS = {
    "logits": "logits",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}
_SEARCH = (
    "do_sample",
    "min_length",
    "num_beams",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
)
"""Settings that a checkpoint's generation config may give, under the same names."""


_NO_LIMIT = 32768
"""Context of a model whose positions have no limit (ALiBi): onnxruntime-genai wants a number."""


def write_genai_config(
    model: QuantizedModel,
    graph: str,
    folder: Path,
    caches: Collection[tuple[int, int]],
    *,
    shared_buffer: bool = False,
) -> None:
    """Write :data:`GENAI_FILE` for the graph file called ``graph`` into ``folder``; nothing where
    the caches of the graph differ, for which onnxruntime-genai has no words.

    Args:
        model: in the graph.
        graph: name of the file.
        folder: where it lies.
        caches: heads and width of the keys and values of every layer.
        shared_buffer: see :func:`genai_config`.
    """
    if len(set(caches)) != 1:
        return
    content = genai_config(
        model.config,
        _generation(model),
        graph,
        shared_buffer=shared_buffer,
        taken=model.prefix_length,
        cache=next(iter(caches)),
    )
    text = json.dumps(content, indent=2)
    (folder / GENAI_FILE).write_text(text + "\n", encoding="utf-8")


def genai_config(
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    graph: str,
    *,
    shared_buffer: bool = False,
    taken: int = 0,
    cache: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """What onnxruntime-genai reads.

    Args:
        config: Hugging Face config as a dictionary.
        generation: the checkpoint's ``generation_config.json``, or nothing.
        graph: file name of the graph.
        shared_buffer: the graph writes into its past (:mod:`backends.onnx.shared_buffer`). One that
            returns a longer cache cannot do so into the same memory.
        taken: positions that a prefix of the graph takes.
        cache: heads and width of keys and values; by default those of the config.
    """
    network = wiring_of(config).config
    heads = network.num_attention_heads
    context = getattr(network, "max_position_embeddings", _NO_LIMIT) - taken
    kv_heads, width = cache or (
        getattr(network, "num_key_value_heads", None) or heads,
        getattr(network, "head_dim", None) or network.hidden_size // heads,
    )
    search = {name: generation[name] for name in _SEARCH if generation.get(name) is not None}
    kind = config["model_type"]

    return {
        "model": {
            "type": kind if kind in _KNOWN_TYPES else _PLAIN_DECODER,
            "vocab_size": network.vocab_size,
            "context_length": context,
            **_special_tokens(network, generation),
            "decoder": {
                "filename": graph,
                "session_options": {"provider_options": []},
                "hidden_size": network.hidden_size,
                "head_size": width,
                "num_hidden_layers": network.num_hidden_layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "inputs": _INPUTS,
                "outputs": _OUTPUTS,
            },
        },
        "search": {
            "do_sample": False,
            **search,
            "max_length": context,
            "past_present_share_buffer": shared_buffer,
        },
    }


def _special_tokens(network: PretrainedConfig, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Ids by name; the generation config knows all that end a turn, the config often one alone.

    onnxruntime-genai refuses ids outside the vocabulary, which a text cannot hold anyway.
    """
    special: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = generation.get(name)
        value = getattr(network, name, None) if value is None else value
        ids = [
            token
            for token in (value if isinstance(value, list) else [value])
            if _is_token(token, network)
        ]
        if ids:
            special[name] = ids if len(ids) > 1 else ids[0]

    if "pad_token_id" not in special and "eos_token_id" in special:
        eos = special["eos_token_id"]
        special["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    return special


def _is_token(token: object, network: PretrainedConfig) -> bool:
    return isinstance(token, int) and 0 <= token < network.vocab_size


def _generation(model: QuantizedModel) -> Mapping[str, Any]:
    path = model.files.get("generation_config.json")
    settings: dict[str, Any] = {} if path is None else _settings_in(path)
    return settings


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise CheckpointError(
            f"{path.name} of the model is damaged: {error}", hint="download or copy it again"
        ) from error
