"""Running the model and streaming its activations into statistics and reservoirs.

The hooks look at an activation while the model runs, add it to the statistics of its site and let
it go: nothing grows with the number of tokens. Hooks are removed however the run ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from calib.capture.collector import Collector
from calib.capture.fingerprint import model_fingerprint
from calib.capture.sites import CaptureConfig, Site
from calib.capture.storage import Capture
from calib.data.batches import Batch
from calib.data.forward_loop import evaluating
from calib.errors import UnsupportedModelError
from calib.progress import Progress, silent, track


def capture(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    *,
    num_kv_heads: int,
    head_dim: int,
    config: CaptureConfig | None = None,
    progress: Progress = silent,
) -> Capture:
    """Run ``batches`` through ``model`` and gather the statistics of ``sites``.

    The same seed, model and batches give the same bytes. Another batch size or order changes
    nothing about which tokens are kept; it changes the statistics by no more than the rounding of
    the model and of sums does.

    Args:
        model: a Hugging Face causal LM; its head is not run.
        sites: the activations. R1 sites are pooled in the residual space; R2 sites are kept per
            layer, and seen per key/value head.
        batches: batches of token rows; pad positions are left out of everything.
        num_kv_heads: key/value heads of each layer.
        head_dim: width of a head.
        config: how much is kept; :class:`CaptureConfig` by default.
        progress: called after each batch.

    Raises:
        DataError: there is no batch.
        UnsupportedModelError: a site names no module, is never reached, or sees a tensor that does
            not fit.
        QuantizationError: an activation holds NaN or Inf; the message names the module.
    """
    wanted = [site for site in sites if site.rotation in ("r1", "r2")]
    if not wanted:
        raise UnsupportedModelError(
            "no R1 or R2 site to capture", hint="Use --rotate with r1 or r2."
        )
    collector = Collector(config or CaptureConfig(), wanted, num_kv_heads, head_dim)
    # The head reads nothing that a rotation is trained on, and its logits are the largest tensor of
    # a forward pass.
    body = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    total = len(batches) if isinstance(batches, Sized) else None
    with evaluating(model), ExitStack() as hooks, torch.no_grad():
        for site in wanted:
            module = _find(model, site)
            hook = _Hook(collector, site)
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in track(batches, "capture", total, progress):
            collector.begin(batch)
            body(**batch.model_inputs(device), use_cache=False)
            collector.require_reached()
    return collector.finish(model_fingerprint(model))


def _find(model: nn.Module, site: Site) -> nn.Module:
    try:
        return model.get_submodule(site.module)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"the model has no module '{site.module}' to capture for {site.rotation.upper()}",
            hint="The architecture table does not fit this checkpoint.",
        ) from error


class _Hook:
    """The forward pre-hook of one site."""

    def __init__(self, collector: Collector, site: Site) -> None:
        self._collector = collector
        self._site = site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            raise UnsupportedModelError(f"'{self._site.module}' is called without a tensor")
        self._collector.observe(self._site, x.detach())
