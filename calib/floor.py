"""How closely any runtime can be held to the fake-quant reference, end to end: two floors, both measured in torch.

Where activations are quantized, a difference in the last bit of a float can move a value across a rounding boundary.
Such a *flip* changes it by a whole step, and the layers after it amplify that. So two evaluations that are both right
differ by

* the **split-sum floor**: the reference against itself with every matmul summed in two halves. Where that flips
  something in most rows, as on any model of size, it is what a runtime shows as well.
* the **one-flip floor**: the reference against itself with one value in each row rounded the other way, the one that
  lies closest to a boundary. It stands in where flips are rare events (tiny models, short rows): a run of either side
  may see none or one, and no runtime can be asked for less than one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calib.artifact import QuantizedModel
from calib.perplexity import model_logits
from calib.reference import ReferenceLinear, build_reference

UNFLIPPED = 1e-5
"""Relative L2 of a row's logits that rounding in float32 alone explains; a flip moves them by 1e-3 and more."""


class Difference:
    """Relative L2, ‖a − b‖ / ‖b‖, over two streams of tensors, accumulated in float64."""

    def __init__(self) -> None:
        self._squares = self._reference = 0.0

    def add(self, values: Tensor, reference: Tensor) -> None:
        """Take in ``values`` and what they should be, of the same shape."""
        reference = reference.double().cpu()
        self._squares += float((values.double().cpu() - reference).square().sum())
        self._reference += float(reference.square().sum())

    @property
    def value(self) -> float:
        """The relative L2 of everything taken in so far."""
        return float((self._squares / max(self._reference, torch.finfo(torch.float64).tiny)) ** 0.5)


@dataclass(frozen=True)
class SplitSumFloor:
    """The split-sum floor of some rows."""

    value: float
    """Relative L2 of the logits of all rows."""
    flipped: float
    """Share of the rows in which something flipped, 0 to 1."""

    @property
    def representative(self) -> bool:
        """Whether flips are common enough that another run shows about as many."""
        return self.flipped >= 0.5


def split_sum_floor(quantized: QuantizedModel, reference: nn.Module, rows: Sequence[Tensor]) -> SplitSumFloor:
    """The reference against its split-sum variant over ``rows`` (int64 ``[tokens]``)."""
    split = model_logits(build_reference(quantized, split_sum=True))
    plain = model_logits(reference)
    total, flipped = Difference(), 0
    for row in rows:
        one, values, expected = Difference(), split(row.unsqueeze(0)), plain(row.unsqueeze(0))
        one.add(values, expected)
        total.add(values, expected)
        flipped += one.value > UNFLIPPED
    return SplitSumFloor(total.value, flipped / max(len(rows), 1))


def one_flip_floor(reference: nn.Module, rows: Sequence[Tensor]) -> float:
    """Relative L2 of logits over ``rows`` when, in each row, the value nearest to a boundary is rounded over it.

    Inputs behind an online rotation are left out: they cannot be set from outside. 0 where no integer is rounded.
    """
    linears = [
        module
        for module in reference.modules()
        if isinstance(module, ReferenceLinear) and module.rotation is None and _rounds_to_integers(module)
    ]
    if not linears:
        return 0.0
    logits = model_logits(reference)
    difference = Difference()
    for row in rows:
        ties: dict[ReferenceLinear, _Tie] = {}

        def find(linear: ReferenceLinear, x: Tensor, ties: dict[ReferenceLinear, _Tie] = ties) -> None:
            ties[linear] = _nearest_tie(linear, x)

        plain = _with_hooks(linears, find, lambda: logits(row.unsqueeze(0)))  # noqa: B023 - runs at once
        nearest = min(tie.distance for tie in ties.values())

        def flip(
            linear: ReferenceLinear, x: Tensor, ties: dict[ReferenceLinear, _Tie] = ties, nearest: float = nearest
        ) -> None:
            tie = ties.get(linear)  # an expert that only the flip sends a token to has none
            if tie is not None and tie.distance == nearest:  # q, k and v read one input: it flips for all of them
                x.view(-1)[tie.index] = tie.other

        difference.add(_with_hooks(linears, flip, lambda: logits(row.unsqueeze(0))), plain)  # noqa: B023
    return difference.value


@dataclass(frozen=True)
class _Tie:
    """The value of an input that lies nearest to a rounding boundary."""

    distance: float
    """To the boundary, in steps: 0 is a tie, 0.5 the middle of a step."""
    index: int
    """In the flattened input."""
    other: float
    """A value that rounds to the integer on the other side."""


def _nearest_tie(linear: ReferenceLinear, x: Tensor) -> _Tie:
    assert linear.source.input_scale is not None  # only linears that round to integers are looked at
    scale = linear.source.input_scale.float()
    ratio = (x / scale).flatten()
    distance, index = (0.5 - (ratio - ratio.round()).abs()).min(dim=0)
    value = ratio[index]
    other = value.round() + (1 if value > value.round() else -1)
    return _Tie(float(distance), int(index), float(other * scale))


def _rounds_to_integers(linear: ReferenceLinear) -> bool:
    scheme = linear.source.input_scheme
    return scheme is not None and scheme.format.kind == "integer"


def _with_hooks(
    linears: Sequence[ReferenceLinear], look: Callable[[ReferenceLinear, Tensor], None], run: Callable[[], Tensor]
) -> Tensor:
    """``run()`` while each linear passes a copy of its input to ``look``, which may change it."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert isinstance(module, ReferenceLinear)
        x = args[0].clone()
        look(module, x)
        return (x, *args[1:])

    handles = [linear.register_forward_pre_hook(hook) for linear in linears]
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()
