"""Which layout a ``quantization_config`` means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from calib.errors import CheckpointError
from calib.network.quantized import awq, gptq, int4_bytes, mxfp4, packed, scaled
from calib.network.quantized.weight import Header, Reader, Weight, malformed

_READERS: Mapping[str, tuple[Reader, ...]] = {
    "fp8": (scaled.weights,),
    "fbgemm_fp8": (scaled.weights,),
    "compressed-tensors": (packed.weights, scaled.weights),
    "modelopt": (int4_bytes.weights, scaled.weights),
    "gptq": (gptq.weights,),
    "awq": (awq.weights,),
    "mxfp4": (mxfp4.weights,),
}
"""By ``quant_method``: the layouts that its checkpoints hold."""
_DETAILS = ("format", "fmt", "quant_algo", "bits", "weight_block_size")
"""Keys of a config that say more of the layout, as far as they are there."""
_OF_ACTIVATIONS = re.compile(
    r"\.(input|output|activation|q|k|v|prob)_(scale|scale_inv|zero_point|global_scale)$"
)
"""Tensors that are about inputs and caches, which a float model has no use for."""
_LEFT = ("F8_E4M3", "F8_E5M2", "I8", "U8")
"""Dtypes of weights that a scale belongs to."""


@dataclass(frozen=True)
class Decoded:
    """The tensors of a quantized checkpoint as a float one has them."""

    weights: Mapping[str, Weight]
    """Those that are computed, by name."""
    kept: tuple[str, ...]
    """Names of those that are stored in float."""


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized."""

    method: str
    """``quant_method`` of its config."""
    settings: Mapping[str, object]
    """Its ``quantization_config``."""

    @property
    def words(self) -> str:
        """For messages and reports: the method, and what else the config says of the layout."""
        said = [
            f"{key} {self.settings[key]}"
            for key in _DETAILS
            if isinstance(self.settings.get(key), str | int | list)
        ]
        return ", ".join([self.method, *said])

    def decoded(self, stored: Mapping[str, Header]) -> Decoded:
        """What the checkpoint holds.

        Args:
            stored: headers of all its tensors.

        Raises:
            CheckpointError: a weight lacks its scale, or has one of the wrong shape; or none is
                quantized.
        """
        weights: dict[str, Weight] = {}
        for read in _READERS[self.method]:
            weights |= {weight.name: weight for weight in read(stored, self.settings)}
        if not weights and not any(stored[name].dtype in _LEFT for name in stored):
            raise CheckpointError(
                f"the quantization_config says {self.method}, and no tensor is quantized so",
                hint="use the config.json that belongs to these weights",
            )
        used = {name for weight in weights.values() for name in weight.parts.values()}
        kept = tuple(
            name for name in stored if name not in used and not _OF_ACTIVATIONS.search(name)
        )
        for name in kept:
            if name.endswith(".weight") and stored[name].dtype in _LEFT:
                raise malformed(
                    name, f"it is stored in {stored[name].dtype}, and its scale is missing"
                )
        return Decoded(weights, kept)


def quantization_of(config: Mapping[str, object]) -> Quantization | None:
    """How the checkpoint of a config is quantized; ``None`` for a float one, and for a method that
    rotq does not read.

    Args:
        config: the content of config.json.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return None
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        return None
    return Quantization(method, settings)
