"""``config.json`` read back: what its ``quantization_config`` says of each module, by the rule of
its readers (a group that names the module before one that names its class), against how the module
is quantized, and rotated while it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from backends.safetensors.compressed_tensors.stated_transforms import transform_contradictions
from backends.safetensors.file_names import CONFIG_FILE
from backends.safetensors.names import Names
from backends.safetensors.read import Bundle
from backends.stated import differing
from calib.artifact import QuantizedModel
from calib.files.reading import read_json, reason_of
from calib.schemes import PerBlock, PerToken, TensorScheme

_CLASS = "Linear"


def contradictions(bundle: Bundle, model: QuantizedModel) -> Mapping[str, Sequence[str]]:
    """See :meth:`backends.safetensors.targets.Target.contradictions`."""
    try:
        section = read_json(bundle.folder / CONFIG_FILE).get("quantization_config", {})
        found = list(_of_section(section, model)) if model.linears else []
        transforms = section.get("transform_config") or {}
        found += transform_contradictions(transforms, bundle.tensors, model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = [f"cannot be read: {reason_of(error)}"]
    return {CONFIG_FILE: found}


def _of_section(section: Mapping[str, Any], model: QuantizedModel) -> Iterator[str]:
    names = Names.of(model.config)
    yield from differing(
        section, {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    )
    groups, ignored = section["config_groups"].values(), section.get("ignore", ())
    for name, linear in model.linears.items():
        width = linear.weight.shape[1]
        for module in names.modules(name):
            group = _group(groups, module)
            if module in ignored or group is None:
                yield f"'{module}' is quantized, and it says otherwise"
                continue
            yield from _of_part(group["weights"], linear.weight_scheme, width, f"{module}'s weight")
            entering = group.get("input_activations")
            if (entering is None) != (linear.input_scheme is None):
                yield f"the input of '{module}' is said to be {entering}"
            elif entering is not None and linear.input_scheme is not None:
                yield from _of_part(entering, linear.input_scheme, width, f"{module}'s input")
    by_class = any(_CLASS in group["targets"] for group in groups)
    for name in model.kept:
        if by_class and names.parameter(name) is None and name not in names.experts:
            module = names.published(name)
            if module not in ignored:
                yield f"'ignore' lacks '{module}', which is in float"
    if (section.get("kv_cache_scheme") is None) != (model.cache is None):
        yield f"'kv_cache_scheme' is {section.get('kv_cache_scheme')!r}"


def _group(groups: Any, module: str) -> Mapping[str, Any] | None:
    found = [group for group in groups if module in group["targets"]]
    found += [group for group in groups if _CLASS in group["targets"]]
    return found[0] if found else None


def _of_part(
    stated: Mapping[str, Any], scheme: TensorScheme, width: int, what: str
) -> Iterator[str]:
    expected: dict[str, Any] = {
        "num_bits": scheme.format.bits,
        "type": "int" if scheme.format.kind == "integer" else "float",
        "symmetric": scheme.symmetric,
    }
    if isinstance(scheme.granularity, PerToken):
        expected["strategy"] = "token"
    if isinstance(scheme.granularity, PerBlock) and scheme.granularity.size < width:
        expected["group_size"] = scheme.granularity.size
    for difference in differing(stated, expected):
        yield f"of {what} {difference}"
    if bool(stated.get("dynamic")) != scheme.dynamic:
        yield f"of {what} 'dynamic' is {stated.get('dynamic')!r}"
