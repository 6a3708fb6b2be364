"""The artifact on disk.

A folder: safetensors shards (unpacked integers, float scales, float remainder), one JSON manifest
with a ``format_version``, the rotations, and the files of the checkpoint that travel along (config,
generation config, tokenizer). Loading is by memory map: a tensor is read when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calib.artifact.model import (
    LINEAR_PARTS,
    OPTIONAL_PARTS,
    Provenance,
    QuantizedCache,
    QuantizedLinear,
    QuantizedModel,
)
from calib.artifact.prefix import load_prefix, save_prefix
from calib.artifact.side_files import copy_side_files, side_files
from calib.artifact.sound import check_linear
from calib.errors import CheckpointError
from calib.files.reading import MALFORMED, reason_of, regular_file
from calib.files.sealed import DamagedError, read_sealed, write_sealed
from calib.rotations.files import load_rotations, save_rotations
from calib.rotations.rotation_set import RotationSet
from calib.schemes import (
    scheme_from_dict,
    scheme_to_dict,
    tensor_scheme_from_dict,
    tensor_scheme_to_dict,
)

MANIFEST = "quantized_model.json"
FORMAT_VERSION = 4
"""Raised whenever a reader of the version before would misread a folder. 3: the whole scheme, not
its name; float weights of linears [out, in]. 4: checksums.
"""
_SHARDS = "quantized_model*.safetensors"


def save_artifact(model: QuantizedModel, folder: str | PathLike[str]) -> None:
    """Write everything into ``folder``, which must exist and should be empty."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(
        dict(artifact_tensors(model)),
        Path(folder),
        filename_pattern="quantized_model{suffix}.safetensors",
    )
    save_description(model, Path(folder))


def save_description(model: QuantizedModel, folder: Path) -> None:
    """Write everything but the shards, which are there, into ``folder``: manifest, rotations and
    side files.
    """
    manifest = {
        "format_version": FORMAT_VERSION,
        "config": model.config,
        "scheme": scheme_to_dict(model.scheme),
        "dtype": str(model.dtype).removeprefix("torch."),
        "linears": {name: linear.description() for name, linear in model.linears.items()},
        "cache": None
        if model.cache is None
        else {
            "scheme": tensor_scheme_to_dict(model.cache.scheme),
            "layers": list(model.cache.key_scale),
        },
        "smoothing": list(model.smoothing),
        "norms_folded": model.norms_folded,
        "kept": dict(model.kept),
        "provenance": vars(model.provenance),
        "tensors": [key for key, _ in artifact_tensors(model)],
    }
    save_rotations(model.rotations, folder)
    if model.prefix is not None:
        save_prefix(model.prefix, folder)
    copy_side_files(model.files, folder)
    shards = [path.name for path in folder.glob(_SHARDS)]
    write_sealed(folder / MANIFEST, manifest, [*shards, *side_files(folder)])


def load_artifact(folder: str | PathLike[str]) -> QuantizedModel:
    """Open a saved model by memory map.

    Raises:
        CheckpointError: the folder is missing, incomplete, corrupt, or of another format version.
        RotationError: its rotations are.
    """
    path = Path(folder)
    manifest = _read_manifest(path)
    tensors = ShardedTensors(path)
    try:
        tensors.check_complete(manifest["tensors"])
        return _from_manifest(manifest, tensors, path)
    except (SafetensorError, *MALFORMED) as error:
        raise CheckpointError(
            f"'{path / MANIFEST}' is damaged: {reason_of(error)}",
            hint="run `rotq calibrate` again",
        ) from error


