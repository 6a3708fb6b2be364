"""Perplexity and divergence, of anything that turns token ids into logits: a torch model, an ONNX
session, a server.

**Windows.** A row of L tokens has L − 1 predictions: tokens 1 … L−1, each from the tokens before
it. The model is run on windows of at most ``window`` tokens; the first scores all it can, each
further one ends ``stride`` tokens later and scores only the ``stride`` tokens that are new. So
every token is scored exactly once, with all tokens before it as context where these fit in the
window, and with at least ``window − stride + 1`` of them otherwise. Rows are never joined: no token
is predicted from another document.

The convention of GPTQ (and of most published figures) is rows of exactly ``window`` tokens from
:func:`calib.data.tokens.tokenize` with layout ``"windows"``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.arithmetic.tiles import rows_at_once
from calib.errors import DataError, QuantizationError
from calib.modules.lending import computing

LogitsFunction = Callable[[Tensor], Tensor]
"""From token ids [1, T] int64 to logits [1, T, V] of any floating dtype."""


@dataclass(frozen=True)
class Perplexity:
    """How well tokens were predicted.

    Attributes:
        nll: mean negative log-likelihood of a token, in nats.
        tokens: tokens scored.
    """

    nll: float
    tokens: int

    @property
    def value(self) -> float:
        """The perplexity, exp(nll); infinite beyond what a float can hold."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


@dataclass(frozen=True)
class Comparison:
    """How far a candidate's predictions are from the reference's, over the same tokens.

    Attributes:
        reference: perplexity of the reference.
        candidate: perplexity of the candidate.
        kl: mean KL(reference ‖ candidate) of a token's distribution, in nats.
        top1: the fraction of tokens for which both predict the same token.
        top5: the fraction of tokens for which what the reference predicts is among the five that
            the candidate finds most likely.
        row_kls: ``kl`` of each row by itself.
        row_tokens: tokens scored in each row.
    """

    reference: Perplexity
    candidate: Perplexity
    kl: float
    top1: float
    top5: float
    row_kls: tuple[float, ...]
    row_tokens: tuple[int, ...]


@dataclass(frozen=True)
class _Window:
    """Tokens ``start`` … ``end``−1 are run; they score the targets ``first`` … ``end``."""

    start: int
    end: int
    first: int


def perplexity(
    logits: LogitsFunction, rows: Iterable[Tensor], *, window: int, stride: int
) -> Perplexity:
    """The perplexity of ``rows``, weighted by token; see the module's docstring.

    Args:
        logits: what is measured.
        rows: token rows [tokens] int64, one per document; those of one token predict nothing and
            are passed over.
        window: the most tokens that ``logits`` is run on.
        stride: tokens scored by each window after the first, 1 ≤ ``stride`` ≤ ``window``. Smaller
            gives more context and takes longer.

    Raises:
        DataError: ``window`` or ``stride`` is out of range, or no row has two tokens.
        QuantizationError: the logits hold NaN or Inf.
    """
    nll, tokens = 0.0, 0
    for inputs, targets, first in _windows(rows, window, stride):
        for scores, wanted in _scored(_run(logits, inputs, "model"), targets, first):
            nll -= _picked(scores, wanted)
            tokens += wanted.numel()
    return Perplexity(nll / _some(tokens), tokens)


def compare_logits(
    reference: LogitsFunction,
    candidate: LogitsFunction,
    rows: Iterable[Tensor],
    *,
    window: int,
    stride: int,
) -> Comparison:
    """Compare two sets of predictions in one pass; arguments and errors as for :func:`perplexity`.

    Raises:
        DataError: also if the vocabularies differ.
    """
    nll_reference = nll_candidate = 0.0
    agreed = among_five = 0
    rows_found: list[tuple[float, int]] = []
    for row in rows:
        divergence, tokens = 0.0, 0
        for inputs, targets, first in _windows([row], window, stride):
            p = _run(reference, inputs, "reference")
            q = _run(candidate, inputs, "candidate").to(p.device)
            if p.shape != q.shape:
                raise DataError(
                    f"the reference has a vocabulary of {p.shape[-1]}, the candidate one of"
                    f" {q.shape[-1]}",
                    hint="Compare a model with an export of the same model.",
                )
            pairs = zip(_scored(p, targets, first), _scored(q, targets, first), strict=True)
            for (log_p, wanted), (log_q, _) in pairs:
                nll_reference -= _picked(log_p, wanted)
                nll_candidate -= _picked(log_q, wanted)
                # A sum over the vocabulary of p log(p/q): the rounding of a zero divergence can be
                # below zero.
                divergence += float((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0).sum())
                predicted = log_p.argmax(-1)
                agreed += int((predicted == log_q.argmax(-1)).sum())
                five = log_q.topk(min(5, log_q.shape[-1]), dim=-1).indices
                among_five += int((five == predicted.unsqueeze(-1)).any(-1).sum())
                tokens += wanted.numel()
        if tokens:
            rows_found.append((divergence, tokens))

    scored = _some(sum(tokens for _, tokens in rows_found))
    return Comparison(
        reference=Perplexity(nll_reference / scored, scored),
        candidate=Perplexity(nll_candidate / scored, scored),
        kl=math.fsum(divergence for divergence, _ in rows_found) / scored,
        top1=agreed / scored,
        top5=among_five / scored,
        row_kls=tuple(divergence / tokens for divergence, tokens in rows_found),
        row_tokens=tuple(tokens for _, tokens in rows_found),
    )


