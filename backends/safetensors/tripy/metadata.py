"""``tripy.json`` read back, against the shapes of the stored tensors; and online rotations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from backends.safetensors.file_names import STATEMENT_FILE, WEIGHTS_FILE
from backends.safetensors.read import Bundle
from backends.safetensors.source import norm_keys
from backends.safetensors.stored_rotations import rotation_contradictions
from backends.stated import differing
from calib.artifact import QuantizedLinear, QuantizedModel
from calib.files.reading import read_json, reason_of

_NAMES = {"int8": "int8", "int4": "int4", "float8_e4m3": "float8"}
"""Tripy's names of the formats, as its ``tp.dtype`` has them."""


def contradictions(bundle: Bundle, model: QuantizedModel) -> Mapping[str, Sequence[str]]:
    """See :meth:`backends.safetensors.targets.Target.contradictions`."""
    try:
        stated = read_json(bundle.folder / STATEMENT_FILE)
        found = list(_of_statement(stated, bundle, model))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = [f"cannot be read: {reason_of(error)}"]
    return {
        STATEMENT_FILE: found,
        WEIGHTS_FILE: list(rotation_contradictions(bundle, model)),
    }


def _of_statement(
    stated: Mapping[str, Any], bundle: Bundle, model: QuantizedModel
) -> Iterator[str]:
    entries = bundle.manifest.tensors
    norms = {entries[key].dtype for key in norm_keys(model.config) if key in entries}
    if norms and norms != {stated["norm_dtype"]}:
        yield f"'norm_dtype' is {stated['norm_dtype']!r} instead of {sorted(norms)}"
    described = stated["linears"]
    for name in sorted(described.keys() ^ model.linears.keys()):
        yield f"'{name}' {'is' if name in described else 'is not'} in it"
    for name in sorted(described.keys() & model.linears.keys()):
        linear = model.linears[name]
        weight, scale = entries[f"{name}.weight"].shape, entries[f"{name}.weight_scale"].shape
        for difference in differing(described[name], _expected(linear, weight, scale)):
            yield f"of '{name}' {difference}"


def _expected(
    linear: QuantizedLinear, weight: Sequence[int], scale: Sequence[int]
) -> dict[str, Any]:
    """What shapes say: a scale for each row, blocks of rows of ``[in, out]``, or one for all."""
    out, width = linear.weight.shape
    blocked = len(scale) == 2
    orientation = "in, out" if list(weight) == [width, out] and blocked else "out, in"
    return {
        "quant_dtype": _NAMES[linear.weight_scheme.format.name],
        "input_dtype": (
            None if linear.input_scheme is None else _NAMES[linear.input_scheme.format.name]
        ),
        "orientation": orientation,
        "axis": None if not scale else 0,
        "block_size": weight[0] // scale[0] if blocked else None,
    }
