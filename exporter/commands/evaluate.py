"""``rotq eval``: perplexity by the same windows of an exported folder in its runtime, and in torch
of a checkpoint or of what ``rotq calibrate`` wrote.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from calib.data.documents import read_documents
from calib.data.tokens import clamp_seqlen, encode
from calib.errors import CheckpointError
from calib.measure.perplexity import (
    Comparison,
    Perplexity,
    compare_logits,
    perplexity,
)
from calib.process.ambient import plain_torch
from calib.process.progress import Progress, silent, track
from exporter.commands.opened import Opened, opened
from exporter.reporting.html import page
from exporter.source import embedded_folder, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class Divergence:
    """How far predictions are from those of a reference, over the same tokens."""

    reference: str
    perplexity: float
    """Of the reference."""
    kl: float
    """Mean KL(reference || source) of a token's distribution, in nats."""
    top1: float
    """Share of tokens for which both find the same next token most likely, 0 to 1."""
    top5: float
    """Share for which that of the reference is among the five most likely, 0 to 1."""


@dataclass(frozen=True)
class EvalResult:
    """A perplexity and what it was measured on."""

    perplexity: float
    nll: float
    """Mean negative log-likelihood of a token, in nats."""
    tokens: int
    """Tokens scored."""
    runtime: str
    """What ran it, as its backend calls it, or ``torch``."""
    nbytes: int | None = None
    """Of the weights of an exported folder; ``None`` of anything else."""
    divergence: Divergence | None = None
    """Where there was a reference."""

    def _repr_html_(self) -> str:
        """For notebooks."""
        facts = {"tokens": self.tokens, "nats per token": f"{self.nll:.5f}", "in": self.runtime}
        if self.divergence is not None:
            facts |= {"KL": f"{self.divergence.kl:.4g}", "top-1": f"{self.divergence.top1:.2%}"}
        return page(f"perplexity {self.perplexity:.4f}", facts)


@plain_torch()
def evaluate(
    source: str | PreTrainedModel,
    text: str | None,
    *,
    reference: str | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    window: int | None = None,
    stride: int | None = None,
    nsamples: int | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> EvalResult:
    """Score every token of a text once, with as much context as the window gives.

    Args:
        source: an exported folder, one of ``rotq calibrate``, a checkpoint folder, a hub id, or
            ``embedded``; or a Hugging Face model object, which runs where it is.
        text: local .txt (one document a line), .jsonl or .parquet file, or hub data set; ``None``:
            the embedded evaluation text.
        reference: what predictions are compared with, as for ``source``: the float model, say.
        tokenizer: instead of that of the source; a model object needs it, unless it is of a folder.
        window: the most tokens the model sees at once; by default 2048 or the model's positions, if
            fewer.
        stride: tokens by which windows move on; by default the window (no overlap).
        nsamples: score only this many documents.
        device: where a checkpoint runs.
        progress: called after each document.

    Raises:
        RotqError: the model or the text cannot be read, or an exported folder was edited.
    """
    # before the model, which takes longer
    documents = read_documents(text or str(embedded_folder() / "evaluation.txt"), limit=nsamples)
    scored = opened(source, device)
    beside = None if reference is None else opened(reference, device)
    tokenizer = tokenizer or load_tokenizer(scored.folder)
    window = clamp_seqlen(window or DEFAULT_WINDOW, scored.config, scored.taken)
    if beside is not None:
        window = clamp_seqlen(window, beside.config, beside.taken)

    encoded = (encode(document, tokenizer) for document in documents)
    rows = track(encoded, "eval", len(documents), progress)
    mean, found = _scores(scored, beside, rows, window, stride or window)
    divergence = None
    if found is not None:
        name = reference if isinstance(reference, str) else "the model given"
        own = found.reference.value
        divergence = Divergence(name, own, found.kl, found.top1, found.top5)
    return EvalResult(mean.value, mean.nll, mean.tokens, scored.runtime, scored.nbytes, divergence)


def _scores(
    scored: Opened, beside: Opened | None, rows: Iterable[Tensor], window: int, stride: int
) -> tuple[Perplexity, Comparison | None]:
    """The perplexity of ``scored``, and how far it is from ``beside`` if there is that.

    Raises:
        CheckpointError: no row holds a token to predict.
    """
    long_enough = (row for row in rows if row.numel() > 1)
    first = next(long_enough, None)
    if first is None:
        raise CheckpointError(
            "the evaluation text holds no token to predict", hint="give a longer text with --text"
        )
    used = itertools.chain([first], long_enough)
    if beside is None:
        return perplexity(scored.logits, used, window=window, stride=stride), None
    found = compare_logits(beside.logits, scored.logits, used, window=window, stride=stride)
    return found.candidate, found
