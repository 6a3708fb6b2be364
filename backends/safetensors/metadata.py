"""The metadata of a bundle read back: its manifest against the model, and whatever the target's own
subpackage writes besides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from backends.safetensors.file_names import MANIFEST_FILE
from backends.safetensors.manifest import dtype_name
from backends.safetensors.read import Bundle
from backends.safetensors.targets import Target
from backends.stated import config_differing, differing
from calib.artifact import QuantizedModel
from calib.schemes import tensor_scheme_to_dict


def contradictions(
    bundle: Bundle, target: Target, model: QuantizedModel
) -> Mapping[str, Sequence[str]]:
    """See :class:`backends.base.ReadsMetadata`."""
    return {
        MANIFEST_FILE: list(_of_manifest(bundle, model)),
        **target.contradictions(bundle, model),
    }


def _of_manifest(bundle: Bundle, model: QuantizedModel) -> Iterator[str]:
    manifest = bundle.manifest
    yield from differing(
        manifest.model_dump(),
        {
            "dtype": dtype_name(model.dtype),
            "model_type": model.config["model_type"],
            "scheme": model.scheme.name,
            "fingerprint": model.provenance.fingerprint,
        },
    )
    yield from config_differing(model.config, manifest.config)
    described = {name: _json(linear.description()) for name, linear in model.linears.items()}
    for name in sorted(described.keys() | manifest.linears.keys()):
        if described.get(name) != manifest.linears.get(name):
            yield f"'{name}' is described otherwise than it is quantized"
    if model.kept.keys() != manifest.kept.keys():
        apart = sorted(model.kept.keys() ^ manifest.kept.keys())
        yield f"of the linears in float it does not say the same: {', '.join(apart[:3])}"
    cache = None if model.cache is None else _json(tensor_scheme_to_dict(model.cache.scheme))
    if cache != (None if manifest.cache is None else manifest.cache.scheme):
        yield "the cache is described otherwise than it is quantized"


def _json(values: Mapping[str, object]) -> Any:
    """As a reader has them."""
    return json.loads(json.dumps(values))
