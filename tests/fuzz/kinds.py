"""The kinds of input: where each begins, which of its files are changed and how, and who reads
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from random import Random

from tests.fuzz import readers, repairs
from tests.fuzz.graphs import mutate_onnx
from tests.fuzz.mutations import (
    mutate_bytes,
    mutate_file,
    mutate_json,
    mutate_lines,
    mutate_safetensors,
)
from tests.fuzz.pickles import mutate_pickle
from tests.fuzz.plugins import mutate_plugin
from tests.fuzz.pristine import BUNDLES
from tests.fuzz.recipes import mutate_yaml
from tests.fuzz.tabular import mutate_parquet

Mutate = Callable[[bytes, Random], bytes]

BY_NAME: Mapping[str, Mutate] = {
    "*.safetensors": mutate_safetensors,
    "*.jsonl": mutate_lines,
    "*.json": mutate_json,
    "*.yaml": mutate_yaml,
    "*.onnx": mutate_onnx,
    "*.pt": mutate_pickle,
    "*.bin": mutate_pickle,
    "*.parquet": mutate_parquet,
    "*_backend.py": mutate_plugin,
    "*": mutate_bytes,
}


@dataclass(frozen=True)
class Kind:
    """One kind of input."""

    name: str
    folder: str
    """The pristine one."""
    files: tuple[str, ...]
    """Patterns of the files that are changed."""
    read: Callable[[Path], object]
    repair: Callable[[Path], object] = repairs.none
    """Makes checksums fit again, most of the time."""
    starts: bool = False
    """Whether reading it may start programs."""
    writes: bool = False
    """Whether reading it changes the folder, so that a failure cannot be made smaller in it."""
    needs: str = ""
    """A package that has to be installed."""
    mutate: Mapping[str, Mutate] = field(default_factory=lambda: BY_NAME)

    def matching(self, folder: Path) -> list[str]:
        """Names of the files in ``folder`` that are changed, sorted."""
        names = [
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        ]
        return sorted(
            name for name in names if any(fnmatchcase(name, pattern) for pattern in self.files)
        )

    def change(self, path: Path, rng: Random) -> None:
        """Damage the file at ``path``. What held it open keeps the old one."""
        if mutate_file(path, rng):
            return
        way = next(way for pattern, way in self.mutate.items() if fnmatchcase(path.name, pattern))
        changed = way(path.read_bytes(), rng)
        path.unlink()
        path.write_bytes(changed)


def _bundle(target: str) -> Kind:
    return Kind(
        f"bundle {target}",
        f"bundle-{target}",
        ("*.json", "*.safetensors"),
        readers.bundle(target),
        repairs.bundle,
    )


KINDS: tuple[Kind, ...] = (
    Kind("recipe", "recipe", ("recipe.yaml",), readers.recipe),
    Kind("config.json", "model", ("config.json",), readers.config),
    Kind("safetensors", "model", ("model.safetensors",), readers.weights),
    Kind("shards and index", "sharded", ("*.safetensors", "*.index.json"), readers.weights),
    Kind("generation config", "model", ("generation_config.json",), readers.network),
    Kind(
        "tokenizer",
        "model",
        ("tokenizer*.json", "special_tokens_map.json", "chat_template.jinja"),
        readers.tokenizer,
    ),
    Kind("text", "text", ("*.txt", "*.jsonl", "*.json", "*.csv", "*.gz"), readers.text),
    Kind("parquet", "text", ("*.parquet",), readers.parquet, needs="pyarrow"),
    Kind("rotations", "rotations", ("*",), readers.rotations, repairs.sealed("rotations.json")),
    Kind("r1.pt, r2.pt, R.bin", "pickles", ("*.pt", "*.bin"), readers.pickles),
    Kind("capture", "capture", ("*",), readers.capture, repairs.sealed("manifest.json")),
    Kind(
        "artifact",
        "artifact",
        ("*.json", "*.safetensors"),
        readers.artifact,
        repairs.sealed("quantized_model.json", "rotations.json"),
    ),
    Kind("prefix", "prefix", ("*",), readers.prefix, repairs.sealed("prefix.json")),
    Kind(
        "report",
        "export",
        ("report.json", "rotq.yaml", "README.md"),
        readers.report,
        writes=True,
    ),
    Kind("rotq_files.json", "layerwise", ("rotq_files.json",), readers.listing, writes=True),
    Kind(
        "work folder",
        "layerwise",
        ("journal.json", "shards/*", "rotq.yaml", "inputs.json", "rotq.lock*"),
        readers.work,
        writes=True,
    ),
    Kind("ONNX graph", "export", ("model.onnx", "model.onnx.data"), readers.graph),
    *map(_bundle, BUNDLES),
    Kind("cache entries", "cache", ("*.trace", "*.json"), readers.cache, repairs.entries),
    Kind("plugins", "plugins", ("*/*", "*.py"), readers.plugins, starts=True),
    Kind(
        "command line",
        "all",
        ("*.json", "*.yaml", "*.safetensors", "*.onnx", "*.onnx.data", "*.pt", "*.jsonl"),
        readers.command_line,
        repairs.everything,
        starts=True,
        writes=True,
    ),
)
"""Everything that rotq reads and somebody else may have written."""


def kind_named(name: str) -> Kind:
    """The kind called ``name``."""
    return next(kind for kind in KINDS if kind.name == name)
