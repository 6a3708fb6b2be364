"""Channels in clusters: one static activation scale for each set of channels that reach about as
far.

A few channels of an LLM's activations are much larger than the others, and one scale for the tensor
leaves the others with few levels. Clusters by k-means over each channel's least value, greatest
value and deviation (of one linear, or of all linears that read the same channels) put like with
like (RPTQ: Yuan et al., "RPTQ: reorder-based post-training quantization for large language models",
2023).

The scale differs along the features that a matrix product sums over,

    y_j = Σ_i s_c(i) q_i w_ji,

so that it cannot be taken out of an integer product; only the sum over one cluster could be an
integer product by itself, with the channels permuted into k groups. Hence :data:`NO_FUSED_KERNEL`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calib.architectures import LinearSpec, Space
from calib.capture.statistics import ChannelStatistics
from calib.errors import QuantizationError

NO_FUSED_KERNEL = (
    "one activation scale per channel cluster has no fused kernel: not in ONNX Runtime, TensorRT,"
    " Tripy, ModelOpt or compressed-tensors (vLLM). The scale differs along the features that a"
    " matrix product sums over, so an integer product cannot carry it; a graph of QuantizeLinear"
    " and DequantizeLinear computes it with a float product, the others refuse it"
)
"""Which runtimes execute ``cluster:k``; said wherever it is asked for."""

_EQUAL = 1e-9
"""A feature is the same for all channels if its deviation is at most this share of its largest
magnitude: far above the rounding of float64, far below that of float32."""
_STARTS = 10
"""k-means++ starts, of which the best is kept."""


def channel_features(statistics: ChannelStatistics) -> Tensor:
    """What channels are compared by: least value, greatest value and deviation, float64
    ``[channels, 3]``.
    """
    return torch.stack([statistics.minimum, statistics.maximum, statistics.std], dim=-1).double()


def joint_features(statistics: Sequence[ChannelStatistics]) -> Tensor:
    """The features of several tensors on one channel axis, side by side: float64 ``[channels, 3 ·
    tensors]``.

    The inputs of all linears that read the residual stream, say, or their inputs and the columns of
    their weights.

    Raises:
        QuantizationError: there is none, or they have different numbers of channels.
    """
    features = [channel_features(one) for one in statistics]
    widths = {len(one) for one in features}
    if len(widths) != 1:
        found = ", ".join(map(str, sorted(widths))) or "no channels at all"
        raise QuantizationError(
            f"only tensors on one channel axis can be clustered jointly, got {found}",
            hint="group linears by the space that they read",
        )
    return torch.cat(features, dim=-1)


def cluster_channels(features: Tensor, k: int, seed: int = 0) -> Tensor:
    """Put channels into ``k`` clusters by k-means over standardised features.

    Args:
        features: ``[channels, f]``, finite, any float dtype.
        k: clusters, 1 to ``channels``.
        seed: of the starts; the same features, ``k`` and seed give the same labels.

    Returns:
        int64 ``[channels]``, 0 to ``k - 1``, in the order of the largest magnitude among a
        cluster's features: the last cluster holds the channel that reaches farthest. Where fewer
        than ``k`` channels are distinct, each of these is a cluster, and the last labels go unused.

    Raises:
        QuantizationError: ``k`` is out of range, or a feature is not finite.
    """
    channels = len(features)
    if not 1 <= k <= channels:
        raise QuantizationError(
            f"cannot put {channels} channels into {k} clusters",
            hint=f"give a number from 1 to {channels}",
        )
    if not bool(torch.isfinite(features).all()):
        raise QuantizationError(
            "the features of a channel are NaN or infinite; they cannot be clustered"
        )

    features = features.detach().cpu().double()
    spread = features.std(dim=0, correction=0)
    # What differs by rounding alone must not be blown up to unit variance.
    equal = spread <= _EQUAL * features.abs().amax(dim=0)
    standard = torch.where(
        equal, 0.0, (features - features.mean(dim=0)) / torch.where(equal, 1.0, spread)
    )
    distinct, labels = torch.unique(standard, dim=0, return_inverse=True)
    if len(distinct) > k:
        labels = _k_means(standard, k, seed)
    return _ordered(labels, features.abs().amax(dim=1))


def cluster_linears(
    inputs: Mapping[str, ChannelStatistics],
    specs: Sequence[LinearSpec],
    k: int,
    *,
    jointly: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The cluster of each input channel of each linear.

    Args:
        inputs: statistics of the inputs, ``[in]``, by name. Smoothing changes them: take them again
            after it.
        specs: the linears.
        k: clusters.
        jointly: one clustering for all linears that read the same channels
            (:func:`shared_channels`), instead of one for each linear. What permutes channels then
            has to do so once.
        seed: of the starts.

    Returns:
        int64 ``[in]`` by name; see :func:`cluster_channels`.

    Raises:
        QuantizationError: a linear has fewer than ``k`` channels, or statistics that are not
            finite.
    """
    groups = shared_channels(specs) if jointly else [[spec.name] for spec in specs]
    labels: dict[str, Tensor] = {}
    for names in groups:
        try:
            found = cluster_channels(joint_features([inputs[name] for name in names]), k, seed)
        except QuantizationError as error:
            raise QuantizationError(
                f"the inputs of '{names[0]}': {error.message}", hint=error.hint
            ) from error
        labels |= dict.fromkeys(names, found)
    return labels


def shared_channels(specs: Sequence[LinearSpec]) -> list[list[str]]:
    """Names of the linears that read the same channels: all readers of the residual stream; of
    values and inner activations those of one layer.
    """
    groups: dict[tuple[Space | None, int | None, str], list[str]] = {}
    for spec in specs:
        layer = None if spec.reads is Space.RESIDUAL else spec.layer
        groups.setdefault((spec.reads, layer, spec.branch), []).append(spec.name)
    return list(groups.values())


def cluster_limits(low: Tensor, high: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each cluster.

    Args:
        low: least value of each channel ``[channels]``.
        high: greatest value of each channel ``[channels]``.
        labels: int64 ``[channels]``, 0 to ``k - 1``.
        k: clusters.

    Returns:
        Two tensors ``[k]`` in the dtype of the limits; 0 and 0 for a cluster without channels.
    """
    return (
        low.new_zeros(k).scatter_reduce(0, labels, low, "amin", include_self=False),
        high.new_zeros(k).scatter_reduce(0, labels, high, "amax", include_self=False),
    )


def expand_clusters(values: Tensor, labels: Tensor) -> Tensor:
    """What every channel gets: ``values`` [k] as [channels]."""
    return values[labels]


def _k_means(standard: Tensor, k: int, seed: int) -> Tensor:
    from sklearn.cluster import KMeans  # here, because it takes a second to import
    from threadpoolctl import threadpool_limits

    model: Any = KMeans(n_clusters=k, n_init=_STARTS, random_state=seed)
    # One thread: the order in which threads add up their partial sums is not determined.
    with threadpool_limits(limits=1):
        labels = model.fit_predict(standard.numpy())
    return torch.from_numpy(labels).long()


def _ordered(labels: Tensor, reach: Tensor) -> Tensor:
    """``labels`` renumbered by the greatest ``reach`` in each cluster; of equals, the one with the
    first channel.
    """
    found = sorted(set(labels.tolist()))
    members = {label: (labels == label).nonzero().flatten() for label in found}
    order = sorted(
        found, key=lambda label: (float(reach[members[label]].max()), int(members[label][0]))
    )
    result = torch.empty_like(labels)
    for position, label in enumerate(order):
        result[members[label]] = position
    return result
