"""``hf_quant_config.json`` and the ``quantization_config`` of ``config.json``, as ModelOpt's export
writes both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from backends.base import Reason
from backends.safetensors.modelopt.algorithms import Algorithm
from backends.safetensors.modelopt.tensors import format_of
from backends.safetensors.names import Names
from backends.safetensors.source import block_size
from calib.artifact import QuantizedModel
from calib.artifact.older_config import with_older_keys
from calib.schemes import LinearScheme

_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""The release whose layout this is; vLLM and TensorRT-LLM look at the name."""
_MIXED = "MIXED_PRECISION"
_CACHE_ALGORITHM = "FP8"
_CACHE_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}
_Format = tuple[Algorithm, int | None]
"""A format and the size of its blocks."""


def quant_config(model: QuantizedModel, names: Names) -> dict[str, Any]:
    """The content of ``hf_quant_config.json``; empty where nothing is quantized.

    Raises:
        BackendError: something of ``model`` has no place in the layout.
    """
    if not model.linears:
        return {}

    layers = _formats(model, names)
    cache = None if model.cache is None else _CACHE_ALGORITHM
    formats = list(dict.fromkeys(layers.values()))
    quantization: dict[str, Any] = {"quant_algo": _MIXED, "kv_cache_quant_algo": cache}

    if len(formats) == 1:
        algorithm, block = formats[0]
        quantization |= algorithm.settings(block)
        quantization["exclude_modules"] = sorted(_summarised(_floats(model, names), list(layers)))
    else:
        quantization["quantized_layers"] = {
            name: algorithm.settings(block) for name, (algorithm, block) in layers.items()
        }

    return {"producer": _PRODUCER, "quantization": quantization}


def with_quantization(model: QuantizedModel, names: Names) -> Mapping[str, Any]:
    """``config.json`` of the checkpoint; errors as for :func:`quant_config`."""
    config = with_older_keys({**model.config, "dtype": str(model.dtype).removeprefix("torch.")})
    written = quant_config(model, names)
    if not written:
        return config

    quantization = written["quantization"]
    section: dict[str, Any] = _groups(_formats(model, names))
    if "quantized_layers" in quantization:
        section["quantized_layers"] = quantization["quantized_layers"]
    section |= {
        "ignore": quantization.get("exclude_modules", []),
        "quant_algo": quantization["quant_algo"],
    }
    if model.cache is not None:
        section["kv_cache_scheme"] = _CACHE_SCHEME

    return {
        **config,
        "quantization_config": section | {"producer": _PRODUCER, "quant_method": "modelopt"},
    }


def _groups(layers: Mapping[str, _Format]) -> dict[str, Any]:
    """``config_groups``: of one format that has them for all linears, of several by the modules of
    each.
    """
    members: dict[_Format, list[str]] = defaultdict(list)
    for name, form in layers.items():
        members[form].append(name)
    if len(members) == 1:
        algorithm, block = next(iter(members))
        if not algorithm.names_linears:
            return {}
        return {"config_groups": {"group_0": algorithm.group(block) | {"targets": ["Linear"]}}}

    groups = enumerate(members.items())
    return {
        "config_groups": {
            f"group_{index}": algorithm.group(block) | {"targets": sorted(modules)}
            for index, ((algorithm, block), modules) in groups
        }
    }


def mixed_experts(linears: Mapping[str, LinearScheme], names: Names) -> Reason | None:
    """Why the experts of a layer, which have one entry in the settings, have no one format; else
    ``None``.
    """
    by_module: dict[str, LinearScheme] = {}
    for name, scheme in linears.items():
        module = _module(name, names)
        if by_module.setdefault(module, scheme) != scheme:
            return Reason(
                (
                    f"the experts '{module}' are quantized in several ways, and ModelOpt has one"
                    " format for a layer's"
                ),
                "give all experts the same --override",
            )

    return None


def _formats(model: QuantizedModel, names: Names) -> dict[str, _Format]:
    """Format and block size by module; the experts of a layer are one."""
    return {
        _module(name, names): (format_of(linear), block_size(linear.weight_scheme))
        for name, linear in model.linears.items()
    }


def _module(name: str, names: Names) -> str:
    """What the settings call the linear ``name``: its module, or that of all experts of the
    layer.
    """
    parameter = names.parameter(name)
    return names.published(name if parameter is None else _container(parameter))


def _floats(model: QuantizedModel, names: Names) -> list[str]:
    """Modules whose weight is a matrix and is not quantized: linears, embeddings, routers, and
    experts as one.
    """
    modules = []
    for key, tensor in model.floats.items():
        if key in names.experts:
            modules.append(_container(key))
        elif tensor.dim() == 2 and key.endswith(".weight"):
            modules.append(key.removesuffix(".weight"))
    return [names.published(name) for name in modules]


def _container(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _summarised(floats: Iterable[str], quantized: Sequence[str]) -> set[str]:
    """``floats`` with ``a.b*`` or ``a.b.*`` in place of all that begins so, where nothing quantized
    does.

    The shortest prefix is taken, which ends before a dot; ``a.b*`` where nothing quantized begins
    with ``a.b`` at all.
    """

    def pattern(name: str) -> str:
        parts = name.split(".")
        for length in range(1, len(parts)):
            prefix = ".".join(parts[:length])
            for ending in ("", "."):
                if not any(other.startswith(prefix + ending) for other in quantized):
                    return f"{prefix}{ending}*"
        return name

    return {pattern(name) for name in floats}
