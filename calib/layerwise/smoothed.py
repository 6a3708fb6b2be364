"""Scales of an earlier smoothing folded into a model whose tensors are computed on access."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from calib.fusing import FusedModel
from calib.smoothing.fold import fold_scales
from calib.smoothing.groups import smoothing_groups


def fold_all_lazily(fused: FusedModel, scales: Mapping[str, Tensor]) -> FusedModel:
    """:func:`calib.smoothing.smooth.fold_all`, the tensors of one decoder layer at a time in
    memory.
    """
    if not scales:
        return fused
    return replace(fused, state=_Smoothed(fused, scales), smoothing=dict(scales))


class _Smoothed(Mapping[str, Tensor]):
    """The tensors of ``fused`` with ``scales`` folded; those of the layer that was asked for last
    are kept, as a scale changes several of them.
    """

    def __init__(self, fused: FusedModel, scales: Mapping[str, Tensor]) -> None:
        self._fused = fused
        self._scales = scales
        self._blocks = {f"{fused.wiring.block(layer)}.": layer for layer in fused.wiring.layers}
        self._layer = -1
        self._held: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> Tensor:
        block = next((name for name in self._blocks if key.startswith(name)), None)
        if block is None:
            return self._fused.state[key]
        if self._blocks[block] != self._layer:
            self._held = {}  # freed before the next one is computed
            self._held, self._layer = self._folded(block), self._blocks[block]
        return self._held[key]

    def __contains__(self, key: object) -> bool:
        return key in self._fused.state  # the inherited one would compute the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._fused.state)

    def __len__(self) -> int:
        return len(self._fused.state)

    def _folded(self, block: str) -> dict[str, Tensor]:
        wiring, rotations = self._fused.wiring, self._fused.rotations
        state = {key: self._fused.state[key] for key in self if key.startswith(block)}
        groups, _ = smoothing_groups(wiring, rotations, self._blocks[block])
        for group in groups:
            if group.name in self._scales:
                fold_scales(state, group, self._scales[group.name], wiring)
        return state
