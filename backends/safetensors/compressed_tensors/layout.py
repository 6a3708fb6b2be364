"""Bundles that vLLM and transformers load: checkpoints in the compressed-tensors format, the same
for both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from backends.base import ContentKind, Reason
from backends.rows import joined
from backends.safetensors.compressed_tensors.config import with_quantization
from backends.safetensors.compressed_tensors.schemes import short_blocks
from backends.safetensors.compressed_tensors.tensors import linear_from, parts_of
from backends.safetensors.compressed_tensors.transforms import transform_keys, transforms_of
from backends.safetensors.file_names import CONFIG_FILE
from backends.safetensors.layout import Entry
from backends.safetensors.names import Names
from backends.safetensors.source import block_refusal
from calib.artifact import QuantizedCache, QuantizedLinear, QuantizedModel
from calib.errors import BackendError
from calib.network.layout import StockTensors, oriented
from calib.schemes import LinearScheme, tensor_scheme_from_dict

_CACHE_PARTS = ("k_scale", "v_scale")


class CompressedTensorsLayout:
    """The compressed-tensors format, for both readers; implements
    :class:`~backends.safetensors.layout.Layout`.
    """

    target = "compressed-tensors"
    rotates = False
    """Whether its readers apply rotations while they run."""

    def model_refusal(
        self, config: Mapping[str, Any], linears: Mapping[str, LinearScheme]
    ) -> Reason | None:
        """See :meth:`backends.safetensors.layout.Layout.model_refusal`."""
        names = Names.of(config)
        table = names.quantized_table(linears)
        if table is not None:
            return Reason(
                f"transformers 5 fails on a checkpoint whose embedding ('{table}') is quantized,"
                " and so do most models in vLLM",
                f"leave out --override '{table}=...'",
            )

        return block_refusal(config, linears, short_blocks)

    def entries(self, model: QuantizedModel) -> Iterator[Entry]:
        """See :meth:`backends.safetensors.layout.Layout.entries`.

        Raises:
            BackendError: an online rotation that no reader of the target would apply.
        """
        names = Names.of(model.config)
        online = [name for name, rotation in model.rotations.items() if rotation.online]
        if online and not self.rotates:
            raise BackendError(
                f"transformers passes over rotations while running, and so over {online[0]}",
                hint="calibrate with --rotate r1,r2, or use --target vllm",
            )
        # linears in float are those of the stock model, which loads them
        tied = {names.wiring.head.weight} if model.repeats_embedding() else ()
        for key, tensor in StockTensors(model.floats, names.wiring).items():
            if key in tied:
                continue
            yield from (
                _entry(stored, "float weight", part) for stored, part in names.stored(key, tensor)
            )

        for linear in model.linears.values():
            transposed = names.transposed(linear.name)
            for module, rows in names.rows(linear):
                yield from (part.at(module) for part in parts_of(rows, transposed=transposed))

        for transform in transforms_of(model, names):
            yield transform.entry(model)
        if model.cache is not None:
            for layer, key_scale in model.cache.key_scale.items():
                scales = (key_scale, model.cache.value_scale[layer])
                for key, scale in zip(_cache_keys(names, layer), scales, strict=True):
                    yield _entry(key, "scale", scale.reshape(1))

    def files(self, model: QuantizedModel) -> Mapping[str, str]:
        """See :meth:`backends.safetensors.layout.Layout.files`: ``config.json`` with a
        ``quantization_config``.
        """
        config = with_quantization(model, Names.of(model.config))
        return {CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"}

    def linears(
        self,
        tensors: Mapping[str, Tensor],
        described: Mapping[str, Mapping[str, Any]],
        config: Mapping[str, Any],
    ) -> Mapping[str, QuantizedLinear]:
        """See :meth:`backends.safetensors.layout.Layout.linears`."""
        names, parts = Names.of(config), _by_module(tensors)

        by_name = {}
        for name, description in described.items():
            rows = []
            for module in names.modules(name):
                stored = {part: tensors[f"{module}.{part}"] for part in parts.get(module, ())}
                rows.append(
                    linear_from(name, description, stored, transposed=names.transposed(name))
                )
            by_name[name] = joined(rows)

        return by_name

    def floats(
        self,
        tensors: Mapping[str, Tensor],
        described: Mapping[str, Mapping[str, Any]],
        config: Mapping[str, Any],
    ) -> Mapping[str, Tensor]:
        """See :meth:`backends.safetensors.layout.Layout.floats`."""
        names = Names.of(config)
        quantized = {module for name in described for module in names.modules(name)}
        skipped = {key for key in tensors if key.rpartition(".")[0] in quantized} | transform_keys(
            tensors
        )
        for layer in range(names.wiring.sizes.layers):
            skipped.update(_cache_keys(names, layer))
        floats = names.gathered({key: tensors[key] for key in tensors if key not in skipped})
        head, table = names.wiring.head, names.wiring.embeddings[0]
        if head.name not in described:
            floats.setdefault(head.weight, floats[table.weight])  # where it is tied
        return oriented(floats, names.wiring)

    def cache(
        self, tensors: Mapping[str, Tensor], described: Mapping[str, Any], config: Mapping[str, Any]
    ) -> QuantizedCache:
        """See :meth:`backends.safetensors.layout.Layout.cache`."""
        names = Names.of(config)
        keys: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        for layer in described["layers"]:
            key, value = (tensors[stored].reshape(()) for stored in _cache_keys(names, layer))
            keys[layer], values[layer] = key, value
        return QuantizedCache(tensor_scheme_from_dict(dict(described["scheme"])), keys, values)


class VllmLayout(CompressedTensorsLayout):
    """The compressed-tensors format, for vLLM."""

    target = "vllm"
    rotates = True


class TransformersLayout(CompressedTensorsLayout):
    """The compressed-tensors format, for transformers."""

    target = "transformers"


def _entry(key: str, kind: ContentKind, tensor: Tensor) -> Entry:
    return Entry(key, kind, tensor.dtype, tuple(tensor.shape), tensor.contiguous)


def _cache_keys(names: Names, layer: int) -> tuple[str, ...]:
    attention = names.wiring.attention(layer)
    return tuple(f"{names.published(attention)}.{part}" for part in _CACHE_PARTS)


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Last parts of all keys, by what comes before."""
    parts: dict[str, list[str]] = {}
    for key in tensors:
        module, _, part = key.rpartition(".")
        parts.setdefault(module, []).append(part)
    return parts
