"""The plainest layout there can be: the artifact's own keys, nothing packed. What is tested with it
is the bundle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from backends.base import ContentKind, Reason
from backends.safetensors.layout import Entry
from calib.artifact import (
    LINEAR_PARTS,
    OPTIONAL_PARTS,
    QuantizedCache,
    QuantizedLinear,
    QuantizedModel,
)
from calib.artifact.files import cache_key
from calib.schemes import LinearScheme, tensor_scheme_from_dict

KINDS: dict[str, ContentKind] = {
    "weight": "quantized weight",
    "weight_zero_point": "zero point",
    "bias": "float weight",
}


def entry(key: str, kind: ContentKind, tensor: Tensor) -> Entry:
    return Entry(key, kind, tensor.dtype, tuple(tensor.shape), lambda: tensor)


class PlainLayout:
    target = "plain"

    def model_refusal(
        self, config: Mapping[str, Any], linears: Mapping[str, LinearScheme]
    ) -> Reason | None:
        return None

    def entries(self, model: QuantizedModel) -> Iterator[Entry]:
        for key, tensor in model.floats.items():
            yield entry(key, "float weight", tensor)
        for linear in model.linears.values():
            for key, tensor in linear.tensors().items():
                yield entry(key, KINDS.get(key.rpartition(".")[2], "scale"), tensor)
        if model.cache is not None:
            for layer, scale in model.cache.key_scale.items():
                yield entry(cache_key(layer, "key"), "scale", scale)
                yield entry(cache_key(layer, "value"), "scale", model.cache.value_scale[layer])

    def files(self, model: QuantizedModel) -> Mapping[str, str]:
        return {"plain.txt": "plain\n"}

    def linears(
        self,
        tensors: Mapping[str, Tensor],
        described: Mapping[str, Mapping[str, Any]],
        config: Mapping[str, Any],
    ) -> Mapping[str, QuantizedLinear]:
        return {
            name: QuantizedLinear(
                name=name,
                weight=tensors[f"{name}.weight"],
                weight_scale=tensors[f"{name}.weight_scale"],
                weight_scheme=tensor_scheme_from_dict(entry["weight"]),
                input_scheme=None
                if entry["input"] is None
                else tensor_scheme_from_dict(entry["input"]),
                online_rotation=entry["online_rotation"],
                **{part: tensors.get(f"{name}.{part}") for part in OPTIONAL_PARTS},
            )
            for name, entry in described.items()
        }

    def floats(
        self,
        tensors: Mapping[str, Tensor],
        described: Mapping[str, Mapping[str, Any]],
        config: Mapping[str, Any],
    ) -> Mapping[str, Tensor]:
        own = {f"{name}.{part}" for name in described for part in LINEAR_PARTS}
        return {
            key: tensors[key]
            for key in tensors
            if key not in own and not key.startswith("kv_cache.")
        }

    def cache(
        self, tensors: Mapping[str, Tensor], described: Mapping[str, Any], config: Mapping[str, Any]
    ) -> QuantizedCache:
        key, value = (
            {layer: tensors[cache_key(layer, part)] for layer in described["layers"]}
            for part in ("key", "value")
        )
        return QuantizedCache(tensor_scheme_from_dict(described["scheme"]), key, value)
