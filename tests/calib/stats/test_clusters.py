"""Channel clusters: what k-means finds, and that the limits of a cluster cover its channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.architectures import LinearSpec, Space
from calib.capture.statistics import ChannelStatistics
from calib.errors import QuantizationError
from calib.stats.clusters import (
    NO_FUSED_KERNEL,
    channel_features,
    cluster_channels,
    cluster_limits,
    cluster_linears,
    expand_clusters,
    joint_features,
    shared_channels,
)


def statistics(x: Tensor) -> ChannelStatistics:
    """Of the columns of ``x`` [tokens, channels]."""
    low, high = torch.aminmax(x, dim=0)
    return ChannelStatistics(len(x), x.mean(0), x.std(0, correction=0), low, high)


def grouped(scales: tuple[float, ...], each: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[200, each · len(scales)] normal values whose channels have these scales in a random order,
    and which.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(scales)).repeat_interleave(each)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    x = torch.randn(200, len(labels), generator=generator, dtype=torch.float64)
    return x * torch.tensor(scales, dtype=torch.float64)[labels], labels


@pytest.mark.parametrize("seed", range(3))
def test_separable_channels_fall_into_their_groups_in_order_of_reach(seed: int) -> None:
    # extremes of 200 normal values vary by a tenth
    x, labels = grouped((1.0, 10.0, 20.0), each=20, seed=seed)
    assert torch.equal(cluster_channels(channel_features(statistics(x)), 3, seed), labels)


def test_features_are_the_least_the_greatest_and_the_deviation() -> None:
    x, _ = grouped((1.0, 2.0), each=2)
    features = channel_features(statistics(x))
    assert torch.equal(features, torch.stack([x.amin(0), x.amax(0), x.std(0, correction=0)], dim=1))
    assert torch.equal(
        joint_features([statistics(x), statistics(2 * x)]),
        torch.cat([features, 2 * features], dim=1),
    )


def test_a_shift_counts_as_well_as_a_scale() -> None:
    """The third group reaches farther than the second, so it comes last; all deviations are equal
    but for rounding.
    """
    noise = torch.randn(100, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifts = torch.tensor([0.0, 50.0, -60.0], dtype=torch.float64).repeat_interleave(10)
    x = noise + shifts + torch.linspace(-1, 1, 30, dtype=torch.float64)
    assert torch.equal(
        cluster_channels(channel_features(statistics(x)), 3), torch.arange(3).repeat_interleave(10)
    )


def test_one_cluster_holds_all_and_k_of_k_hold_one_each() -> None:
    features = torch.tensor([[3.0], [1.0], [2.0], [-7.0]])
    assert cluster_channels(features, 1).tolist() == [0, 0, 0, 0]
    assert cluster_channels(features, 4).tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_fewer_distinct_channels_than_clusters(k: int) -> None:
    """No warning of scikit-learn (warnings are errors here); the last labels stay unused."""
    features = torch.tensor([[5.0, 1.0], [0.0, 0.0], [5.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    assert cluster_channels(features, k).tolist() == [1, 0, 1, 0, 0]


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 400), st.integers(1, 9), st.integers(0, 100))
def test_the_same_seed_gives_the_same_labels_and_all_are_in_range(
    channels: int, k: int, seed: int
) -> None:
    k = min(k, channels)
    features = torch.randn(channels, 6, generator=torch.Generator().manual_seed(seed))
    labels = cluster_channels(features, k, seed)
    assert labels.dtype is torch.int64
    assert sorted(set(labels.tolist())) == list(range(k))
    assert torch.equal(labels, cluster_channels(features, k, seed))
    reach = [float(features[labels == label].abs().max()) for label in range(k)]
    assert reach == sorted(reach)


def test_what_differs_by_rounding_alone_is_one_cluster() -> None:
    features = 1 + 1e-13 * torch.randn(
        8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    assert cluster_channels(features, 2).tolist() == [0] * 8


def test_more_clusters_than_channels_are_refused() -> None:
    for k in (0, 4):
        with pytest.raises(QuantizationError, match=f"3 channels into {k} clusters"):
            cluster_channels(torch.zeros(3, 2), k)


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        cluster_channels(torch.tensor([[1.0], [torch.nan]]), 1)


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 8), st.integers(0, 100))
def test_limits_of_a_cluster_cover_its_channels_and_are_reached(
    channels: int, k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 10 * torch.randn(20, channels, generator=generator) + 5
    labels = torch.randint(0, k, (channels,), generator=generator)
    low, high = torch.aminmax(x, dim=0)
    found = cluster_limits(low, high, labels, k)
    for label in range(k):
        own = x[:, labels == label]
        expected = (own.min(), own.max()) if own.numel() else (torch.tensor(0.0), torch.tensor(0.0))
        assert (found[0][label], found[1][label]) == expected
    assert bool(
        (expand_clusters(found[0], labels) <= x).all()
        and (x <= expand_clusters(found[1], labels)).all()
    )


def spec(name: str, reads: Space, layer: int, branch: str = "") -> LinearSpec:
    return LinearSpec(name, reads, layer=layer, branch=branch)


def test_all_readers_of_the_residual_share_its_channels() -> None:
    specs = [
        spec("0.q", Space.RESIDUAL, 0),
        spec("0.o", Space.VALUE, 0),
        spec("0.down", Space.FFN, 0),
        spec("0.shared", Space.FFN, 0, "shared"),
        spec("1.q", Space.RESIDUAL, 1),
        spec("1.o", Space.VALUE, 1),
    ]
    assert shared_channels(specs) == [["0.q", "1.q"], ["0.o"], ["0.down"], ["0.shared"], ["1.o"]]


def test_joint_clusters_weigh_what_all_linears_see() -> None:
    """Each linear alone sees two groups; which channels are alike in both only the joint features
    tell.
    """
    scales = torch.ones(40)
    scales[:20] = 30.0
    other = torch.ones(40)
    other[10:30] = 30.0
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    inputs = {"0.q": statistics(x * scales), "1.q": statistics(x * other)}
    specs = [spec(name, Space.RESIDUAL, layer) for layer, name in enumerate(inputs)]
    apart = cluster_linears(inputs, specs, 2)
    assert torch.equal(apart["0.q"], (scales > 1).long())
    assert torch.equal(apart["1.q"], (other > 1).long())
    joint = cluster_linears(inputs, specs, 4, jointly=True)
    assert torch.equal(joint["0.q"], joint["1.q"])
    blocks = joint["0.q"].reshape(4, 10)
    assert bool((blocks == blocks[:, :1]).all())
    assert len(set(blocks[:, 0].tolist())) == 4


def test_a_linear_that_is_too_narrow_is_named() -> None:
    with pytest.raises(QuantizationError, match=r"'0\.q'.*2 channels into 3 clusters"):
        cluster_linears({"0.q": statistics(torch.randn(5, 2))}, [spec("0.q", Space.RESIDUAL, 0)], 3)


def test_tensors_on_different_axes_are_not_clustered_jointly() -> None:
    with pytest.raises(QuantizationError, match="2, 3"):
        joint_features([statistics(torch.randn(5, 2)), statistics(torch.randn(5, 3))])
    with pytest.raises(QuantizationError, match="no channels"):
        joint_features([])


def test_the_warning_names_the_runtimes() -> None:
    for runtime in ("ONNX Runtime", "TensorRT", "Tripy", "ModelOpt", "vLLM"):
        assert runtime in NO_FUSED_KERNEL
