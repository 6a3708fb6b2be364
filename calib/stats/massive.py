"""Massive tokens: the few whose activations are hundreds of times those of all others, and the
prefix that takes their place.

    m_t = max_c |x_tc|      of token t at the input of a linear
    massive: m_t > 64 median_t(m_t)

The rule is PrefixQuant's (arXiv:2410.05265, its ``stat_utils``), here for the input of every linear
and not of the down projections alone. What ruins a static scale is that it has to hold the massive
token: its range over the median is how many steps all others are short of.

PrefixQuant takes as many prefix tokens as a row has massive ones, and the most frequent of them. On
a model whose *first* token is massive whatever it is, the most frequent one is an accident of the
text, and may not take the sink: on SmolLM2 the first word of one row left the ratio at 2069 of
2074, where a newline took it to 7. So candidates are tried, and the ones are taken that leave the
least.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from calib.errors import QuantizationError
from calib.fusing import FusedModel, materialize, with_prefix
from calib.modules.watch import watching
from calib.process.progress import Progress, silent, track

MASSIVE = 64.0
"""Times the median: PrefixQuant's threshold."""
_LOOK_TOKENS, _TRIED_TOKENS, _LOOK_LENGTH = 1024, 256, 64
"""How many calibration tokens are looked at, with each candidate, and of each row: what is massive
whatever it is stands at the beginning."""
_CANDIDATES = 2
"""How many of the most frequent massive tokens are tried beside those that begin a text."""
_WORTH = math.log(2)
"""A further token is taken where it takes at least this from the sum of the logarithms of the
ratios: where it halves one of them."""


@dataclass(frozen=True)
class MassiveInput:
    """The input of one linear, or of several that read the same values.

    Attributes:
        name: of the first linear that reads it.
        ratio: the largest magnitude of a token over the median of all tokens'.
        tokens: ids of its massive tokens, each as often as it is one.
    """

    name: str
    ratio: float
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class PrefixChoice:
    """The tokens of a prefix, and what it does.

    Attributes:
        tokens: ids; none where no token is massive, or nothing takes its place.
        before: the inputs with the largest ratios, without it.
        after: the same inputs with it.
    """

    tokens: tuple[int, ...]
    before: tuple[MassiveInput, ...]
    after: tuple[MassiveInput, ...]

    @property
    def massive(self) -> bool:
        """Whether there is a massive token."""
        return self.before[0].ratio > MASSIVE

    @property
    def reason(self) -> str:
        """Why, in words for the manifest."""
        worst = self.before[0]
        if not self.tokens:
            return f"largest over median is {worst.ratio:.0f} at {worst.name}"
        left = max(each.ratio for each in self.after)
        return (
            f"largest over median of the inputs: {worst.ratio:.0f} at {worst.name}, {left:.0f} with"
            " the prefix"
        )


def massive_inputs(
    model: nn.Module, names: Sequence[str], rows: Sequence[Tensor]
) -> list[MassiveInput]:
    """How far the largest token is from the median one, at the input of every linear.

    Args:
        model: a causal LM in eval mode.
        names: of linears that see every token, such as :attr:`Wiring.linear_names`.
        rows: token rows, int64 ``[tokens]``, of one text; all of them are held at once, a float for
            each token and linear.

    Returns:
        The largest ratio first. Linears that read the same values are there once.
    """
    device = next(model.parameters()).device
    magnitudes = Magnitudes(names)
    decoder = getattr(model, "base_model", model)  # the head's logits tell nothing of inputs
    with watching(model, inputs={name: partial(magnitudes.look, name) for name in names}):
        for batch in _batches(rows):
            decoder(input_ids=batch.to(device), use_cache=False)
    return magnitudes.ranked(rows)


