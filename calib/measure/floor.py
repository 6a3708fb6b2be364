"""How closely any runtime can be held to the fake-quant reference, end to end: floors, measured in
torch.

Where activations are quantized, a difference in the last bit of a float can move a value across a
rounding boundary. Such a *flip* changes it by a whole step, and the layers after it amplify that.
So two evaluations that are both right differ by

* the **split-sum floor**: the reference against itself with every matmul summed in two halves.
  Where that flips something in most rows, as on any model of size, it is what a runtime shows as
  well.
* the **one-flip floor**: the reference against itself with one value in each row rounded the other
  way, the one that lies closest to a boundary. It stands in where flips are rare events (tiny
  models, short rows): a run of either side may see none or one, and no runtime can be asked for
  less than one.

A graph in float16 or bfloat16 rounds every value on its way, and flips far more. It is held to

* the **naive floor**: the same fake-quant computed in torch in that dtype, against float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from calib.arithmetic.inputs import input_steps
from calib.arithmetic.rounding import neighbours, round_to_format
from calib.arithmetic.tiles import rows_at_once
from calib.artifact import QuantizedModel
from calib.measure.perplexity import LogitsFunction, model_logits
from calib.measure.reference import ReferenceLinear, build_reference, split_sums
from calib.modules.watch import watching
from calib.network.kv_cache import CacheRounding, attached_caches
from calib.schemes import NumberFormat

_QUOTIENT_ULPS = 2
UNFLIPPED = 1e-5
"""Relative L2 of a row's logits that rounding in float32 alone explains; a flip moves them by 1e-3
and more.
"""


class Difference:
    """Relative L2, ‖a − b‖ / ‖b‖, over two streams of tensors, accumulated in float64."""

    def __init__(self) -> None:
        self._squares = self._reference = 0.0

    def add(self, values: Tensor, reference: Tensor) -> None:
        """Take in ``values`` and what they should be, of the same shape."""
        rows, wanted = (x.cpu().reshape(-1, x.shape[-1]) for x in (values, reference))
        size = rows_at_once(rows)
        for some, should in zip(torch.split(rows, size), torch.split(wanted, size), strict=True):
            exact = should.double()
            self._reference += float(exact.square().sum())
            self._squares += float(exact.sub_(some).square().sum())

    def include(self, other: Difference) -> None:
        """Take in all that ``other`` has taken in."""
        self._squares += other._squares
        self._reference += other._reference

    @property
    def value(self) -> float:
        """The relative L2 of everything taken in so far."""
        return float((self._squares / max(self._reference, torch.finfo(torch.float64).tiny)) ** 0.5)


@dataclass(frozen=True)
class Distances:
    """How far logits are from the reference's, over some rows."""

    total: Difference = field(default_factory=Difference)
    of_rows: list[float] = field(default_factory=list)
    """Relative L2 of each row."""

    def add(self, values: Tensor, reference: Tensor) -> None:
        """Take in the logits of one row, and what they should be."""
        one = Difference()
        one.add(values, reference)
        self.total.include(one)
        self.of_rows.append(one.value)

    @property
    def value(self) -> float:
        """Relative L2 of the logits of all rows."""
        return self.total.value

    @property
    def flipped(self) -> float:
        """Share of the rows in which something flipped, 0 to 1."""
        flips = sum(value > UNFLIPPED for value in self.of_rows)
        return flips / max(len(self.of_rows), 1)

    @property
    def representative(self) -> bool:
        """Whether flips are common enough that another run shows about as many."""
        return self.flipped >= 0.5


def distances(
    reference: LogitsFunction,
    others: Mapping[str, LogitsFunction],
    rows: Iterable[Tensor],
    *,
    last: bool = False,
) -> dict[str, Distances]:
    """How far each of ``others`` is from ``reference``, which runs once over each row.

    Args:
        reference: what the others should compute.
        others: by name. One that gives the logits ``[1, n, V]`` of the last tokens only is held
            against these.
        rows: token rows, int64 ``[tokens]``.
        last: compare the logits of the last token only.
    """
    found = {name: Distances() for name in others}
    for row in rows if others else ():
        ids = row.unsqueeze(0)
        expected = reference(ids)
        for name, logits in others.items():
            values = logits(ids)
            shown = slice(-1, None) if last else slice(-values.shape[1], None)
            found[name].add(values[:, shown], expected[:, shown])
    return found


