"""Weights in the one orientation of rotq, ``[out, in]``, and as transformers' module tree stores
them.

A linear is ``[out, in]`` from the fuser to the artifact. GPT-2's Conv1D stores ``[in, out]``, which
counts at two borders only: where a checkpoint is read (:mod:`calib.fusing`), and where tensors
enter or leave a module tree, which is here. Both ways are views, so that nothing is copied, and a
model that is loaded again computes with the memory layout that it always had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from calib.architectures import Wiring


class StockTensors(Mapping[str, Tensor]):
    """Tensors in rotq's orientation, each turned when it is asked for to what a stock module tree
    holds.

    Args:
        tensors: by checkpoint key.
        wiring: that of the model.
    """

    def __init__(self, tensors: Mapping[str, Tensor], wiring: Wiring) -> None:
        self._tensors = tensors
        self._turned = wiring.turned_weights

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._tensors[key]
        # contiguous as a checkpoint's: products of a view may round differently
        return tensor.mT.contiguous() if key in self._turned else tensor

    def __contains__(self, key: object) -> bool:
        return key in self._tensors  # the inherited one would read the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def oriented(state: Mapping[str, Tensor], wiring: Wiring) -> dict[str, Tensor]:
    """The inverse of :class:`StockTensors`: the state of a module tree, its weights ``[out, in]``
    as views.
    """
    turned = wiring.turned_weights
    return {key: tensor.mT if key in turned else tensor for key, tensor in state.items()}
