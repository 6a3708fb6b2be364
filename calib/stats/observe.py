"""Running a model over batches and showing the input and output of each linear to whoever counts
something.

Nothing is kept here, so memory does not grow with the number of tokens. Hooks are removed however
the run ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from calib.data.batches import Batch
from calib.data.forward_loop import evaluating
from calib.errors import DataError, QuantizationError, UnsupportedModelError
from calib.network.modules import get_submodule
from calib.progress import Progress, silent, track

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
    hook = _Hook(see)
    body = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    with evaluating(model), ExitStack() as hooks, torch.no_grad():
        for name in names:
            module = get_submodule(model, name)
            hooks.callback(module.register_forward_hook(hook.of(name)).remove)
        for batch in track(batches, stage, len(batches), progress):
            hook.batch = batch
            body(**batch.model_inputs(device), use_cache=False)
    missing = [name for name in names if name not in hook.reached]
    if missing:
        raise QuantizationError(
            f"calibration never reached {len(missing)} linear(s): {', '.join(missing)}",
            hint=(
                "use more calibration rows (--nsamples), or check that the model runs these layers"
            ),
        )


class _Hook:
    """The forward hooks of one run; PyTorch gives them the input that pre-hooks have rotated."""

    def __init__(self, see: See) -> None:
        self._see = see
        self.batch: Batch | None = None
        self.reached: set[str] = set()

    def of(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """The hook of the linear ``name``."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.reached.add(name)
            self._see(name, self._tokens(name, args[0]), self._tokens(name, output))

        return hook

    def _tokens(self, name: str, x: Tensor) -> Tensor:
        """``x`` [rows, length, n] or [rows · length, n] as [tokens, n]."""
        assert self.batch is not None
        keep = self.batch.keep
        if x.shape[:-1].numel() != keep.numel():
            raise UnsupportedModelError(
                f"'{name}' sees a tensor {list(x.shape)}, which is not one vector for each token of"
                " the batch",
                hint="the architecture table must name modules that read every token",
            )
        x = x.detach().reshape(keep.numel(), x.shape[-1])
        return x if self.batch.attention_mask is None else x[keep.flatten().to(x.device)]
