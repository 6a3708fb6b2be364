"""The fuser: a checkpoint and a :class:`RotationSet` to a model that computes the same function in
rotated spaces.

It walks the architecture table; nothing here knows a model family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calib.architectures import LinearSpec, Wiring
from calib.artifact.prefix import Prefix
from calib.errors import CheckpointError, UnsupportedModelError
from calib.fusing.contents import source_tensors
from calib.fusing.norms import FoldedNorm, fold_norm
from calib.fusing.state import LazyTensors
from calib.fusing.weights import rotate_bias, rotate_weight
from calib.network.skeleton import expected_tensors
from calib.process.progress import Progress, silent, track
from calib.rotations.rotation_set import RotationSet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Rows of an embedding or output head that are rotated at once: bounds the float64 copies of a large
# vocabulary.
_ROWS = 16384


@dataclass(frozen=True)
class FusedModel:
    """A folded and rotated model: tensors by their names in the transformers module tree, without
    any module.
    """

    state: Mapping[str, Tensor]
    """Every tensor of the model, in ``dtype``, on the CPU: held, or computed on every access
    (``fuse(lazy=True)``). Weights of linears are ``[out, in]``, and those of a module tree
    :class:`calib.network.layout.StockTensors`.
    """
    wiring: Wiring
    """That of the model, with a copy of its config: ``tie_word_embeddings=False``, ``dtype`` set.
    """
    rotations: RotationSet
    dtype: torch.dtype
    unused: tuple[str, ...]
    """Tensors of the checkpoint that the model has no use for; before a run
    :func:`~calib.fusing.source.check_contents` has refused them."""
    refusals: tuple[str, ...]
    """Why a stock model folder cannot hold this model; empty when it can."""
    norms_folded: bool
    """Whether every norm multiplies by one, its gain and bias folded into what reads it; else norms
    are those of the checkpoint, as it stores them.
    """
    smoothing: Mapping[str, Tensor] = field(default_factory=dict)
    """Scales folded by :mod:`calib.smoothing`, float64 ``[width]`` by the name of their group."""
    prefix: Prefix | None = None
    """Keys and values that stand before every sequence (:mod:`calib.network.prefix`)."""

    @property
    def config(self) -> PreTrainedConfig:
        """That of the model: ``wiring.config``."""
        return self.wiring.config


def fuse(
    checkpoint: Mapping[str, Tensor],
    wiring: Wiring,
    rotations: RotationSet,
    *,
    dtype: torch.dtype,
    fold_norms: bool = True,
    device: torch.device | str = "cpu",
    lazy: bool = False,
    progress: Progress = silent,
) -> FusedModel:
    """Fold every norm, then R1, R2 and the inverse of R4, into the weights of ``checkpoint``.

    One weight at a time is rotated in float64 and rounded once, to ``dtype``. The inputs are left
    unchanged. An empty ``rotations`` folds the norms alone, or nothing without ``fold_norms``.

    Args:
        checkpoint: tensors by the names of a published checkpoint or of the module tree.
        wiring: that of the model that they belong to.
        rotations: what to fold; R3 and R4 also have to run online
            (:func:`calib.network.online.attach_online`).
        dtype: floating dtype that the target computes in.
        fold_norms: fold gains and biases of norms also where no R1 needs it, which is the one that
            does. Rounding then meets weights whose columns the gains have stretched, and inputs
            without them.
        device: where the float64 products are computed.
        lazy: compute a tensor whenever it is asked for instead of all of them now. The bytes are
            the same; what is wrong with the values of a weight (NaN, overflow) is raised on access.
            ``checkpoint`` must stay open.
        progress: called after every weight; not called if ``lazy``.

    Raises:
        RotationError: a rotation that does not fit the model.
        CheckpointError: a tensor is missing, has the wrong shape, holds NaN or Inf, or overflows
            float16.
        UnsupportedModelError: the model has a parameter that the table does not know.
    """
    fuser = _Fuser(checkpoint, wiring, rotations, dtype, fold_norms, torch.device(device))
    return fuser.run(lazy, progress)


class _Fuser:
    """The state of one :func:`fuse` call, or of what its lazy result computes."""

    def __init__(
        self,
        checkpoint: Mapping[str, Tensor],
        wiring: Wiring,
        rotations: RotationSet,
        dtype: torch.dtype,
        fold_norms: bool,
        device: torch.device,
    ) -> None:
        self.wiring = wiring
        self.rotations = rotations
        self.on_device = rotations.to(device)
        self.on_device.validate(wiring)
        self.dtype = dtype
        self.folds_norms = bool(wiring.norms) and (fold_norms or rotations.r1() is not None)
        self.device = device
        self.expected = expected_tensors(wiring.config)
        self.source = source_tensors(checkpoint, wiring, self.expected)

    def run(self, lazy: bool, progress: Progress) -> FusedModel:
        self._check_coverage()
        linears = list(self.wiring.linears)
        folds = self._folds(linears) if self.folds_norms else {}
        state: Mapping[str, Tensor] = self._lazy_state(linears, folds)
        if not lazy:
            state = self._computed(state, linears, progress)

        config = deepcopy(self.wiring.config)
        config.tie_word_embeddings = False
        config.dtype = self.dtype
        return FusedModel(
            state=state,
            wiring=Wiring(self.wiring.architecture, config),
            rotations=self.rotations,
            dtype=self.dtype,
            unused=tuple(self.source.unused()),
            refusals=tuple(
                fold.refusal for fold in folds.values() if fold is not None and fold.refusal
            ),
            norms_folded=self.folds_norms,
        )

    def _check_coverage(self) -> None:
        """Every parameter must be known to the table: one that is overlooked would stay
        unrotated.
        """
        wiring = self.wiring
        known = {table.weight for table in wiring.embeddings}
        for spec in wiring.linears:
            known |= {spec.weight, spec.bias or spec.weight}
        for norm in wiring.norms:
            known |= {norm.weight, norm.bias}
        known |= wiring.untouched
        unknown = sorted(self.expected.keys() - known)
        if unknown:
            raise UnsupportedModelError(
                f"{wiring.family} models have no parameter {unknown[0]} in the architecture table",
                hint=(
                    "this version of transformers or this config has a feature that rotq does not"
                    " know"
                ),
            )

    def _lazy_state(
        self, linears: list[LinearSpec], folds: Mapping[str, FoldedNorm | None]
    ) -> LazyTensors:
        """What computes each tensor, in the order of the module tree, so that a model is always
        written the same.
        """
        compute: dict[str, Callable[[], Tensor]] = {
            name: partial(self._untouched, name) for name in self.expected
        }
        for norm, fold in folds.items():
            if fold is not None:
                compute[f"{norm}.weight"] = partial(self._gain, norm, fold)
            if fold is not None and fold.kept_bias is not None:
                compute[f"{norm}.bias"] = partial(self._rounded, f"{norm}.bias", fold.kept_bias)
        for embedding in self.wiring.embeddings:
            compute[embedding.weight] = partial(self._embedding, embedding.weight)
        for spec in linears:
            fold = folds.get(spec.norm) if spec.norm else None
            compute[spec.weight] = partial(self._weight, spec, fold)
            takes_bias = fold is not None and fold.shift is not None
            if spec.bias is not None and (spec.bias in self.expected or takes_bias):
                compute[spec.bias] = partial(self._bias, spec, spec.bias, fold)
        return LazyTensors(compute)

    def _computed(
        self, state: Mapping[str, Tensor], linears: list[LinearSpec], progress: Progress
    ) -> dict[str, Tensor]:
        """All tensors of ``state``, in its order."""
        held: dict[str, Tensor] = {}
        for spec in track(linears, "fuse", len(linears), progress):
            held |= {
                name: state[name]
                for name in (spec.weight, spec.bias)
                if name is not None and name in state
            }
        return {name: held[name] if name in held else state[name] for name in state}

    def _read(self, name: str) -> Tensor:
        return self.source.read(name).to(self.device, torch.float64)

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        # A copy, so that no tensor of the result shares memory with the checkpoint.
        rounded = tensor.to("cpu", self.dtype, copy=True).contiguous()
        if self.dtype is torch.float16 and not bool(torch.isfinite(rounded).all()):
            largest = float(tensor.abs().max())
            folded = " once its norm is folded" if self.folds_norms else ""
            raise CheckpointError(
                f"tensor {name} does not fit float16{folded}: it reaches {largest:.3g}",
                hint="fold to bfloat16 or float32: --dtype bfloat16",
            )
        return rounded

    def _untouched(self, name: str) -> Tensor:
        return self._rounded(name, self.source.read(name))

    def _folds(self, linears: list[LinearSpec]) -> dict[str, FoldedNorm | None]:
        """What becomes of every norm, by module name."""
        readers: dict[str, list[LinearSpec]] = {norm: [] for norm in self.wiring.norm_names}
        for spec in linears:
            if spec.norm is not None:
                readers[spec.norm].append(spec)
        return {norm: self._fold(norm, specs) for norm, specs in readers.items()}

    def _fold(self, name: str, readers: list[LinearSpec]) -> FoldedNorm | None:
        """Fold the norm ``name``; ``None`` for one without parameters."""
        weight, bias = f"{name}.weight", f"{name}.bias"
        if weight not in self.expected:
            return None
        return fold_norm(
            name,
            self._read(weight) + self.wiring.architecture.gain_offset,
            self._read(bias) if bias in self.expected else None,
            readers_have_bias=all(spec.bias in self.expected for spec in readers),
            r1=self.on_device.r1(),
            dtype=self.dtype,
        )

    def _gain(self, norm: str, fold: FoldedNorm) -> Tensor:
        """What the norm stores so that it multiplies by one."""
        return self._rounded(
            f"{norm}.weight", torch.ones_like(fold.gain) - self.wiring.architecture.gain_offset
        )

    def _embedding(self, name: str) -> Tensor:
        """Rows are written into the residual stream as they are: ``E <- E R1``."""
        table = self.source.read(name)
        r1 = self.on_device.r1()
        if r1 is None:
            return self._rounded(name, table)
        result = torch.empty(table.shape, dtype=self.dtype)
        for start in range(0, table.shape[0], _ROWS):
            rows = table[start : start + _ROWS].to(self.device, torch.float64)
            result[start : start + _ROWS] = self._rounded(name, r1.apply(rows))
        return result

    def _weight(self, spec: LinearSpec, fold: FoldedNorm | None) -> Tensor:
        """The weight ``[out, in]``, of experts ``[experts, out, in]``.

        Of the output head a block of rows at a time: nothing mixes them, as they leave the model.
        """
        stored = self.source.read(spec.weight)
        if spec.layout == "experts":
            return torch.stack([self._rotated(expert, spec, fold) for expert in stored])
        if spec is self.wiring.head:
            return torch.cat(
                [self._rotated(rows, spec, fold) for rows in torch.split(stored, _ROWS)]
            )
        return self._rotated(stored, spec, fold)

    def _rotated(self, stored: Tensor, spec: LinearSpec, fold: FoldedNorm | None) -> Tensor:
        weight = _upright(spec, stored.to(self.device, torch.float64))
        weight = weight if fold is None else weight * fold.gain
        weight = rotate_weight(weight, spec, self.on_device, self.wiring.sizes)
        # the memory stays in the order of the module tree, which takes it without a copy
        return _upright(spec, self._rounded(spec.weight, _upright(spec, weight)))

    def _bias(self, spec: LinearSpec, name: str, fold: FoldedNorm | None) -> Tensor:
        """The bias, with what the linear takes of its norm's: ``c + b W^T`` with the weight of
        the checkpoint.
        """
        bias = self._read(name) if name in self.expected else None
        if fold is not None and fold.shift is not None:
            stored = _upright(spec, self.source.read(spec.weight))
            parts = [
                rows.to(self.device, torch.float64) @ fold.shift
                for rows in torch.split(stored, _ROWS)
            ]
            bias = torch.cat(parts) if bias is None else bias + torch.cat(parts)
        assert bias is not None  # _lazy_state names no other
        return self._rounded(name, rotate_bias(bias, spec, self.on_device, self.wiring.sizes))


def _upright(spec: LinearSpec, weight: Tensor) -> Tensor:
    """From a checkpoint's orientation to ``[out, in]``, and back."""
    return weight.mT if spec.layout == "conv1d" else weight
