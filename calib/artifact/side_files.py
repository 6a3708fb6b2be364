"""The files of a checkpoint that every output carries along: config, tokenizer, generation config.
Imports no torch.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files of a checkpoint folder that every output carries, where they exist."""
_OF_THE_MODEL = ("config.json", "generation_config.json")
_CLASS = re.compile(rb'("tokenizer_class"\s*:\s*")TokenizersBackend(")')


def side_files(folder: Path) -> dict[str, Path]:
    """The :data:`SIDE_FILES` that exist in ``folder``."""
    return {name: folder / name for name in SIDE_FILES if (folder / name).is_file()}


def tokenizer_files(files: Mapping[str, Path]) -> dict[str, Path]:
    """Those of ``files`` that a tokenizer is read from, sorted by name."""
    return {name: path for name, path in sorted(files.items()) if name not in _OF_THE_MODEL}


def copy_side_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy ``files`` into ``folder`` under their own names, for readers of transformers 4 as well:
    it knows the tokenizer class that version 5 writes by its former name only, as 5 does.
    """
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
        if name == "tokenizer_config.json":
            _spell_older(folder / name)


def _spell_older(path: Path) -> None:
    text = path.read_bytes()
    older = _CLASS.sub(rb"\1PreTrainedTokenizerFast\2", text)
    if older != text:
        path.write_bytes(older)