def split_logits(reference: nn.Module) -> LogitsFunction:
    """The logits of ``reference`` with every matmul summed in two halves."""
    logits = model_logits(reference)

    def run(ids: Tensor) -> Tensor:
        with split_sums(reference):
            return logits(ids)

    return run


def split_sum_floor(
    reference: nn.Module, rows: Sequence[Tensor], *, last: bool = False
) -> Distances:
    """The reference against its split-sum variant over ``rows`` (int64 ``[tokens]``), or over their
    ``last`` logits.
    """
    others = {"split": split_logits(reference)}
    return distances(model_logits(reference), others, rows, last=last)["split"]


def naive_logits(quantized: QuantizedModel, dtype: torch.dtype | None = None) -> LogitsFunction:
    """The logits of the naive path in ``dtype``.

    ``dtype`` is the artifact's unless another is given: a runtime may compute in a shorter one of
    its own accord.
    """
    return model_logits(build_reference(quantized, dtype=dtype or quantized.dtype))


def naive_floor(
    quantized: QuantizedModel,
    reference: nn.Module,
    rows: Sequence[Tensor],
    *,
    last: bool = False,
    dtype: torch.dtype | None = None,
) -> float:
    """Relative L2 of logits over ``rows`` of the naive path in ``dtype`` against the float32
    reference; arguments as for :func:`naive_logits`.
    """
    others = {"naive": naive_logits(quantized, dtype)}
    return distances(model_logits(reference), others, rows, last=last)["naive"].value


def one_flip_floor(reference: nn.Module, rows: Sequence[Tensor], *, last: bool = False) -> float:
    """Relative L2 of logits over ``rows`` when, in each row, the value nearest to a boundary is
    rounded over it.

    Inputs of linears and cached keys and values count. Inputs behind an online rotation are left
    out: they cannot be set from outside. 0 where nothing is rounded.
    """
    whole = model_logits(reference)
    logits = (lambda ids: whole(ids)[:, -1:]) if last else whole
    difference = Difference()
    for row in rows:
        ties: dict[_Place, _Tie] = {}

        def find(place: _Place, x: Tensor, steps: _Steps, ties: dict[_Place, _Tie] = ties) -> None:
            ties[place] = _nearest_tie(x, *steps)

        run = partial(logits, row.unsqueeze(0))
        plain = _watched(reference, find, run)
        if not ties:
            return 0.0
        nearest = min(tie.distance for tie in ties.values())

        def flip(
            place: _Place,
            x: Tensor,
            steps: _Steps,
            ties: dict[_Place, _Tie] = ties,
            nearest: float = nearest,
        ) -> None:
            tie = ties.get(place)  # an expert that only the flip sends a token to has none
            # q, k and v read one input: it flips for all of them
            if tie is not None and tie.distance == nearest:
                x.view(-1)[tie.index] = tie.other

        difference.add(_watched(reference, flip, run), plain)
    return difference.value


def settled(linear: ReferenceLinear, x: Tensor, found: Tensor) -> tuple[Tensor, int]:
    """What ``linear`` makes of ``x``, inputs that lie on a rounding boundary rounded to the side
    that suits ``found``.

    ``x / s``, ``x (1 / s)`` and ``(x - low) / (high - low) 255`` are right ways to the same number,
    up to two units in the last place of the format's largest number apart. A value that close to a
    boundary may be rounded to either side, which moves the output by ``(n - q) s`` times a column
    of the weight, here tried one by one.

    Args:
        linear: the linear.
        x: its input ``[..., in]``, behind any online rotation.
        found: the output ``[..., out]`` of a runtime on the same input.

    Returns:
        The output ``[..., out]``, and how many inputs were rounded to the other side.
    """
    expected = linear.matmul(linear.quantize(x))
    found_steps = _input_steps(linear, x)
    if found_steps is None:
        return expected, 0

    steps, zero, fmt = found_steps
    ratio, here, other = _around(x, steps, zero, fmt)
    near = (ratio - (here + other) / 2).abs() <= _QUOTIENT_ULPS * torch.finfo(
        x.dtype
    ).eps * fmt.maxbound
    moved = ((other - here) * steps).reshape(-1, x.shape[-1])
    weight, rows, wanted = (
        cast(Tensor, linear.weight),
        expected.flatten(0, -2),
        found.to(expected).flatten(0, -2),
    )
    flips = 0
    for row, column in near.reshape(moved.shape).nonzero().tolist():
        flipped = rows[row] + moved[row, column] * weight[:, column]
        if (wanted[row] - flipped).norm() < (wanted[row] - rows[row]).norm():
            rows[row] = flipped
            flips += 1
    return rows.view(expected.shape), flips


