"""``quantization_config``: what every module of a checkpoint is, written by the classes of the
library itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from backends.safetensors.compressed_tensors.library import require
from backends.safetensors.compressed_tensors.schemes import MIXED, Form, cache_arguments, form_of
from backends.safetensors.compressed_tensors.transforms import transform_config, transforms_of
from backends.safetensors.names import Names
from calib.artifact import QuantizedModel
from calib.artifact.older_config import with_older_keys

_EVERY_LINEAR = "Linear"
"""The target that names a class: whatever no other group names. vLLM also takes its experts for
linears.
"""


def quantization_config(model: QuantizedModel, names: Names) -> dict[str, Any]:
    """The value of ``quantization_config`` in ``config.json``; empty where nothing is quantized or
    rotated online.

    Raises:
        BackendError: something of ``model`` has no place in the format, or the library is not
            installed.
    """
    transforms = transform_config(transforms_of(model, names))
    if not model.linears and model.cache is None and not transforms:
        return {}

    groups = _groups(model, names)
    formats = {form.compression for form in groups}
    library = require("compressed_tensors.quantization")
    config = library.QuantizationConfig(
        config_groups={
            f"group_{index}": form.group(targets)
            for index, (form, targets) in enumerate(groups.items())
        },
        kv_cache_scheme=None if model.cache is None else cache_arguments(model.cache.scheme),
        format=MIXED if len(formats) > 1 else next(iter(formats), "dense"),
        quantization_status=library.QuantizationStatus.COMPRESSED,
        ignore=_ignored(model, names) if groups else [],
    )
    base = require("compressed_tensors.base")

    return {
        base.COMPRESSION_VERSION_NAME: require("compressed_tensors").__version__,
        base.QUANTIZATION_METHOD_NAME: base.QUANTIZATION_METHOD,
        base.SPARSITY_CONFIG_NAME: {},
        base.TRANSFORM_CONFIG_NAME: transforms,
        **config.model_dump(mode="json", exclude={"quant_method"}),
    }


def _groups(model: QuantizedModel, names: Names) -> dict[Form, list[str]]:
    """Targets by form: the commonest one of the decoder is every linear's, others name their
    modules.

    Head and embeddings are named always: vLLM's modules of these are no linears. Readers take the
    group of a name before that of a class.
    """
    members: dict[Form, list[tuple[str, str]]] = {}
    for name, linear in model.linears.items():
        members.setdefault(form_of(linear), []).extend(
            (name, module) for module in names.modules(name)
        )

    inside = Counter(
        {form: sum(name in names.specs for name, _ in pairs) for form, pairs in members.items()}
    )
    default = inside.most_common(1)[0][0] if inside else None
    groups = {}
    for form, pairs in members.items():
        named = [module for name, module in pairs if form != default or name not in names.specs]
        groups[form] = [_EVERY_LINEAR, *named] if form == default else named

    return groups


def _ignored(model: QuantizedModel, names: Names) -> list[str]:
    """Linears that are not quantized: whatever the class would name and must not."""
    return list(_floats(model, names))


def _floats(model: QuantizedModel, names: Names) -> Iterator[str]:
    for spec in names.wiring.linears:
        if spec.layout != "experts":
            if spec.name not in model.linears:
                yield names.published(spec.name)
        elif f"{spec.name}.0" not in model.linears:
            for expert in range(names.wiring.experts):
                yield from names.expert_modules(spec, expert)


def with_quantization(model: QuantizedModel, names: Names) -> Mapping[str, Any]:
    """``config.json`` of the checkpoint, with the dtype that readers compute in."""
    section = quantization_config(model, names)
    rounded = any(form_of(linear).rounds_to_bfloat16 for linear in model.linears.values())
    dtype = torch.bfloat16 if rounded else model.dtype
    config = with_older_keys(
        {
            **model.config,
            "dtype": str(dtype).removeprefix("torch."),
            "tie_word_embeddings": model.repeats_embedding(),
        }
    )
    return {**config, "quantization_config": section} if section else config
