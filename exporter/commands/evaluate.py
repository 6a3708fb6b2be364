"""``rotq eval``: perplexity by the same windows of an exported folder in its runtime, and in torch
of a checkpoint or of what ``rotq calibrate`` wrote.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from backends.base import StandIn
from backends.registry import get_backend
from calib.artifact import load_artifact
from calib.artifact.files import MANIFEST
from calib.data.documents import read_documents
from calib.data.tokens import clamp_seqlen, encode
from calib.errors import CheckpointError
from calib.measure.perplexity import (
    Comparison,
    LogitsFunction,
    Perplexity,
    compare_logits,
    model_logits,
    perplexity,
)
from calib.measure.reference import build_reference
from calib.network.checkpoint import load_config, open_checkpoint
from calib.network.original import load_network
from calib.process.ambient import plain_torch
from calib.process.progress import Progress, silent, track
from exporter.parity import runtime_logits
from exporter.recipe import EMBEDDED
from exporter.reporting.exported import check_unchanged, is_export, read_report
from exporter.reporting.html import page
from exporter.run.inputs import resolve_device
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
    scored = _openable(source, device)
    beside = None if reference is None else _openable(reference, device)
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
    scored: _Scored, beside: _Scored | None, rows: Iterable[Tensor], window: int, stride: int
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


@dataclass(frozen=True)
class _Scored:
    """A model that gives logits, wherever it runs."""

    logits: LogitsFunction
    config: Any
    runtime: str
    folder: Path
    """Where its tokenizer is."""
    taken: int = 0
    """Positions that a prefix takes."""
    nbytes: int | None = None
    """Of the weights of an export."""


def _openable(source: str | PreTrainedModel, device: str) -> _Scored:
    return _opened(source, device) if isinstance(source, str) else _given(source)


def _opened(source: str, device: str) -> _Scored:
    folder = embedded_folder() if source == EMBEDDED else Path(source)
    if is_export(folder):
        return _exported(folder)
    if (folder / MANIFEST).is_file():
        return _artifact(folder, device)
    return _checkpoint(folder if source == EMBEDDED else source, device)


def _given(model: PreTrainedModel) -> _Scored:
    folder = Path(str(getattr(model, "name_or_path", "")))
    return _Scored(model_logits(model), model.config, "torch", folder)


def _exported(folder: Path) -> _Scored:
    report = read_report(folder)
    check_unchanged(folder, report)
    runtime = get_backend(report.backend).load(folder, report.target, exact=False)
    words = runtime.runtime
    if isinstance(runtime, StandIn) and runtime.not_run_in:
        words += f", not in {runtime.not_run_in}"
    taken = 0 if report.prefix is None else len(report.prefix.tokens)
    nbytes = report.layers.bytes_after
    return _Scored(runtime_logits(runtime), load_config(folder), words, folder, taken, nbytes)


def _artifact(folder: Path, device: str) -> _Scored:
    artifact = load_artifact(folder)
    model = build_reference(artifact).to(resolve_device(device))
    words, taken = "torch, fake-quantized", artifact.prefix_length
    return _Scored(model_logits(model), model.config, words, folder, taken)


def _checkpoint(source: str | Path, device: str) -> _Scored:
    config, checkpoint = load_config(source), open_checkpoint(source)
    folder = checkpoint.folder
    assert folder is not None  # it was opened from files
    floats = None if checkpoint.quantization is None else checkpoint
    model = load_network(folder, config, device=resolve_device(device), floats=floats)
    return _Scored(model_logits(model), config, "torch", folder)
