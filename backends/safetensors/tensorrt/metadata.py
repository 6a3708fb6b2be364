"""What a ``tensorrt`` bundle says of itself beside its manifest: online rotations, and four-bit
values in bytes, read here value by value as the layout's docstring has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from backends.safetensors.file_names import WEIGHTS_FILE
from backends.safetensors.read import Bundle
from backends.safetensors.stored_rotations import rotation_contradictions
from calib.architectures import wiring_of
from calib.artifact import QuantizedModel
from calib.schemes import FLOAT4, INT4

_BYTES = 64
"""Looked at of each weight: the order of nibbles is the same in all of them."""


def contradictions(bundle: Bundle, model: QuantizedModel) -> Mapping[str, Sequence[str]]:
    """See :meth:`backends.safetensors.targets.Target.contradictions`."""
    missing = list(_missing(bundle, model))
    if missing:
        return {WEIGHTS_FILE: missing}
    return {WEIGHTS_FILE: [*_nibbles(bundle, model), *rotation_contradictions(bundle, model)]}


def _missing(bundle: Bundle, model: QuantizedModel) -> Iterator[str]:
    """Tensors of a linear under the names that whoever builds the network looks for."""
    for name, linear in model.linears.items():
        parts = ["weight", "weight_scale"]
        parts += ["input_scale"] if linear.input_scale is not None else []
        for part in parts:
            if f"{name}.{part}" not in bundle.manifest.tensors:
                yield f"there is no '{name}.{part}'"


def _nibbles(bundle: Bundle, model: QuantizedModel) -> Iterator[str]:
    """Value ``2 i`` of the stored order is in the low half of byte ``i``, the next in the high
    half.
    """
    tables = {table.name for table in wiring_of(model.config).embeddings}
    for name, linear in model.linears.items():
        if linear.weight_scheme.format not in (INT4, FLOAT4):
            continue
        upright = linear.weight if name in tables else linear.weight.T
        rows = -(-2 * _BYTES // upright.shape[1])
        codes = upright[:rows].reshape(-1)[: 2 * _BYTES].to(torch.int16) % 16
        stored = bundle.tensors[f"{name}.weight"][: len(codes) // 2].to(torch.int16)
        pairs = codes[: 2 * len(stored)]
        if not torch.equal(stored, pairs[0::2] + 16 * pairs[1::2]):
            yield f"the four-bit values of '{name}' are not in the order of the layout"
