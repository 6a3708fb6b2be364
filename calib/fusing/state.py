"""Tensors that are computed when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor


class LazyTensors(Mapping[str, Tensor]):
    """A state dict that holds no tensor: each access computes the tensor anew, and nothing is kept.

    Args:
        compute: by name, in the order of the state dict, what computes the tensor.
    """

    def __init__(self, compute: Mapping[str, Callable[[], Tensor]]) -> None:
        self._compute = dict(compute)

    def __getitem__(self, name: str) -> Tensor:
        return self._compute[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._compute  # the inherited one would compute the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._compute)

    def __len__(self) -> int:
        return len(self._compute)
