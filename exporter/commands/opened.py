"""What ``rotq eval`` measures: a model that gives logits, in its runtime or in torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from backends.base import StandIn
from backends.registry import get_backend
from calib.artifact import load_artifact
from calib.artifact.files import MANIFEST
from calib.measure.perplexity import LogitsFunction, model_logits
from calib.measure.reference import build_reference
from calib.network.checkpoint import load_config, open_checkpoint
from calib.network.original import load_network
from exporter.parity import runtime_logits
from exporter.parity.behaviour import Forward, forward_of
from exporter.recipe import EMBEDDED
from exporter.reporting.exported import check_unchanged, is_export, read_report
from exporter.run.inputs import resolve_device
from exporter.source import embedded_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Opened:
    """A model that gives logits, wherever it runs."""

    logits: LogitsFunction
    forward: Forward
    """One pass after a cache, as :meth:`backends.base.RuntimeModel.forward`."""
    config: Any
    runtime: str
    folder: Path
    """Where its tokenizer is."""
    taken: int = 0
    """Positions that a prefix takes."""
    nbytes: int | None = None
    """Of the weights of an export."""

    @property
    def positions(self) -> int | None:
        """How many tokens it takes behind a prefix of its own; ``None``: not known."""
        most = getattr(self.config, "max_position_embeddings", None)
        return None if most is None else int(most) - self.taken


def opened(source: str | PreTrainedModel, device: str = "auto") -> Opened:
    """A model to be scored.

    Args:
        source: an exported folder, one of ``rotq calibrate``, a checkpoint folder, a hub id, or
            ``embedded``; or a Hugging Face model object, which runs where it is.
        device: where a checkpoint runs.

    Raises:
        RotqError: it cannot be read, or an exported folder was edited.
    """
    return _opened(source, device) if isinstance(source, str) else _given(source)


def _opened(source: str, device: str) -> Opened:
    folder = embedded_folder() if source == EMBEDDED else Path(source)
    if is_export(folder):
        return opened_export(folder)
    if (folder / MANIFEST).is_file():
        return _artifact(folder, device)
    return _checkpoint(folder if source == EMBEDDED else source, device)


def _given(model: PreTrainedModel) -> Opened:
    folder = Path(str(getattr(model, "name_or_path", "")))
    return _in_torch(model, model.config, "torch", folder)


def opened_export(folder: Path) -> Opened:
    """An exported folder in its runtime, as a user gets it.

    Raises:
        RotqError: it is none of rotq's, was edited, or has no runtime here.
    """
    report = read_report(folder)
    check_unchanged(folder, report)
    runtime = get_backend(report.backend).load(folder, report.target, exact=False)
    words = runtime.runtime
    if isinstance(runtime, StandIn) and runtime.not_run_in:
        words += f", not in {runtime.not_run_in}"
    taken = 0 if report.prefix is None else len(report.prefix.tokens)
    nbytes = report.layers.bytes_after
    logits, config = runtime_logits(runtime), load_config(folder)
    return Opened(logits, runtime.forward, config, words, folder, taken, nbytes)


def _artifact(folder: Path, device: str) -> Opened:
    artifact = load_artifact(folder)
    model = build_reference(artifact).to(resolve_device(device))
    words, taken = "torch, fake-quantized", artifact.prefix_length
    return _in_torch(model, model.config, words, folder, taken)


def _checkpoint(source: str | Path, device: str) -> Opened:
    config, checkpoint = load_config(source), open_checkpoint(source)
    folder = checkpoint.folder
    assert folder is not None  # it was opened from files
    floats = None if checkpoint.quantization is None else checkpoint
    model = load_network(folder, config, device=resolve_device(device), floats=floats)
    return _in_torch(model, config, "torch", folder)


def _in_torch(model: nn.Module, config: Any, words: str, folder: Path, taken: int = 0) -> Opened:
    return Opened(model_logits(model), forward_of(model), config, words, folder, taken)