def model_logits(model: nn.Module) -> LogitsFunction:
    """The logits of a Hugging Face causal LM, on the device it is on, in the mode it is in."""
    device = next(model.parameters()).device

    def run(input_ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=input_ids.to(device), use_cache=False).logits
        return logits

    return run


def remembered_logits(model: nn.Module) -> LogitsFunction:
    """:func:`model_logits` of a float model that is asked for the same tokens again and again: its
    decoder runs once over them.

    What is kept is what the decoder gives the head, ``[1, T, hidden]`` for each row; logits, which
    are as many times larger as the vocabulary is, are made anew.
    """
    logits = model_logits(model)
    decoder: Any = getattr(model, "get_decoder", lambda: model)()
    if decoder is model:  # no head of its own
        return logits
    kept: dict[bytes, Any] = {}

    def run(input_ids: Tensor) -> Tensor:
        key = input_ids.cpu().numpy().tobytes()
        forward = decoder.forward

        def once(*arguments: object, **settings: object) -> Any:
            if key not in kept:
                kept[key] = forward(*arguments, **settings)
            return kept[key]

        with computing(decoder, once):
            return logits(input_ids)

    return run


def window_spans(length: int, window: int, stride: int) -> Iterator[_Window]:
    """The windows of a row of ``length`` tokens."""
    scored, end = 0, min(window, length - 1)
    while scored < length - 1:
        yield _Window(max(0, end - window), end, scored + 1)
        scored, end = end, min(end + stride, length - 1)


def _windows(
    rows: Iterable[Tensor], window: int, stride: int
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """For each window: its tokens [1, T], the targets [S], and the position whose logits score the
    first of them.
    """
    if not 1 <= stride <= window:
        raise DataError(
            f"cannot score windows of {window} tokens with a stride of {stride}",
            hint="The stride must be at least 1 and no larger than the window.",
        )
    for row in rows:
        for span in window_spans(row.numel(), window, stride):
            yield (
                row[span.start : span.end].unsqueeze(0),
                row[span.first : span.end + 1],
                span.first - 1 - span.start,
            )


def _run(logits: LogitsFunction, inputs: Tensor, name: str) -> Tensor:
    """The logits [T, V] of ``inputs`` [1, T]."""
    output = logits(inputs)
    if output.dim() != 3 or output.shape[:2] != inputs.shape:
        raise DataError(
            f"the {name} gives logits {list(output.shape)} for tokens {list(inputs.shape)}"
        )
    return output[0]


def _scored(logits: Tensor, targets: Tensor, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities [S, V] float64, and targets [S], for the positions from ``first`` on, a few
    at a time.
    """
    if logits.device.type == "mps":  # has no float64
        logits = logits.cpu()
    logits = logits[first:]
    if not bool(torch.isfinite(logits).all()):
        raise QuantizationError(
            "the logits hold NaN or Inf", hint="The model overflows in its dtype, or is damaged."
        )
    # what they become in float64 is made anew for every part: small parts stay in the cache
    positions = rows_at_once(logits)
    for some, wanted in zip(
        torch.split(logits, positions), torch.split(targets, positions), strict=True
    ):
        yield torch.log_softmax(some.double(), dim=-1), wanted.to(some.device)


def _picked(scores: Tensor, targets: Tensor) -> float:
    return float(scores.gather(1, targets.to(scores.device).unsqueeze(1)).sum())


def _some(tokens: int) -> int:
    if not tokens:
        raise DataError(
            "there is no token to score",
            hint="Give evaluation text with two tokens or more in a row.",
        )
    return tokens