_Place = tuple[str, str]
"""A place where values are rounded: the name of a linear with ``input``, or that of an attention
with ``key`` or ``value``.
"""
_Steps = tuple[Tensor, Tensor | None, NumberFormat]
"""Scale and zero point of every value there, and the format that it is rounded to."""


@dataclass(frozen=True)
class _Tie:
    """The value that lies nearest to a rounding boundary."""

    distance: float
    """To the boundary, in steps: 0 is a tie, 0.5 the middle of a step."""
    index: int
    """In the flattened tensor."""
    other: float
    """A value that rounds to the number on the other side."""


def _nearest_tie(x: Tensor, scale: Tensor, zero: Tensor | None, fmt: NumberFormat) -> _Tie:
    """By the two numbers around ``x / s + z``."""
    ratio, here, other = _around(x, scale, zero, fmt)
    step = (other - here).abs()
    # no step beyond the ends
    distance = torch.where(step > 0, 0.5 - (ratio - here).abs() / step, torch.inf).flatten()
    index = int(distance.argmin())
    values = other * scale if zero is None else (other - zero) * scale
    return _Tie(float(distance[index]), index, float(values.flatten()[index]))


def _around(
    x: Tensor, scale: Tensor, zero: Tensor | None, fmt: NumberFormat
) -> tuple[Tensor, Tensor, Tensor]:
    """``x / s + z``, the number that it is rounded to, and the next one on its other side; the same
    beyond the ends.

    A zero point moves integers by a whole number, and so no boundary, but it moves the ends.
    """
    ratio = x / scale if zero is None else x / scale + zero
    here = round_to_format(ratio, fmt)
    below, above = neighbours(here, fmt)
    return ratio, here, torch.where(ratio > here, above, below)


def _input_steps(linear: ReferenceLinear, x: Tensor) -> _Steps | None:
    """How ``linear`` rounds its input ``x``; ``None`` where it does not."""
    source = linear.source
    if source.input_scheme is None:
        return None
    scale, zero = (
        None if part is None else part.to(x)
        for part in (source.input_scale, source.input_zero_point)
    )
    return *input_steps(x, source.input_scheme, scale, zero), source.input_scheme.format


def _watched(
    reference: nn.Module, look: Callable[[_Place, Tensor, _Steps], None], run: Callable[[], Tensor]
) -> Tensor:
    """``run()`` while whatever is rounded is passed to ``look`` first, as a copy that it may
    change.
    """

    def at_input(name: str, linear: ReferenceLinear, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        steps = _input_steps(linear, x)
        assert steps is not None  # watched for its sake
        look((name, "input"), x, steps)
        return x

    def at_cache(
        name: str, rounding: CacheRounding, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        key, value = (part.clone(memory_format=torch.contiguous_format) for part in (key, value))
        look((name, "key"), key, (rounding.key_scale, None, rounding.scheme.format))
        look((name, "value"), value, (rounding.value_scale, None, rounding.scheme.format))
        return key, value

    inputs = {
        name: partial(at_input, name, module)
        for name, module in reference.named_modules()
        if isinstance(module, ReferenceLinear)
        and module.rotation is None
        and module.source.input_scheme is not None
    }
    caches = {
        name: partial(at_cache, name, rounding)
        for name, rounding in attached_caches(reference).items()
    }
    # an expert may see no token in a row
    with watching(reference, inputs=inputs, caches=caches, optional=True):
        return run()
