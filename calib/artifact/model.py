"""The :class:`QuantizedModel`: everything a backend needs, with no module, no packing and no
runtime's key names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from calib.architectures import wiring_of
from calib.arithmetic.grids import Grid, dequantize
from calib.artifact.prefix import Prefix
from calib.rotations.rotation_set import RotationSet
from calib.schemes import (
    LinearScheme,
    Scheme,
    TensorScheme,
    tensor_scheme_to_dict,
)


class LinearPart(NamedTuple):
    """A tensor of a :class:`QuantizedLinear`."""

    kind: Literal["quantized weight", "scale", "zero point", "float weight", "other"]
    by_row: bool = False
    """It has a row for each output; scales and zero points unless there is one per tensor."""


PARTS: Mapping[str, LinearPart] = {
    "weight": LinearPart("quantized weight", by_row=True),
    "weight_scale": LinearPart("scale", by_row=True),
    "weight_zero_point": LinearPart("zero point", by_row=True),
    "weight_second_scale": LinearPart("scale"),
    "weight_order": LinearPart("other"),
    "bias": LinearPart("float weight", by_row=True),
    "input_scale": LinearPart("scale"),
    "input_zero_point": LinearPart("zero point"),
}
"""Tensors of a :class:`QuantizedLinear`; they are stored under its name, a dot and theirs."""
LINEAR_PARTS = tuple(PARTS)
OPTIONAL_PARTS = LINEAR_PARTS[2:]
"""Those that a linear may be without."""


@dataclass(frozen=True)
class QuantizedLinear:
    """One quantized linear ``y = x W^T + b``, in the orientation and order of the source model.

    Attributes:
        name: dotted module path in the source model.
        weight: stored values ``[out, in]``, unpacked: int8 storage for integer formats, float8 for
            float8, E2M1 codes in uint8 for float4.
        weight_scale: shape by ``weight_scheme.granularity`` (:mod:`calib.schemes`), in the compute
            dtype; float32 holding E4M3 numbers or powers of two where the scheme stores scales so.
        weight_scheme: format and granularity of the weight.
        bias: ``[out]`` in the compute dtype, or ``None``.
        input_scheme: format and granularity of the input, or ``None`` where the input stays in
            float.
        input_scale: what was calibrated of the input: shape ``[]``, or ``[in]`` per cluster, in the
            compute dtype; for NVFP4 the second-level scale, float32 ``[]``; ``None`` where nothing
            was.
        online_rotation: name in :attr:`QuantizedModel.rotations` of the rotation that acts on the
            input before it is quantized, or ``None``.
        weight_zero_point: integers in the dtype and shape of ``weight_scale``; ``None`` when
            symmetric.
        weight_second_scale: float32 ``[]``, the factor of every ``weight_scale`` (NVFP4), else
            ``None``.
        weight_order: int64 ``[in]`` where scales follow another order of the input features (GPTQ's
            act-order with groups of its own): column ``p`` of ``weight`` is input feature
            ``weight_order[p]``. Else ``None``.
        input_zero_point: integer in the dtype and shape of ``input_scale``; ``None`` when symmetric
            or dynamic.
    """

    name: str
    weight: Tensor
    weight_scale: Tensor
    weight_scheme: TensorScheme
    bias: Tensor | None
    input_scheme: TensorScheme | None
    input_scale: Tensor | None
    online_rotation: str | None
    weight_zero_point: Tensor | None = None
    weight_second_scale: Tensor | None = None
    weight_order: Tensor | None = None
    input_zero_point: Tensor | None = None

    @property
    def grid(self) -> Grid:
        """Scales and zero points of the weight."""
        return Grid(self.weight_scale, self.weight_zero_point, self.weight_second_scale)

    def values(self) -> Tensor:
        """The float32 weight ``[out, in]`` that is stored, its columns in the order of the input
        features.
        """
        values = dequantize(self.weight, self.grid, self.weight_scheme)
        return values if self.weight_order is None else values[:, self.weight_order.argsort()]

    def description(self) -> dict[str, Any]:
        """All that is no tensor, as JSON values."""
        return {
            "weight": tensor_scheme_to_dict(self.weight_scheme),
            "input": None
            if self.input_scheme is None
            else tensor_scheme_to_dict(self.input_scheme),
            "online_rotation": self.online_rotation,
        }

    def tensors(self) -> dict[str, Tensor]:
        """What there is of :data:`LINEAR_PARTS`, by the keys under which it is stored."""
        parts = ((part, getattr(self, part)) for part in LINEAR_PARTS)
        return {
            f"{self.name}.{part}": tensor.contiguous()
            for part, tensor in parts
            if tensor is not None
        }


@dataclass(frozen=True)
class QuantizedCache:
    """How cached keys (after RoPE and R3) and values are quantized: one static scale each for a
    layer.

    Attributes:
        scheme: format of both.
        key_scale: ``[]`` in the compute dtype, by layer.
        value_scale: the same.
    """

    scheme: TensorScheme
    key_scale: Mapping[int, Tensor]
    value_scale: Mapping[int, Tensor]


@dataclass(frozen=True)
class Provenance:
    """Where a quantized model came from."""

    source: str
    """Folder or hub id of the float checkpoint."""
    fingerprint: str
    """SHA-256 of the source weights."""
    recipe: dict[str, Any]
    parameters: int
    """Elements of the source weights."""
    nbytes: int
    """Bytes of the source weights, in their own dtypes."""
    calibration_rows: int
    calibration_tokens: int
    calibration_sha256: str
    """SHA-256 over the calibration token ids."""
    versions: dict[str, str]
    gate: tuple[dict[str, Any], ...] = ()
    """The candidates that the rotations were chosen from, where there was a choice; rows of the
    report's gate table.
    """
    rotation_gate: tuple[dict[str, Any], ...] = ()
    """The candidates that each rotation was chosen from, with their errors."""
    massive: tuple[dict[str, Any], ...] = ()
    """The inputs with massive tokens: ``name``, ``ratio`` (largest over median) and
    ``with_prefix``."""
    training: tuple[dict[str, Any], ...] = ()
    """How the training of each rotation went: ``rotation``, ``objective``, ``losses``,
    ``held_out_errors`` and ``note``."""
    cpu: str = ""
    """Name and extensions of the processor that it was calibrated on; empty, as ``threads`` is
    ``None``, where nobody said."""
    threads: int | None = None
    """Threads that torch computed with: other numbers of them sum floats in another order."""
    quantized: str | None = None
    """How the checkpoint was quantized that the float weights were read from, in words."""


@dataclass(frozen=True)
class QuantizedModel:
    """A rotated, calibrated, quantized model, independent of any runtime. Frozen; the tensors may
    be memory-mapped.

    Attributes:
        config: the Hugging Face config as a dictionary, with ``tie_word_embeddings`` false.
        scheme: the preset that the linears were quantized with, but for the overrides of single
            ones.
        dtype: what the target computes in; dtype of every float tensor and scale here.
        linears: by module name, in topological order; an embedding that was asked for is one of
            them.
        floats: every other tensor of the model by its checkpoint key: embeddings, norms, float
            linears, whose weights are ``[out, in]`` as well.
        kept: linears left in float, with the reason.
        rotations: all rotations, folded and online.
        provenance: where it came from.
        files: files of the source checkpoint that travel along, by name.
        cache: the KV cache, where it is quantized.
        prefix: keys and values that stand before every sequence, in float.
        smoothing: scales folded by :mod:`calib.smoothing`, float64 ``[width]`` by the name of their
            group.
        norms_folded: whether the norms of the source were folded into what reads them; without it
            they are among :attr:`floats` as the source stores them. As ``smoothing``, what the
            float model takes to be fused the same again.
    """

    config: dict[str, Any]
    scheme: Scheme
    dtype: torch.dtype
    linears: Mapping[str, QuantizedLinear]
    floats: Mapping[str, Tensor]
    kept: Mapping[str, str]
    rotations: RotationSet
    provenance: Provenance
    files: Mapping[str, Path] = field(default_factory=dict)
    cache: QuantizedCache | None = None
    smoothing: Mapping[str, Tensor] = field(default_factory=dict)
    prefix: Prefix | None = None
    norms_folded: bool = True

    @property
    def prefix_length(self) -> int:
        """Positions before those of every text; 0 where there is no prefix."""
        return 0 if self.prefix is None else self.prefix.length

    @property
    def by_blocks(self) -> bool:
        """Whether it was quantized block by block, and so is taken not to fit into memory."""
        return bool(self.provenance.recipe.get("layerwise", {}).get("enabled"))

    def repeats_embedding(self) -> bool:
        """Whether the output head has the table of the embedding once more, bit for bit: no
        rotation, norm or scheme parts the two. Where norms are folded that is not looked at.
        """
        if self.norms_folded:
            return False
        wiring = wiring_of(self.config)
        head = self.floats.get(wiring.head.weight)
        table = self.floats.get(wiring.embeddings[0].weight)
        return head is not None and table is not None and torch.equal(head, table)

    def schemes(self) -> dict[str, LinearScheme]:
        """How each quantized linear is quantized, by name."""
        return {
            name: LinearScheme(part.weight_scheme, part.input_scheme)
            for name, part in self.linears.items()
        }
