"""The :class:`QuantizedModel`: everything a backend needs, with no module, no packing and no
runtime's key names.

Saved as a folder: safetensors shards (unpacked integers, float scales, float remainder), one JSON
manifest with a ``format_version``, the rotations, and the files of the checkpoint that travel along
(config, generation config, tokenizer). Loading is by memory map: a tensor is read when it is asked
for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calib.errors import CheckpointError
from calib.grids import Grid, dequantize
from calib.rotations.rotation_set import RotationSet
from calib.schemes import (
    LinearScheme,
    Scheme,
    TensorScheme,
    scheme_named,
    tensor_scheme_from_dict,
    tensor_scheme_to_dict,
)

MANIFEST = "quantized_model.json"
FORMAT_VERSION = 2
LINEAR_PARTS = (
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_second_scale",
    "weight_order",
    "bias",
    "input_scale",
    "input_zero_point",
)
"""Tensors of a :class:`QuantizedLinear`; they are stored under its name, a dot and theirs."""
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


@dataclass(frozen=True)
class QuantizedLinear:
    """One quantized linear ``y = x W^T + b``, in the orientation and order of the source model.

    Attributes:
        name: dotted module path in the source model.
        weight: stored values ``[out, in]``, unpacked: int8 storage for integer formats, float8 for
            float8, E2M1 codes in uint8 for float4.
        weight_scale: shape by ``weight_scheme.granularity`` (:mod:`calib.schemes`), in the compute
            dtype; float32 holding E4M3 numbers or powers of two where the scheme stores scales so.
        weight_scheme: format and granularity of the weight.
        bias: ``[out]`` in the compute dtype, or ``None``.
        input_scheme: format and granularity of the input, or ``None`` where the input stays in
            float.
        input_scale: what was calibrated of the input: shape ``[]``, or ``[in]`` per cluster, in the
            compute dtype; for NVFP4 the second-level scale, float32 ``[]``; ``None`` where nothing
            was.
        online_rotation: name in :attr:`QuantizedModel.rotations` of the rotation that acts on the
            input before it is quantized, or ``None``.
        weight_zero_point: integers in the dtype and shape of ``weight_scale``; ``None`` when
            symmetric.
        weight_second_scale: float32 ``[]``, the factor of every ``weight_scale`` (NVFP4), else
            ``None``.
        weight_order: int64 ``[in]`` where scales follow another order of the input features (GPTQ's
            act-order with groups of its own): column ``p`` of ``weight`` is input feature
            ``weight_order[p]``. Else ``None``.
        input_zero_point: integer in the dtype and shape of ``input_scale``; ``None`` when symmetric
            or dynamic.
    """

    name: str
    weight: Tensor
    weight_scale: Tensor
    weight_scheme: TensorScheme
    bias: Tensor | None
    input_scheme: TensorScheme | None
    input_scale: Tensor | None
    online_rotation: str | None
    weight_zero_point: Tensor | None = None
    weight_second_scale: Tensor | None = None
    weight_order: Tensor | None = None
    input_zero_point: Tensor | None = None

    @property
    def grid(self) -> Grid:
        """Scales and zero points of the weight."""
        return Grid(self.weight_scale, self.weight_zero_point, self.weight_second_scale)

    def values(self) -> Tensor:
        """The float32 weight ``[out, in]`` that is stored, its columns in the order of the input
        features.
        """
        values = dequantize(self.weight, self.grid, self.weight_scheme)
        return values if self.weight_order is None else values[:, self.weight_order.argsort()]

    def description(self) -> dict[str, Any]:
        """All that is no tensor, as JSON values."""
        return {
            "weight": tensor_scheme_to_dict(self.weight_scheme),
            "input": None
            if self.input_scheme is None
            else tensor_scheme_to_dict(self.input_scheme),
            "online_rotation": self.online_rotation,
        }

    def tensors(self) -> dict[str, Tensor]:
        """What there is of :data:`LINEAR_PARTS`, by the keys under which it is stored."""
        parts = ((part, getattr(self, part)) for part in LINEAR_PARTS)
        return {
            f"{self.name}.{part}": tensor.contiguous()
            for part, tensor in parts
            if tensor is not None
        }


@dataclass(frozen=True)
class QuantizedCache:
    """How cached keys (after RoPE and R3) and values are quantized: one static scale each for a
    layer.

    Attributes:
        scheme: format of both.
        key_scale: ``[]`` in the compute dtype, by layer.
        value_scale: the same.
    """

    scheme: TensorScheme
    key_scale: Mapping[int, Tensor]
    value_scale: Mapping[int, Tensor]


@dataclass(frozen=True)
class Provenance:
    """Where a quantized model came from."""

    source: str
    """Folder or hub id of the float checkpoint."""
    fingerprint: str
    """SHA-256 of the source weights."""
    recipe: dict[str, Any]
    parameters: int
    """Elements of the source weights."""
    nbytes: int
    """Bytes of the source weights, in their own dtypes."""
    calibration_rows: int
    calibration_tokens: int
    calibration_sha256: str
    """SHA-256 over the calibration token ids."""
    versions: dict[str, str]
    gate: tuple[dict[str, Any], ...] = ()
    """The candidates that the rotations were chosen from, where there was a choice; rows of the
    report's gate table.
    """
    rotation_gate: tuple[dict[str, Any], ...] = ()
    """The candidates that each rotation was chosen from, with their errors."""


@dataclass(frozen=True)
class QuantizedModel:
    """A rotated, calibrated, quantized model, independent of any runtime. Frozen; the tensors may
    be memory-mapped.

    Attributes:
        config: the Hugging Face config as a dictionary, with ``tie_word_embeddings`` false.
        scheme: the preset that the linears were quantized with, but for the overrides of single
            ones.
        dtype: what the target computes in; dtype of every float tensor and scale here.
        linears: by module name, in topological order; an embedding that was asked for is one of
            them.
        floats: every other tensor of the model by its checkpoint key: embeddings, norms, float
            linears.
        kept: linears left in float, with the reason.
        rotations: all rotations, folded and online.
        provenance: where it came from.
        files: files of the source checkpoint that travel along, by name.
        cache: the KV cache, where it is quantized.
        smoothing: scales folded by :mod:`calib.smoothing`, float64 ``[width]`` by the name of their
            group.
    """

    config: dict[str, Any]
    scheme: Scheme
    dtype: torch.dtype
    linears: Mapping[str, QuantizedLinear]
    floats: Mapping[str, Tensor]
    kept: Mapping[str, str]
    rotations: RotationSet
    provenance: Provenance
    files: Mapping[str, Path] = field(default_factory=dict)
    cache: QuantizedCache | None = None
    smoothing: Mapping[str, Tensor] = field(default_factory=dict)

    def schemes(self) -> dict[str, LinearScheme]:
        """How each quantized linear is quantized, by name."""
        return {
            name: LinearScheme(part.weight_scheme, part.input_scheme)
            for name, part in self.linears.items()
        }

    def to(self, dtype: torch.dtype) -> QuantizedModel:
        """The same model for a target that computes in ``dtype``; see
        :func:`calib.casting.cast_model`.
        """
        from calib.casting import cast_model  # which needs this module

        return cast_model(self, dtype)

    def save(self, folder: Path) -> None:
        """Write everything into ``folder``, which must exist and should be empty."""
        from huggingface_hub import save_torch_state_dict

        tensors = dict(self._tensors())
        save_torch_state_dict(
            tensors, folder, filename_pattern="quantized_model{suffix}.safetensors"
        )
        self.save_description(folder)

    def save_description(self, folder: Path) -> None:
        """Write everything but the shards into ``folder``: manifest, rotations and side files."""
        manifest = {
            "format_version": FORMAT_VERSION,
            "config": self.config,
            "scheme": self.scheme.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "linears": {name: linear.description() for name, linear in self.linears.items()},
            "cache": None
            if self.cache is None
            else {
                "scheme": tensor_scheme_to_dict(self.cache.scheme),
                "layers": list(self.cache.key_scale),
            },
            "smoothing": list(self.smoothing),
            "kept": dict(self.kept),
            "provenance": vars(self.provenance),
            "tensors": sorted(key for key, _ in self._tensors()),
        }
        self.rotations.save(folder)
        copy_side_files(self.files, folder)
        text = json.dumps(manifest, indent=2, allow_nan=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.floats.items()
        for linear in self.linears.values():
            yield from linear.tensors().items()
        if self.cache is not None:
            for layer, scale in self.cache.key_scale.items():
                yield cache_key(layer, "key"), scale
                yield cache_key(layer, "value"), self.cache.value_scale[layer]
        for group, scale in self.smoothing.items():
            yield smoothing_key(group), scale

    @classmethod
    def load(cls, folder: Path) -> QuantizedModel:
        """Open a saved model by memory map.

        Raises:
            CheckpointError: the folder is missing, incomplete, corrupt, or written by a newer rotq.
            RotationError: its rotations are.
        """
        manifest = _read_manifest(folder)
        tensors = ShardedTensors(folder)
        try:
            tensors.check_complete(manifest["tensors"])
            return cls._from_manifest(manifest, tensors, folder)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"'{folder / MANIFEST}' is damaged: {error}", hint="run `rotq calibrate` again"
            ) from error

    @classmethod
    def _from_manifest(
        cls, manifest: Mapping[str, Any], tensors: ShardedTensors, folder: Path
    ) -> QuantizedModel:
        linears = {
            name: _read_linear(name, entry, tensors) for name, entry in manifest["linears"].items()
        }
        cache = _read_cache(manifest["cache"], tensors)
        parts = {f"{name}.{part}" for name in linears for part in LINEAR_PARTS}
        if cache is not None:
            parts |= {
                cache_key(layer, part) for layer in cache.key_scale for part in ("key", "value")
            }
        smoothing = {group: tensors[smoothing_key(group)] for group in manifest["smoothing"]}
        parts |= {smoothing_key(group) for group in smoothing}
        return cls(
            config=manifest["config"],
            scheme=scheme_named(manifest["scheme"]),
            dtype=getattr(torch, manifest["dtype"]),
            linears=linears,
            floats={key: tensors[key] for key in tensors if key not in parts},
            kept=manifest["kept"],
            rotations=RotationSet.load(folder),
            provenance=_provenance(manifest["provenance"]),
            files=side_files(folder),
            cache=cache,
            smoothing=smoothing,
        )


def _read_linear(
    name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> QuantizedLinear:
    optional = {part: tensors.get(f"{name}.{part}") for part in LINEAR_PARTS[2:]}
    return QuantizedLinear(
        name=name,
        weight=tensors[f"{name}.weight"],
        weight_scale=tensors[f"{name}.weight_scale"],
        weight_scheme=tensor_scheme_from_dict(entry["weight"]),
        input_scheme=None if entry["input"] is None else tensor_scheme_from_dict(entry["input"]),
        online_rotation=entry["online_rotation"],
        **optional,
    )


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
    tables = {name: tuple(values[name]) for name in ("gate", "rotation_gate")}
    return Provenance(**{**values, **tables})


def side_files(folder: Path) -> dict[str, Path]:
    """The :data:`SIDE_FILES` that exist in ``folder``."""
    return {name: folder / name for name in SIDE_FILES if (folder / name).is_file()}


def copy_side_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy ``files`` into ``folder`` under their own names."""
    for name, path in files.items():
        shutil.copyfile(path, folder / name)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"'{folder}' is not a quantized model: it holds no {MANIFEST}",
            hint="`rotq calibrate -o DIR` writes one",
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{path}' is damaged: {error}", hint="run `rotq calibrate` again"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"'{path}' has format version {version}; this rotq reads version {FORMAT_VERSION}",
            hint="use the rotq that wrote it, or a newer one",
        )
    return manifest


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
        paths = sorted(folder.glob("quantized_model*.safetensors"))
        if not paths:
            raise CheckpointError(
                f"'{folder}' holds no weights (quantized_model*.safetensors)",
                hint="run `rotq calibrate` again",
            )
        for path in paths:
            try:
                shard: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"'{path}' is damaged: {error}", hint="run `rotq calibrate` again"
                ) from error
            self._shards.update((key, shard) for key in shard.keys())  # noqa: SIM118 - a handle is no mapping

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
