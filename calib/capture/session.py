"""Running the model and streaming its activations into statistics and reservoirs.

An activation is looked at while the model runs, added to the statistics of its site and let go:
nothing grows with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from functools import partial

from torch import nn

from calib.capture.collector import Collector
from calib.capture.fingerprint import model_fingerprint
from calib.capture.sites import CaptureConfig, SiteLike
from calib.capture.storage import Capture
from calib.data.batches import Batch
from calib.data.forward_loop import evaluating
from calib.errors import UnsupportedModelError
from calib.modules.watch import watching
from calib.process.progress import Progress, silent, track


def capture(
    model: nn.Module,
    sites: Sequence[SiteLike],
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
        CheckpointError: a site names a module that does not exist.
        UnsupportedModelError: there is no site, or one sees a tensor that does not fit.
        QuantizationError: a site is never reached, or an activation holds NaN or Inf; the message
            names the module.
    """
    captured = [site for site in sites if site.rotation in ("r1", "r2")]
    if not captured:
        raise UnsupportedModelError(
            "no R1 or R2 site to capture: the model takes neither",
            hint="Export without a capture: --rotate none.",
        )
    collector = Collector(config or CaptureConfig(), captured, num_kv_heads, head_dim)
    # The head reads nothing that a rotation is trained on, and its logits are the largest tensor of
    # a forward pass.
    body = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    total = len(batches) if isinstance(batches, Sized) else None
    looks = {site.module: partial(collector.observe, site) for site in captured}
    with evaluating(model), watching(model, inputs=looks, optional=True) as watch:
        for batch in track(batches, "capture", total, progress):
            collector.begin(batch)
            body(**batch.model_inputs(device), use_cache=False)
            watch.require_reached()  # after the first batch already: capturing takes long
    return collector.finish(model_fingerprint(model))
