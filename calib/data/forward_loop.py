"""Forward loops: what ModelOpt's calibration, and any other observer inside a model, runs the model
with.

A loop runs real token rows, never padding (see :mod:`calib.data.batches`), refuses to run nothing,
and stops where the model produces NaN or Inf, naming the module that produced it first: one such
value would otherwise end up in a scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from calib.data.batches import Batch, length_batches
from calib.data.rows import calibration_rows
from calib.data.tokens import Tokenizer, clamp_seqlen
from calib.errors import DataError, QuantizationError
from calib.process.progress import Progress, silent, track


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, and afterwards each module's own mode as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class ForwardLoop:
    """Runs a model over fixed batches; to be given to ``modelopt.torch.quantization.quantize(model,
    cfg, loop)``.

    Args:
        batches: what is run.
        progress: called after each batch.
        head: whether the output head is run. Its logits are the largest tensor of a pass, and
            nothing but an observer at its own input wants them.

    Attributes:
        tokens: tokens in the batches, without padding.
        rows: rows in the batches.
    """

    def __init__(self, batches: Sequence[Batch], progress: Progress, *, head: bool = True) -> None:
        self._batches = batches
        self._progress = progress
        self._head = head
        self.tokens = sum(batch.tokens for batch in batches)
        self.rows = sum(len(batch.row_ids) for batch in batches)

    def __call__(self, model: nn.Module) -> None:
        """Run every batch once, without gradients and in evaluation mode, on the device of
        ``model``.

        Raises:
            QuantizationError: the logits of a token, or what the head would read, hold NaN or Inf;
                the message names the first module that made one.
        """
        device = next(model.parameters()).device
        run = model if self._head else getattr(model, "base_model", model)
        with evaluating(model), torch.no_grad():
            for batch in track(self._batches, "forward", len(self._batches), self._progress):
                output = run(**batch.model_inputs(device), use_cache=False)
                if not _finite(output.logits if self._head else output[0], batch):
                    raise _not_finite(model, batch)


def forward_loop_over(
    batches: Sequence[Batch], *, progress: Progress = silent, head: bool = True
) -> ForwardLoop:
    """A forward loop over batches that are made already; arguments as for :class:`ForwardLoop`.

    Raises:
        DataError: there are no batches; calibrating on nothing would leave every scale undefined.
    """
    if not batches:
        raise DataError(
            "the forward loop has no calibration batches",
            hint="Give a longer text with --calib-dataset.",
        )
    return ForwardLoop(batches, progress, head=head)


def create_forward_loop(
    model: nn.Module,
    dataset_name: str,
    tokenizer: Tokenizer,
    device: torch.device | str,
    batch_size: int,
    num_samples: int,
    *,
    seqlen: int = 512,
    seed: int = 0,
    progress: Progress = silent,
) -> ForwardLoop:
    """A forward loop over text, with the arguments of ModelOpt's function of the same name.

    Args:
        model: a Hugging Face causal LM; moved to ``device``.
        dataset_name: a data set name or a local file; see
            :func:`calib.data.sources.resolve_source`.
        tokenizer: the tokenizer of ``model``.
        device: where the model runs.
        batch_size: the most rows in a batch.
        num_samples: the most rows.
        seqlen: the most tokens in a row; no more than the model has positions.
        seed: chooses the rows.
        progress: called after each batch.

    Raises:
        DataError: the text cannot be read, or is too short.
    """
    rows = calibration_rows(
        dataset_name,
        tokenizer,
        seqlen=clamp_seqlen(seqlen, getattr(model, "config", None)),
        nsamples=num_samples,
        seed=seed,
    )
    model.to(device)
    return forward_loop_over(length_batches(rows, batch_size), progress=progress)


def _finite(x: Tensor, batch: Batch) -> bool:
    """Whether ``x`` [rows, length, ...] is finite at every token; what stands at a pad position
    means nothing.
    """
    if batch.attention_mask is not None:
        x = x[batch.keep.to(x.device)]
    return bool(torch.isfinite(x).all())


def _not_finite(model: nn.Module, batch: Batch) -> QuantizationError:
    """Run ``batch`` again with hooks on every module, and name the first that takes or gives what
    is not finite.

    Modules report their outputs in the order in which they finish, so the innermost one comes
    before those that contain it. Inputs are watched as well: what overflows may be a product
    between modules, as in a gated MLP.
    """
    culprits: list[tuple[str, str]] = []

    def look(what: str, name: str, values: Any) -> None:
        x = values[0] if isinstance(values, tuple) and values else values
        if (
            not culprits
            and isinstance(x, Tensor)
            and x.shape[:2] == batch.input_ids.shape
            and not _finite(x, batch)
        ):
            culprits.append((what, name))

    def watch(name: str, module: nn.Module) -> list[RemovableHandle]:
        return [
            module.register_forward_pre_hook(lambda _, args: look("input", name, args)),
            module.register_forward_hook(lambda _, args, output: look("output", name, output)),
        ]

    handles = [
        handle for name, module in model.named_modules() if name for handle in watch(name, module)
    ]
    try:
        model(**batch.model_inputs(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    what, name = culprits[0] if culprits else ("output", "the model")
    damaged = culprits and not all(
        bool(torch.isfinite(p).all()) for p in model.get_submodule(name).parameters()
    )
    return QuantizationError(
        f"the {what} of '{name}' holds NaN or Inf during calibration",
        hint="Its weights hold NaN or Inf: the checkpoint is damaged."
        if damaged
        else "The model overflows in this dtype: try --dtype bfloat16 or float32.",
    )
