"""Capture in one walk: the statistics and samples of :mod:`calib.capture`, with one block in
memory.

What is kept of a token depends on the seed, its site, its row and its place alone, so the samples
are those of the whole model, and so are the statistics of every site and layer. The covariance that
is pooled over all R1 sites is summed block by block instead of batch by batch: the same numbers, in
another order of float64 sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from calib.capture.collector import Collector
from calib.capture.fingerprint import Fingerprint
from calib.capture.sites import CaptureConfig
from calib.capture.storage import Capture
from calib.errors import UnsupportedModelError
from calib.fusing import FusedModel, unloaded
from calib.layerwise.flow import Flow
from calib.modules.watch import watching
from calib.network.layout import StockTensors
from calib.process.progress import Progress, silent, track


def capture_blockwise(
    fused: FusedModel,
    flow: Flow,
    *,
    config: CaptureConfig | None = None,
    progress: Progress = silent,
) -> Capture:
    """The statistics of the R1 and R2 sites of ``fused``; arguments and errors as for
    :func:`calib.capture.session.capture`.

    Args:
        fused: the model, its tensors computed on access.
        flow: the batches through it.
        config: how much is kept; :class:`CaptureConfig` by default.
        progress: called after every block.
    """
    wiring, sizes = fused.wiring, fused.wiring.sizes
    sites = wiring.capture_sites
    if not sites:
        raise UnsupportedModelError(
            "no R1 or R2 site to capture: the model takes neither",
            hint="Export without a capture: --rotate none.",
        )
    collector = Collector(config or CaptureConfig(), sites, sizes.kv_heads, sizes.head_dim)
    fingerprint = Fingerprint()
    flow.enter()
    for passage in track(flow.blocks(), "capture", flow.layers, progress):
        block = passage.block
        for name, parameter in block.module.named_parameters(prefix=block.name):
            fingerprint.add(name, parameter)
        looks = {
            block.local(site.module): partial(collector.observe, site)
            for site in sites
            if site.layer == block.index
        }
        with watching(block.module, inputs=looks):
            passage(begin=collector.begin)
    prefix = () if fused.prefix is None else fused.prefix.tokens
    return collector.finish(_completed(fingerprint, fused), prefix)


def fused_fingerprint(fused: FusedModel) -> str:
    """:func:`calib.capture.fingerprint.model_fingerprint` of the model of ``fused``, one tensor at
    a time in memory.
    """
    return _completed(Fingerprint(), fused)


def _completed(fingerprint: Fingerprint, fused: FusedModel) -> str:
    """The value of ``fingerprint`` with all parameters of ``fused`` that it has not seen."""
    stock: Mapping[str, Tensor] = StockTensors(fused.state, fused.wiring)
    for name, _ in unloaded(fused).named_parameters():
        if name not in fingerprint:
            fingerprint.add(name, stock[name])
    return fingerprint.value()
