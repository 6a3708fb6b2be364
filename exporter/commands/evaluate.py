"""``rotq eval``: perplexity by the same windows of an exported folder in its runtime, and in torch
of a checkpoint or of what ``rotq calibrate`` wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.base import StandIn
from backends.registry import get_backend
from calib.artifact import load_artifact
from calib.artifact.files import MANIFEST
from calib.data.documents import read_documents
from calib.data.tokens import clamp_seqlen, encode
from calib.errors import CheckpointError
from calib.measure.perplexity import LogitsFunction, Perplexity, model_logits, perplexity
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
class EvalResult:
    """A perplexity and what it was measured on."""

    perplexity: float
    nll: float
    """Mean negative log-likelihood of a token, in nats."""
    tokens: int
    """Tokens scored."""
    runtime: str
    """What ran it, as its backend calls it, or ``torch``."""

    def _repr_html_(self) -> str:
        """For notebooks."""
        facts = {"tokens": self.tokens, "nats per token": f"{self.nll:.5f}", "in": self.runtime}
        return page(f"perplexity {self.perplexity:.4f}", facts)


@plain_torch()
def evaluate(
    source: str | PreTrainedModel,
    text: str | None,
    *,
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
    scored = _opened(source, device) if isinstance(source, str) else _given(source)
    tokenizer = tokenizer or load_tokenizer(scored.folder)
    window = clamp_seqlen(window or DEFAULT_WINDOW, scored.config, scored.taken)

    nll, tokens = 0.0, 0
    for document in track(documents, "eval", len(documents), progress):
        row = encode(document, tokenizer)
        if row.numel() < 2:
            continue
        part = perplexity(scored.logits, [row], window=window, stride=stride or window)
        nll, tokens = nll + part.nll * part.tokens, tokens + part.tokens
    if not tokens:
        raise CheckpointError(
            "the evaluation text holds no token to predict", hint="give a longer text with --text"
        )
    mean = Perplexity(nll / tokens, tokens)
    return EvalResult(mean.value, mean.nll, tokens, scored.runtime)


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
    return _Scored(runtime_logits(runtime), load_config(folder), words, folder, taken)


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
