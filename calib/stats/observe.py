"""Running a model over batches and showing the input and output of each linear to whoever counts
something.

Nothing is kept here, so memory does not grow with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from calib.data.batches import Batch
from calib.data.forward_loop import evaluating
from calib.errors import DataError, UnsupportedModelError
from calib.modules.watch import watching
from calib.process.progress import Progress, silent, track

See = Callable[[str, Tensor, Tensor], None]
"""Called with a linear's name, its input ``[tokens, in]`` and its output ``[tokens, out]``, padding
left out.
"""


def observe(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    see: See,
    *,
    stage: str,
    progress: Progress = silent,
) -> None:
    """Run ``batches`` through ``model`` and call ``see`` for every call of every linear in
    ``names``.

    What is seen is what the linear computes with: its input after an online rotation, if it has
    one.

    Args:
        model: a Hugging Face causal LM; its head is not run.
        names: dotted names of linears.
        batches: token rows; pad positions are left out.
        see: what counts.
        stage: what the progress is called.
        progress: called after each batch.

    Raises:
        DataError: there is no batch.
        CheckpointError: one of ``names`` does not exist.
        UnsupportedModelError: a linear does not see one vector for each token.
        QuantizationError: a linear was never reached.
    """
    if not batches:
        raise DataError(
            "there are no calibration batches to observe",
            hint="give a longer text with --calib-dataset",
        )
    running: list[Batch] = []  # the batch that the model is run on

    def show(name: str, x: Tensor, output: Tensor) -> None:
        see(name, *(_tokens(name, values, running[-1]) for values in (x, output)))

    body = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    looks = {name: partial(show, name) for name in names}
    with evaluating(model), watching(model, outputs=looks):
        for batch in track(batches, stage, len(batches), progress):
            running[:] = [batch]
            body(**batch.model_inputs(device), use_cache=False)


def _tokens(name: str, x: Tensor, batch: Batch) -> Tensor:
    """``x`` [rows, length, n] or [rows · length, n] as [tokens, n]."""
    keep = batch.keep
    if x.shape[:-1].numel() != keep.numel():
        raise UnsupportedModelError(
            f"'{name}' sees a tensor {list(x.shape)}, which is not one vector for each token of the"
            " batch",
            hint="the architecture table must name modules that read every token",
        )
    x = x.detach().reshape(keep.numel(), x.shape[-1])
    return x if batch.attention_mask is None else x[keep.flatten().to(x.device)]
