"""The fuser: a checkpoint and a :class:`RotationSet` to a model that computes the same function in rotated spaces.

It walks the architecture table; nothing here knows a model family.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calib.architectures import Architecture, LinearSpec
from calib.errors import CheckpointError, UnsupportedModelError
from calib.fusing.expected import expected_tensors
from calib.fusing.norms import FoldedNorm, fold_norm
from calib.fusing.source import SourceTensors
from calib.fusing.weights import rotate_linear
from calib.progress import Progress, silent, track
from calib.rotations.rotation_set import RotationSet

# Rows of an embedding or output head that are rotated at once: bounds the float64 copies of a large vocabulary.
_ROWS = 16384


@dataclass(frozen=True)
class FusedModel:
    """A folded and rotated model: tensors by their names in the transformers module tree, without any module."""

    state: dict[str, Tensor]
    """Every tensor of the model, in ``dtype``, on the CPU."""
    config: Any
    """A copy of the config with ``tie_word_embeddings=False`` and ``dtype`` set."""
    architecture: Architecture
    rotations: RotationSet
    dtype: torch.dtype
    unused: tuple[str, ...]
    """Tensors of the checkpoint that the model has no use for."""
    refusals: tuple[str, ...]
    """Why a stock model folder cannot hold this model; empty when it can."""


def fuse(
    checkpoint: Mapping[str, Tensor],
    config: Any,
    architecture: Architecture,
    rotations: RotationSet,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> FusedModel:
    """Fold every norm, then R1, R2 and the inverse of R4, into the weights of ``checkpoint``.

    One weight at a time is rotated in float64 and rounded once, to ``dtype``. The inputs are left unchanged. An empty
    ``rotations`` folds the norms alone.

    Args:
        checkpoint: tensors by the names of a published checkpoint or of the module tree.
        config: the config that belongs to them.
        architecture: its table entry.
        rotations: what to fold; R3 and R4 also have to run online (:func:`calib.online.attach_online`).
        dtype: floating dtype that the target computes in.
        device: where the float64 products are computed.
        progress: called after every weight.

    Raises:
        RotationError: a rotation that does not fit the model.
        CheckpointError: a tensor is missing, has the wrong shape, holds NaN or Inf, or overflows float16.
        UnsupportedModelError: the model has a parameter that the table does not know.
    """
    return _Fuser(checkpoint, config, architecture, rotations, dtype, torch.device(device)).run(progress)


class _Fuser:
    """The state of one :func:`fuse` call."""

    def __init__(
        self,
        checkpoint: Mapping[str, Tensor],
        config: Any,
        architecture: Architecture,
        rotations: RotationSet,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.architecture = architecture
        self.rotations = rotations
        self.on_device = rotations.to(device)
        self.on_device.validate(config, architecture)
        self.sizes = architecture.dimensions(config)
        self.dtype = dtype
        self.device = device
        self.expected = expected_tensors(config)
        self.source = SourceTensors(checkpoint, config, architecture, self.expected)
        self.state: dict[str, Tensor] = {}

    def run(self, progress: Progress) -> FusedModel:
        self._check_coverage()
        linears = list(self.architecture.all_linears(self.config))
        readers: dict[str, list[LinearSpec]] = {norm: [] for norm in self.architecture.norm_names(self.config)}
        for spec in linears:
            if spec.norm is not None:
                readers[spec.norm].append(spec)
        folds = {norm: self._fold(norm, specs) for norm, specs in readers.items()}
        for embedding in self.architecture.embeddings:
            self._fuse_embedding(embedding.weight)
        for spec in track(linears, "fuse", len(linears), progress):
            fold = folds.get(spec.norm) if spec.norm else None
            if spec is self.architecture.head:
                self._fuse_head(fold)
            else:
                self._fuse_linear(spec, fold)
        for name in self.expected.keys() - self.state.keys():
            self._store(name, self.source.read(name))
        # In the order of the module tree, so that the same model is always written the same.
        order = [*self.expected, *(name for name in self.state if name not in self.expected)]
        config = deepcopy(self.config)
        config.tie_word_embeddings = False
        config.dtype = self.dtype
        return FusedModel(
            state={name: self.state[name] for name in order},
            config=config,
            architecture=self.architecture,
            rotations=self.rotations,
            dtype=self.dtype,
            unused=tuple(self.source.unused()),
            refusals=tuple(fold.refusal for fold in folds.values() if fold is not None and fold.refusal),
        )

    def _check_coverage(self) -> None:
        """Every parameter must be known to the table: one that is overlooked would stay unrotated."""
        architecture = self.architecture
        known = {table.weight for table in architecture.embeddings}
        for spec in architecture.all_linears(self.config):
            known |= {spec.weight, spec.bias or spec.weight}
        for norm in architecture.all_norms(self.config):
            known |= {norm.weight, norm.bias}
        for layer in range(self.sizes.layers):
            known |= {name.replace("{i}", str(layer)) for name in architecture.untouched}
        unknown = sorted(self.expected.keys() - known)
        if unknown:
            raise UnsupportedModelError(
                f"{architecture.name} models have no parameter {unknown[0]} in the architecture table",
                hint="this version of transformers or this config has a feature that rotq does not know",
            )

    def _read(self, name: str) -> Tensor:
        return self.source.read(name).to(self.device, torch.float64)

    def _store(self, name: str, tensor: Tensor) -> None:
        self.state[name] = self._rounded(name, tensor)

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        # A copy, so that no tensor of the result shares memory with the checkpoint.
        rounded = tensor.to("cpu", self.dtype, copy=True).contiguous()
        if self.dtype is torch.float16 and not bool(torch.isfinite(rounded).all()):
            largest = float(tensor.abs().max())
            raise CheckpointError(
                f"tensor {name} does not fit float16 once its norm is folded: it reaches {largest:.3g}",
                hint="fold to bfloat16 or float32: --dtype bfloat16",
            )
        return rounded

    def _fold(self, name: str, readers: list[LinearSpec]) -> FoldedNorm | None:
        """Fold the norm ``name``; ``None`` for one without parameters."""
        weight, bias = f"{name}.weight", f"{name}.bias"
        if weight not in self.expected:
            return None
        fold = fold_norm(
            name,
            self._read(weight) + self.architecture.gain_offset,
            self._read(bias) if bias in self.expected else None,
            readers_have_bias=all(spec.bias in self.expected for spec in readers),
            r1=self.on_device.r1(),
            dtype=self.dtype,
        )
        self._store(weight, torch.ones_like(fold.gain) - self.architecture.gain_offset)
        if fold.kept_bias is not None:
            self._store(bias, fold.kept_bias)
        return fold

    def _fuse_embedding(self, name: str) -> None:
        """Rows are written into the residual stream as they are: ``E <- E R1``."""
        table = self.source.read(name)
        r1 = self.on_device.r1()
        if r1 is None:
            self._store(name, table)
            return
        result = torch.empty(table.shape, dtype=self.dtype)
        for start in range(0, table.shape[0], _ROWS):
            rows = table[start : start + _ROWS].to(self.device, torch.float64)
            result[start : start + _ROWS] = self._rounded(name, r1.apply(rows))
        self.state[name] = result

    def _fuse_linear(self, spec: LinearSpec, fold: FoldedNorm | None) -> None:
        stored = self.source.read(spec.weight)
        if spec.layout == "experts":
            experts = [self._fused(expert, None, spec, fold)[0] for expert in stored]
            self.state[spec.weight] = torch.stack(experts)
            return
        assert spec.bias is not None  # only experts lack the name of one
        bias = self._read(spec.bias) if spec.bias in self.expected else None
        weight, bias = self._fused(stored, bias, spec, fold)
        self.state[spec.weight] = weight
        if bias is not None:
            self._store(spec.bias, bias)

    def _fuse_head(self, fold: FoldedNorm | None) -> None:
        """The output head, a block of rows at a time: nothing mixes them, as they leave the model."""
        spec = self.architecture.head
        weight = self.source.read(spec.weight)
        fused = [self._fused(rows, None, spec, fold) for rows in torch.split(weight, _ROWS)]
        self.state[spec.weight] = torch.cat([rows for rows, _ in fused])
        bias = [part for _, part in fused if part is not None]
        if bias:
            self._store(f"{spec.name}.bias", torch.cat(bias))

    def _fused(
        self, stored: Tensor, bias: Tensor | None, spec: LinearSpec, fold: FoldedNorm | None
    ) -> tuple[Tensor, Tensor | None]:
        """The weight, rounded and in its stored layout, and the float64 bias."""
        weight = stored.to(self.device, torch.float64)
        weight = weight.mT if spec.layout == "conv1d" else weight
        if fold is not None:
            if fold.shift is not None:
                taken = weight @ fold.shift
                bias = taken if bias is None else bias + taken
            weight = weight * fold.gain
        weight, bias = rotate_linear(weight, bias, spec, self.on_device, self.sizes)
        weight = weight.mT if spec.layout == "conv1d" else weight
        return self._rounded(spec.weight, weight), bias