class Magnitudes:
    """The largest magnitude of every token at the inputs of some linears.

    Args:
        names: of the linears.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._parts: dict[str, list[Tensor]] = {name: [] for name in names}

    def look(self, name: str, x: Tensor) -> None:
        """Take in the input ``[..., in]`` of ``name``, row after row."""
        self._parts[name].append(x.detach().abs().amax(-1).flatten().float().cpu())

    def ranked(self, rows: Sequence[Tensor]) -> list[MassiveInput]:
        """The largest ratio first, of the token ``rows`` that were run."""
        ids = torch.cat(list(rows))
        inputs: dict[bytes, MassiveInput] = {}
        for name, parts in self._parts.items():
            m = torch.cat(parts)
            unit = m.median().clamp(min=torch.finfo(torch.float32).tiny)
            massive = tuple(ids[m > MASSIVE * unit].tolist()) if m.numel() == ids.numel() else ()
            inputs.setdefault(
                m.numpy().tobytes(), MassiveInput(name, float(m.max() / unit), massive)
            )
        return sorted(inputs.values(), key=lambda each: -each.ratio)


Measure = Callable[[Sequence[int], Sequence[Tensor]], list[MassiveInput]]
"""From the tokens of a prefix, and rows, to what :func:`massive_inputs` finds behind it."""


def _batches(rows: Sequence[Tensor]) -> list[Tensor]:
    """``rows`` in their order, ``[B, T]``: all at once where they are as long as each other."""
    if len({row.numel() for row in rows}) == 1:
        return [torch.stack(list(rows))]
    return [row.unsqueeze(0) for row in rows]


def choose_prefix(
    fused: FusedModel,
    rows: Sequence[Tensor],
    starts: Sequence[int] = (),
    *,
    limit: int = 4,
    exactly: int | None = None,
    device: torch.device | str = "cpu",
    measure: Measure | None = None,
    progress: Progress = silent,
) -> PrefixChoice:
    """The prefix that leaves the least of what is massive.

    Args:
        fused: the folded model, without a prefix.
        rows: calibration rows, int64 ``[tokens]``; the beginnings of the first are looked at, 1024
            tokens together.
        starts: ids that are tried first: what begins or ends a text for this tokenizer, and marks
            such as the newline, which make good sinks.
        limit: the most tokens that the prefix may have.
        exactly: how many it shall have, whatever they are worth.
        device: where the model is run.
        measure: runs it in another way than whole, such as block by block.
        progress: called after every candidate.

    Returns:
        Without ``exactly``: no token where none is massive, or where no candidate halves a ratio of
        those that are.

    Raises:
        QuantizationError: there are tokens to choose, and nothing to choose from.
    """

    def whole(tokens: Sequence[int], some: Sequence[Tensor]) -> list[MassiveInput]:
        network = materialize(with_prefix(fused, tokens, device=device), device=device)
        return massive_inputs(network, fused.wiring.linear_names, some)

    measure = whole if measure is None else measure
    look = _some(rows, _LOOK_TOKENS)
    before = measure((), look)
    if exactly is None and before[0].ratio <= MASSIVE:
        return PrefixChoice((), tuple(before), tuple(before))

    # PrefixQuant's count: how many tokens of a row are massive, at the input that has the most
    needed = max(-(-len(each.tokens) // len(look)) for each in before)
    count = min(limit, needed) if exactly is None else exactly
    if not count:
        return PrefixChoice((), tuple(before), tuple(before))
    candidates = _candidates(fused, before, starts)
    if not candidates:
        raise QuantizationError(
            "there is no token to take for a prefix: the tokenizer names none that begins a text,"
            " and no token of the calibration text is massive",
            hint="leave --prefix out",
        )

    # a few beginnings are enough to tell candidates apart
    few = _some(rows, _TRIED_TOKENS)
    massive = {each.name for each in before if each.ratio > MASSIVE} or {before[0].name}
    tokens: tuple[int, ...] = ()
    left = _weight(measure((), few), massive)
    for _ in range(count):
        tried: dict[int, float] = {}
        for token in track(candidates, "prefix", len(candidates), progress):
            tried[token] = _weight(measure((*tokens, token), few), massive)
        best = min(tried, key=lambda token: tried[token])
        if exactly is None and left - tried[best] < _WORTH:
            break
        tokens, left = (*tokens, best), tried[best]

    if not tokens:
        return PrefixChoice((), tuple(before), tuple(before))
    return PrefixChoice(tokens, tuple(before), _same_order(before, measure(tokens, look)))


def _candidates(
    fused: FusedModel, before: Sequence[MassiveInput], starts: Sequence[int]
) -> list[int]:
    """Ids to try: ``starts`` and the most frequent massive tokens."""
    counts = Counter(token for each in before for token in each.tokens)
    frequent = [token for token, _ in counts.most_common(_CANDIDATES)]
    vocabulary = int(fused.config.vocab_size)
    return [token for token in dict.fromkeys([*starts, *frequent]) if 0 <= token < vocabulary]


def _weight(inputs: Sequence[MassiveInput], names: Collection[str]) -> float:
    """The sum of the logarithms of the ratios of ``names``."""
    return sum(math.log(each.ratio) for each in inputs if each.name in names)


def _same_order(
    before: Sequence[MassiveInput], after: Sequence[MassiveInput]
) -> tuple[MassiveInput, ...]:
    by_name: Mapping[str, MassiveInput] = {each.name: each for each in after}
    return tuple(by_name[each.name] for each in before if each.name in by_name)


def _some(rows: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The beginnings of the first rows, ``tokens`` of them together."""
    chosen: list[Tensor] = []
    for row in rows:
        part = row[: min(_LOOK_LENGTH, tokens)]
        if part.numel():
            chosen.append(part)
        tokens -= part.numel()
        if tokens <= 0:
            break
    return chosen
