"""Bundles in ModelOpt's unified Hugging Face layout, for TensorRT-LLM and vLLM.

Keys of linears are in :mod:`backends.safetensors.modelopt.tensors`. Everything else is as the
Hugging Face model has it, but for GPT-2's Conv1D, which ModelOpt turns to ``[out, in]`` whether it
is quantized or not. A quantized cache has ``{attention}.k_proj.k_scale`` and
``{attention}.v_proj.v_scale``, float32 ``[]``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from backends.base import Reason
from backends.rows import joined
from backends.safetensors.file_names import CONFIG_FILE, QUANT_CONFIG_FILE
from backends.safetensors.layout import Entry
from backends.safetensors.modelopt.config import mixed_experts, quant_config, with_quantization
from backends.safetensors.modelopt.limits import rotation_refusal
from backends.safetensors.modelopt.tensors import PARTS, entries_of, linear_from
from backends.safetensors.names import Names
from backends.safetensors.source import block_refusal, block_size
from calib.architectures.groups import merged_linears
from calib.artifact import QuantizedCache, QuantizedLinear, QuantizedModel
from calib.errors import BackendError
from calib.schemes import LinearScheme, TensorScheme, tensor_scheme_from_dict

_CACHE_PARTS = ("k_proj.k_scale", "v_proj.v_scale")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class ModelOptLayout:
    """ModelOpt's unified layout; implements :class:`~backends.safetensors.layout.Layout`."""

    target = "modelopt"

    def model_refusal(
        self, config: Mapping[str, Any], linears: Mapping[str, LinearScheme]
    ) -> Reason | None:
        """See :meth:`backends.safetensors.layout.Layout.model_refusal`."""
        names = Names.of(config)
        table, apart = names.quantized_table(linears), names.experts_apart(linears)
        if table is not None:
            return Reason(
                f"no reader of ModelOpt's layout takes a quantized embedding ('{table}')",
                f"leave out --override '{table}=...'",
            )

        if apart is not None:
            return Reason(
                (
                    f"ModelOpt's layout has all experts in one format, and those of '{apart}' are"
                    " left in float"
                ),
                "quantize all experts, or none",
            )

        return mixed_experts(linears, names) or block_refusal(config, linears, _short_blocks)

    def entries(self, model: QuantizedModel) -> Iterator[Entry]:
        """Floats, quantized linears, the cache's scales.

        Raises:
            BackendError: something of ``model`` has no place in the layout.
        """
        _check(model)
        refusal = self.model_refusal(model.config, model.schemes())
        if refusal is not None:
            raise BackendError(refusal.reason, hint=refusal.hint)

        names = Names.of(model.config)
        for key, tensor in model.floats.items():
            for stored, part in names.stored(key, tensor):
                yield _float(stored, part)
        merged = _merged(model, names)
        for linear in model.linears.values():
            for module, rows in names.rows(linear):
                yield from entries_of(rows, module, merged[linear.name], model.dtype)

        if model.cache is not None:
            for layer, key_scale in model.cache.key_scale.items():
                scales = (key_scale, model.cache.value_scale[layer])
                for key, scale in zip(_cache_keys(names, layer), scales, strict=True):
                    yield Entry(
                        key, "scale", torch.float32, (), scale.float().reshape(()).contiguous
                    )

    def files(self, model: QuantizedModel) -> Mapping[str, str]:
        """``config.json`` with a ``quantization_config``, and ``hf_quant_config.json``; errors as
        :meth:`entries`.
        """
        names = Names.of(model.config)
        written, config = quant_config(model, names), with_quantization(model, names)
        files = {CONFIG_FILE: _json(config)}
        return files | ({QUANT_CONFIG_FILE: _json(written)} if written else {})

    def linears(
        self,
        tensors: Mapping[str, Tensor],
        described: Mapping[str, Mapping[str, Any]],
        config: Mapping[str, Any],
    ) -> Mapping[str, QuantizedLinear]:
        """See :meth:`backends.safetensors.layout.Layout.linears`."""
        names = Names.of(config)
        dtype = _dtype(tensors)

        by_name = {}
        for name, description in described.items():
            rows = []
            for module in names.modules(name):
                stored = {
                    part: tensors[f"{module}.{part}"]
                    for part in PARTS
                    if f"{module}.{part}" in tensors
                }
                rows.append(linear_from(name, description, stored, dtype))
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
        skipped = {
            f"{module}.{part}"
            for name in described
            for module in names.modules(name)
            for part in PARTS
        }
        for layer in range(names.wiring.sizes.layers):
            skipped.update(_cache_keys(names, layer))
        return names.gathered({key: tensors[key] for key in tensors if key not in skipped})

    def cache(
        self, tensors: Mapping[str, Tensor], described: Mapping[str, Any], config: Mapping[str, Any]
    ) -> QuantizedCache:
        """See :meth:`backends.safetensors.layout.Layout.cache`."""
        names = Names.of(config)
        dtype = _dtype(tensors)
        keys, values = (
            {
                layer: tensors[_cache_keys(names, layer)[part]].to(dtype)
                for layer in described["layers"]
            }
            for part in (0, 1)
        )
        return QuantizedCache(tensor_scheme_from_dict(dict(described["scheme"])), keys, values)


def _short_blocks(name: str, width: int, scheme: TensorScheme) -> Reason | None:
    size = block_size(scheme)
    if size is None or width % size == 0:
        return None
    return Reason(
        (
            f"blocks of {size} do not divide the {width} input features of '{name}', and ModelOpt"
            " has no short blocks"
        ),
        (
            "choose a --block-size that divides them, where the format leaves a choice, or leave"
            f" the linear in float with --override '{name}=float'"
        ),
    )


def _check(model: QuantizedModel) -> None:
    if model.cache is not None and not model.linears:
        raise BackendError(
            "ModelOpt's layout has no name for a quantized KV cache with float linears, and vLLM"
            " 0.33 fails on it",
            hint="quantize the linears as well, or leave --kv out",
        )
    for kind in model.rotations.kinds():
        reason = rotation_refusal(kind)
        if reason is not None:
            raise BackendError(f"{kind.upper()}: {reason}", hint=f"leave {kind} out of --rotate")


def _merged(model: QuantizedModel, names: Names) -> dict[str, list[QuantizedLinear]]:
    """By linear, those that readers make one matrix of."""
    beside = merged_linears(names.wiring)
    return {
        name: [
            model.linears[other] for other in beside.get(name, (name,)) if other in model.linears
        ]
        for name in model.linears
    }


def _float(key: str, tensor: Tensor) -> Entry:
    return Entry(key, "float weight", tensor.dtype, tuple(tensor.shape), tensor.contiguous)


def _cache_keys(names: Names, layer: int) -> tuple[str, ...]:
    attention = names.wiring.attention(layer)
    return tuple(f"{names.published(attention)}.{part}" for part in _CACHE_PARTS)


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Dtype of the model, which is that of every float weight and bias.

    Raises:
        KeyError: there is none.
    """
    for key in tensors:
        if key.endswith((".weight", ".bias")) and (dtype := tensors[key].dtype) in _FLOATS:
            return dtype
    raise KeyError("no float weight")


def _json(values: Mapping[str, object]) -> str:
    return json.dumps(values, indent=2, allow_nan=False) + "\n"