def artifact_tensors(model: QuantizedModel) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a saved model, by the key under which it is stored."""
    for key, tensor in model.floats.items():
        yield key, tensor.contiguous()
    for linear in model.linears.values():
        yield from linear.tensors().items()
    if model.cache is not None:
        for layer, scale in model.cache.key_scale.items():
            yield cache_key(layer, "key"), scale
            yield cache_key(layer, "value"), model.cache.value_scale[layer]
    for group, scale in model.smoothing.items():
        yield smoothing_key(group), scale


def _from_manifest(
    manifest: Mapping[str, Any], tensors: ShardedTensors, folder: Path
) -> QuantizedModel:
    linears = {
        name: _read_linear(name, entry, tensors) for name, entry in manifest["linears"].items()
    }
    cache = _read_cache(manifest["cache"], tensors)
    parts = {f"{name}.{part}" for name in linears for part in LINEAR_PARTS}
    if cache is not None:
        parts |= {cache_key(layer, part) for layer in cache.key_scale for part in ("key", "value")}
    smoothing = {group: tensors[smoothing_key(group)] for group in manifest["smoothing"]}
    sides, rotations = side_files(folder), load_rotations(folder)
    check_named_rotations(manifest["linears"], rotations)
    if not isinstance(manifest["config"]["model_type"], str):
        raise ValueError("its config names no model type")
    parts |= {smoothing_key(group) for group in smoothing}

    return QuantizedModel(
        config=manifest["config"],
        scheme=scheme_from_dict(manifest["scheme"]),
        dtype=getattr(torch, manifest["dtype"]),
        linears=linears,
        # in the order that they had: whoever writes them writes the same bytes
        floats={key: tensors[key] for key in manifest["tensors"] if key not in parts},
        kept=manifest["kept"],
        rotations=rotations,
        provenance=_provenance(manifest["provenance"]),
        files={name: sides[name] for name in sides.keys() & manifest["files"].keys()},
        cache=cache,
        smoothing=smoothing,
        prefix=load_prefix(folder),
        norms_folded=manifest.get("norms_folded", True),  # the only way before there was a choice
    )


def check_named_rotations(linears: Mapping[str, Mapping[str, Any]], rotations: RotationSet) -> None:
    """Hold the online rotations that descriptions of linears name against those that are there.

    Raises:
        ValueError: one is not there.
    """
    for name, entry in linears.items():
        rotation = entry["online_rotation"]
        if rotation is not None and not (isinstance(rotation, str) and rotation in rotations):
            raise ValueError(f"the rotation {rotation!r:.40} before '{name}' is not there")


def _read_linear(
    name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> QuantizedLinear:
    optional = {part: tensors.get(f"{name}.{part}") for part in OPTIONAL_PARTS}
    linear = QuantizedLinear(
        name=name,
        weight=tensors[f"{name}.weight"],
        weight_scale=tensors[f"{name}.weight_scale"],
        weight_scheme=tensor_scheme_from_dict(entry["weight"]),
        input_scheme=None if entry["input"] is None else tensor_scheme_from_dict(entry["input"]),
        online_rotation=entry["online_rotation"],
        **optional,
    )
    check_linear(linear)
    return linear


def _read_cache(
    entry: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]
) -> QuantizedCache | None:
    if entry is None:
        return None
    key, value = (
        {layer: tensors[cache_key(layer, part)] for layer in entry["layers"]}
        for part in ("key", "value")
    )
    return QuantizedCache(tensor_scheme_from_dict(entry["scheme"]), key, value)


def cache_key(layer: int, part: str) -> str:
    """The key under which the scale of a layer's ``key`` or ``value`` is stored."""
    return f"kv_cache.{layer}.{part}_scale"


def smoothing_key(group: str) -> str:
    """The key under which the scale of a smoothing group is stored."""
    return f"smoothing.{group}"


def _provenance(values: Mapping[str, Any]) -> Provenance:
    tables = {
        name: tuple(values.get(name, ()))
        for name in ("gate", "rotation_gate", "massive", "training")
    }
    return Provenance(**{**values, **tables})


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"'{folder}' is not a quantized model: it holds no {MANIFEST}",
            hint="`rotq calibrate -o DIR` writes one",
        )

    try:
        return read_sealed(path, lambda manifest: _check_version(path, manifest["format_version"]))
    except (DamagedError, OSError) as error:
        raise CheckpointError(
            f"the quantized model '{path}' is damaged: {reason_of(error)}",
            hint="run `rotq calibrate` again",
        ) from error


def _check_version(path: Path, version: object) -> None:
    if version != FORMAT_VERSION:
        older = isinstance(version, int) and version < FORMAT_VERSION
        raise CheckpointError(
            f"'{path}' has format version {version}, written by"
            f" {'an older' if older else 'a newer'} rotq; this one reads version {FORMAT_VERSION}",
            hint="run `rotq calibrate` again" if older else "use the rotq that wrote it",
        )


class ShardedTensors(Mapping[str, Tensor]):
    """Tensors of a saved model, memory-mapped shard by shard."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: holds ``quantized_model*.safetensors``.

        Raises:
            CheckpointError: there is none, or one is damaged.
        """
        self._shards: dict[str, Any] = {}
        paths = sorted(folder.glob(_SHARDS))
        if not paths:
            raise CheckpointError(
                f"'{folder}' holds no weights ({_SHARDS})",
                hint="run `rotq calibrate` again",
            )
        for path in paths:
            try:
                shard: Any = safe_open(regular_file(path), framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(
                    f"'{path}' is damaged: {reason_of(error)}", hint="run `rotq calibrate` again"
                ) from error
            # a handle is no mapping
            self._shards.update((key, shard) for key in shard.keys())  # noqa: SIM118

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self._shards[key].get_tensor(key)
        return tensor

    def check_complete(self, promised: Iterable[str]) -> None:
        """Every tensor that the manifest promises must be there: an optional one would be missed by
        nobody.
        """
        missing = [key for key in promised if key not in self._shards]
        if missing:
            raise CheckpointError(
                f"the saved model lacks {len(missing)} tensor(s), such as '{missing[0]}'",
                hint="a shard is missing; copy the folder again or run `rotq calibrate` again",
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)
