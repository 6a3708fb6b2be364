"""Writing a bundle: a plan of shards from what the layout announces, then shard by shard, then the
manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory

from backends.base import WriteOptions
from backends.safetensors.file_names import INDEX_FILE, MAX_SHARD_BYTES, PREFIX_FILES
from backends.safetensors.layout import Entry, Layout
from backends.safetensors.manifest import (
    FORMAT_VERSION,
    CacheEntry,
    FileEntry,
    Manifest,
    TensorEntry,
    dtype_name,
)
from backends.safetensors.tensor_file import write_tensors
from calib.artifact import QuantizedModel, save_prefix
from calib.files.sealed import digest
from calib.rotations.files import MANIFEST as ROTATIONS_MANIFEST
from calib.rotations.files import TENSORS as ROTATIONS_TENSORS
from calib.rotations.files import save_rotations
from calib.schemes import tensor_scheme_to_dict

ROTATION_FILES = (ROTATIONS_MANIFEST, ROTATIONS_TENSORS)
_PATTERN = "model{suffix}.safetensors"


def write_bundle(
    model: QuantizedModel, layout: Layout, folder: Path, options: WriteOptions
) -> None:
    """Write ``model`` into the empty, existing ``folder``, as ``layout`` has it; only the tensor at
    hand is held.

    Raises:
        ValueError: the layout gives a key twice, or a tensor that is not what it announced.
    """
    entries = _unique(layout.entries(model))
    plan = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern=_PATTERN,
        max_shard_size=options.max_shard_bytes or MAX_SHARD_BYTES,
    )
    done = 0

    def written() -> None:
        nonlocal done
        done += 1
        options.progress("write", done, len(entries))

    checksums = {
        name: write_tensors(folder / name, [entries[key] for key in keys], written)
        for name, keys in plan.filename_to_tensors.items()
    }
    # Also for a single shard: vLLM loads every *.safetensors of a folder without an index,
    # rotations included.
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    texts = layout.files(model)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    # online ones are part of the model; the folded ones say where it came from
    save_rotations(model.rotations, folder)
    names = [*checksums, INDEX_FILE, *texts, *ROTATION_FILES]
    if model.prefix is not None:
        save_prefix(model.prefix, folder)
        names += PREFIX_FILES
    files = {
        name: FileEntry(
            sha256=checksums.get(name) or digest(folder / name),
            bytes=(folder / name).stat().st_size,
        )
        for name in names
    }
    _manifest(model, layout.target, entries, plan.tensor_to_filename, files).save(folder)


def _unique(entries: Iterable[Entry]) -> dict[str, Entry]:
    by_key: dict[str, Entry] = {}
    for entry in entries:
        if entry.key in by_key:
            raise ValueError(f"the layout has two tensors for the key '{entry.key}'")
        by_key[entry.key] = entry
    return by_key


def _manifest(
    model: QuantizedModel,
    target: str,
    entries: Mapping[str, Entry],
    places: Mapping[str, str],
    files: dict[str, FileEntry],
) -> Manifest:
    cache = None
    if model.cache is not None:
        cache = CacheEntry(
            scheme=tensor_scheme_to_dict(model.cache.scheme), layers=list(model.cache.key_scale)
        )

    return Manifest(
        format_version=FORMAT_VERSION,
        rotq=version("rotq"),
        target=target,
        scheme=model.scheme.name,
        dtype=dtype_name(model.dtype),
        model_type=model.config["model_type"],
        fingerprint=model.provenance.fingerprint,
        config=model.config,
        tensors={
            key: TensorEntry(
                kind=entry.kind,
                dtype=dtype_name(entry.dtype),
                shape=list(entry.shape),
                file=places[key],
            )
            for key, entry in entries.items()
        },
        linears={name: linear.description() for name, linear in model.linears.items()},
        kept=dict(model.kept),
        cache=cache,
        files=files,
    )
