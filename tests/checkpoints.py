"""Small checkpoint folders, as a user would have them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from exporter.source import embedded_folder

VOCABULARY = 2048
"""Of the embedded tokenizer, which the folders carry."""
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def write_checkpoint(folder: Path, config: Any = None, *, seed: int = 0, **changes: Any) -> Path:
    """A random model with the embedded tokenizer; by default a Llama of :data:`TINY` sizes with
    ``changes``.
    """
    torch.manual_seed(seed)
    chosen = config if config is not None else transformers.LlamaConfig(**{**TINY, **changes})
    model = transformers.AutoModelForCausalLM.from_config(chosen)
    with torch.no_grad():
        for parameter in model.parameters():
            # gains and biases that are not 1 and 0
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded_folder() / name, folder / name)
    return folder
