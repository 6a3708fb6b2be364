"""All accumulators of one capture, fed with one activation after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.capture.reservoir import TokenReservoir, token_keys
from calib.capture.result import Provenance, Samples, SiteStatistics
from calib.capture.sites import CHUNK_TOKENS, CaptureConfig, SiteLike
from calib.capture.statistics import ChannelAccumulator, CovarianceAccumulator
from calib.capture.storage import Capture
from calib.capture.workspace import Workspace, accumulator_device, wide
from calib.data.batches import Batch
from calib.data.tokens import combine_digests, row_digest
from calib.errors import DataError, QuantizationError, UnsupportedModelError


@dataclass(frozen=True)
class _Space:
    """What is kept of one pooled space: the residual, or the values of one layer."""

    covariance: CovarianceAccumulator
    reservoir: TokenReservoir


@dataclass(frozen=True)
class _Tokens:
    """Which positions of the running batch are tokens, and which tokens they are.

    Attributes:
        positions: rows × length, padding included.
        kept: [T] indices of the tokens among them; None for all.
        rows: [T] the row id of each token.
        places: [T] its position among the tokens of its row: the same, however the row is padded.
    """

    positions: int
    kept: Tensor | None
    rows: NDArray[np.int64]
    places: NDArray[np.int64]

    @classmethod
    def of(cls, batch: Batch) -> _Tokens:
        keep = batch.keep.cpu()
        rows = torch.tensor(batch.row_ids, dtype=torch.int64).unsqueeze(1).expand_as(keep)
        return cls(
            positions=keep.numel(),
            kept=None if batch.attention_mask is None else keep.flatten().nonzero().squeeze(1),
            rows=rows[keep].numpy(),
            places=(keep.cumsum(1) - 1)[keep].numpy(),
        )


class Collector:
    """Statistics and samples of every site.

    Call :meth:`begin` before each batch, :meth:`observe` for each activation, and :meth:`finish`
    once.

    Args:
        config: how much is kept.
        sites: the R1 and R2 sites.
        num_kv_heads: key/value heads of each layer.
        head_dim: width of a head.
    """

    def __init__(
        self, config: CaptureConfig, sites: Sequence[SiteLike], num_kv_heads: int, head_dim: int
    ) -> None:
        self._config = config
        self._kv = num_kv_heads
        self._head_dim = head_dim
        self._r1: _Space | None = None
        self._r1_channels: dict[str, ChannelAccumulator] = {}
        self._r2: dict[int, _Space] = {}
        self._r2_layers = sorted({site.layer for site in sites if site.rotation == "r2"})
        self._r2_store = torch.empty(0)
        self._r2_channels: dict[int, ChannelAccumulator] = {}
        self._digests: dict[int, bytes] = {}
        self._lengths: dict[int, int] = {}
        self._tokens: _Tokens | None = None
        self._workspace = Workspace()

    def begin(self, batch: Batch) -> None:
        """Take note of the tokens of ``batch``, which the model, or a part of it, runs next."""
        self._tokens = _Tokens.of(batch)
        for ids, keep, row_id in zip(batch.input_ids, batch.keep, batch.row_ids, strict=True):
            self._digests[row_id] = row_digest(ids[keep])
            self._lengths[row_id] = int(keep.sum())

    def observe(self, site: SiteLike, x: Tensor) -> None:
        """Add the activation ``x`` [rows, length, n], or [rows · length, n], of ``site`` for the
        running batch.

        Raises:
            UnsupportedModelError: ``x`` does not hold one vector for each position, or not the
                width expected.
            QuantizationError: ``x`` holds NaN or Inf at a token.
        """
        tokens = self._tokens
        if tokens is None or x.shape[:-1].numel() != tokens.positions:
            raise UnsupportedModelError(
                f"'{site.module}' sees a tensor {list(x.shape)}, which is not one vector for each"
                " token of the batch",
                hint="The architecture table must name a module that reads every token.",
            )
        x = x.detach().reshape(tokens.positions, x.shape[-1])
        keys = token_keys(self._config.seed, site.module, tokens.rows, tokens.places)
        for first in range(0, len(keys), CHUNK_TOKENS):
            part = slice(first, first + CHUNK_TOKENS)
            chunk = x[part] if tokens.kept is None else x[tokens.kept[part].to(x.device)]
            absmax = _finite_absmax(chunk, site, tokens, first)
            space = (
                self._observe_r1(site, chunk)
                if site.rotation == "r1"
                else self._observe_r2(site, chunk)
            )
            space.reservoir.offer(chunk, absmax, keys[part])

    def _observe_r1(self, site: SiteLike, x: Tensor) -> _Space:
        width = x.shape[1]
        if self._r1 is None:
            store = torch.empty((self._config.reservoir_tokens, width), dtype=x.dtype)
            self._r1 = self._space(1, width, x, store)
        if width != self._r1.covariance.channels:
            raise UnsupportedModelError(
                f"'{site.module}' is {width} wide, other R1 sites are"
                f" {self._r1.covariance.channels}",
                hint="All R1 sites must read the same residual.",
            )
        if site.module not in self._r1_channels:
            self._r1_channels[site.module] = ChannelAccumulator(1, width, accumulator_device(x))
        chunk = self._workspace.chunk(x.unsqueeze(0))
        self._r1_channels[site.module].update(chunk)
        self._r1.covariance.update(chunk, self._workspace)
        return self._r1

    def _observe_r2(self, site: SiteLike, x: Tensor) -> _Space:
        width = self._kv * self._head_dim
        if x.shape[1] % width:
            raise UnsupportedModelError(
                f"'{site.module}' is {x.shape[1]} wide, which is no multiple of "
                f"{self._kv} key/value heads of {self._head_dim}",
                hint="The architecture table does not fit this checkpoint.",
            )
        if not self._r2:
            # One for all layers, which the capture keeps: what a layer of its own would free could
            # stay on the heap.
            shape = (len(self._r2_layers), self._config.r2_tokens, x.shape[1])
            self._r2_store = torch.empty(shape, dtype=x.dtype)

        if site.layer not in self._r2:
            store = self._r2_store[self._r2_layers.index(site.layer)]
            self._r2[site.layer] = self._space(self._kv, self._head_dim, x, store)
            self._r2_channels[site.layer] = ChannelAccumulator(
                self._kv, self._head_dim, accumulator_device(x)
            )
        space = self._r2[site.layer]
        chunk = self._workspace.chunk(_heads(x, self._kv, self._head_dim))
        self._r2_channels[site.layer].update(chunk)
        space.covariance.update(chunk, self._workspace)
        return space

    def _space(self, groups: int, channels: int, x: Tensor, store: Tensor) -> _Space:
        massive = self._config.massive_tokens(len(store))
        covariance = CovarianceAccumulator(groups, channels, accumulator_device(x))
        return _Space(covariance, TokenReservoir(store, massive))

    def finish(self, model: str, prefix: Sequence[int] = ()) -> Capture:
        """Turn what was gathered into a :class:`~calib.capture.storage.Capture`; the collector is
        spent by it.

        Args:
            model: the fingerprint of the model.
            prefix: ids of the tokens that stood before every row.

        Raises:
            DataError: no batch was run.
        """
        if not self._lengths:
            raise DataError(
                "no calibration batch was run", hint="Give a longer text with --calib-dataset."
            )
        provenance = Provenance(
            model=model,
            data_sha256=combine_digests(digest for _, digest in sorted(self._digests.items())),
            rows=len(self._digests),
            tokens=sum(self._lengths.values()),
            config=self._config,
            prefix=tuple(prefix),
        )
        sites = {name: channels.result().group(0) for name, channels in self._r1_channels.items()}
        r1 = self._finish_r1()
        r2, stack = self._finish_r2()
        return Capture(r1=r1, sites=sites, r2=r2, r2_stack=stack, provenance=provenance)

    def _finish_r1(self) -> SiteStatistics | None:
        if self._r1 is None:
            return None
        space, self._r1 = self._r1, None
        pooled = ChannelAccumulator(1, space.covariance.channels, space.covariance.device)
        for channels in self._r1_channels.values():
            pooled.merge(channels)
        kept = space.reservoir.result()
        samples = Samples(kept.rows, kept.weights, kept.massive)
        return SiteStatistics(pooled.result().group(0), space.covariance.finish()[0], samples)

    def _finish_r2(self) -> tuple[dict[int, SiteStatistics], Samples | None]:
        """The statistics of each layer, whose samples are views of the stacked ones.

        The samples are regrouped by head layer by layer, within the store of all. Where a text is
        so short that S < capacity, they also move together: layer i to where i · S tokens precede
        it, which is never beyond where it lay, and so never onto a layer that is still to come.
        """
        stack: Samples | None = None
        layers: dict[int, SiteStatistics] = {}
        for index, layer in enumerate(sorted(self._r2)):
            space = self._r2.pop(layer)
            kept = space.reservoir.result()
            # Of a copy: with a single key/value head this is a view, and would be moved onto
            # itself.
            values = by_kv_head(kept.rows.clone(), self._kv, self._head_dim)
            group = values.shape[1] // len(kept.rows)
            if stack is None:
                shape = (len(self._r2_layers), *values.shape)
                stacked = self._r2_store.flatten()[: math.prod(shape)].view(shape)
                stack = Samples(
                    stacked, torch.empty((shape[0], values.shape[1])), kept.massive * group, group
                )
            stack.values[index] = values
            stack.weights[index] = kept.weights.repeat_interleave(group)
            channels = self._r2_channels[layer].result()
            layers[layer] = SiteStatistics(channels, space.covariance.finish(), stack.layer(index))

        return layers, stack


def _finite_absmax(x: Tensor, site: SiteLike, tokens: _Tokens, first: int) -> NDArray[np.float64]:
    """The largest absolute value of each token of ``x`` [T, n]: the T tokens of the batch from
    number ``first`` on.
    """
    minimum, maximum = torch.aminmax(x, dim=1)
    # Both pass NaN on, so these few numbers also tell whether anything is not finite.
    absmax: NDArray[np.float64] = (
        torch.maximum(maximum, -minimum).to(wide(x.dtype)).cpu().double().numpy()
    )
    bad = np.flatnonzero(~np.isfinite(absmax))
    if len(bad):
        row, place = tokens.rows[first + bad[0]], tokens.places[first + bad[0]]
        raise QuantizationError(
            f"the input of '{site.module}' holds NaN or Inf (calibration row {row}, token {place})",
            hint=(
                "The model overflows in this dtype, or its weights are damaged: try --dtype"
                " bfloat16 or float32."
            ),
        )
    return absmax


def by_kv_head(x: Tensor, num_kv_heads: int, head_dim: int) -> Tensor:
    """Regroup o_proj's input by the key/value head whose values each query head mixes.

    Query heads are stored key/value head by key/value head: head h reads the values of head h //
    group.

    Args:
        x: [T, heads · head_dim].
        num_kv_heads: kv.
        head_dim: d.

    Returns:
        [kv, T · group, d], the group's heads of one token next to each other.
    """
    return _heads(x, num_kv_heads, head_dim).reshape(num_kv_heads, -1, head_dim)


def _heads(x: Tensor, num_kv_heads: int, head_dim: int) -> Tensor:
    """The same as a view [kv, T, group, d]."""
    return x.view(x.shape[0], num_kv_heads, -1, head_dim).transpose(0, 1)
