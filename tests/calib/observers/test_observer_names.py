"""Observers by name: what is refused, and how."""

from __future__ import annotations

import pytest
import torch

from calib.errors import QuantizationError
from calib.observers import OBSERVERS, observer_named
from calib.schemes import (
    FLOAT8,
    INT8,
    PerChannel,
    PerCluster,
    PerTensor,
    TensorScheme,
    scheme_named,
)

static = TensorScheme(INT8, PerTensor())


def test_an_unknown_observer_lists_all() -> None:
    with pytest.raises(QuantizationError, match="unknown observer 'maximum'") as caught:
        observer_named("maximum")
    assert caught.value.hint is not None
    assert all(name in caught.value.hint for name in OBSERVERS)


@pytest.mark.parametrize(
    "spec",
    [
        "percentile:",
        "percentile:high",
        "percentile:101",
        "percentile:49",
        "percentile:50",
        "percentile:nan",
        "clip",
        "clip:0",
        "clip:-1",
        "clip:inf",
        "clip_std:0",
        "fixed_scale",
        "fixed_scale:0",
        "fixed_scale:nan",
        "moving_average:1.1",
        "moving_average:-0.1",
        "min_max:1",
        "entropy:2",
    ],
)
def test_a_bad_number_is_refused_by_name(spec: str) -> None:
    with pytest.raises(QuantizationError, match=f"observer '{spec.partition(':')[0]}") as caught:
        observer_named(spec)
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("spec", "scheme"),
    [
        ("entropy", TensorScheme(FLOAT8, PerTensor())),
        ("entropy", TensorScheme(INT8, PerChannel(0))),
        ("percentile", TensorScheme(INT8, PerChannel(0))),
        ("clip_std", TensorScheme(INT8, PerCluster(2))),
        ("moving_average", TensorScheme(INT8, PerCluster(2))),
        ("mse", scheme_named("nvfp4").activation),
        ("fixed_scale:1", scheme_named("mxfp4").weight),
    ],
)
def test_a_scheme_that_it_cannot_serve_is_refused(spec: str, scheme: TensorScheme) -> None:
    with pytest.raises(QuantizationError, match=f"observer '{spec}' needs") as caught:
        observer_named(spec)(scheme)
    assert "min_max" in str(caught.value.hint)


@pytest.mark.parametrize("spec", ["min_max", "percentile:99"])
def test_the_second_level_of_a_dynamic_scheme_is_observed_as_one_range(spec: str) -> None:
    scheme = scheme_named("nvfp4").activation
    assert scheme is not None
    observer = observer_named(spec)(scheme)
    observer.observe(torch.arange(-3.0, 5.0).reshape(2, 4))
    low, high = observer.limits()
    assert low.shape == high.shape == ()


@pytest.mark.parametrize("name", OBSERVERS)
def test_nothing_observed_and_nothing_finite(name: str) -> None:
    observer = observer_named(f"{name}:1" if name in ("clip", "fixed_scale") else name)(static)
    observer.observe(torch.zeros(0, 4))
    with pytest.raises(QuantizationError, match="has seen no values"):
        observer.limits()
    for bad in (torch.nan, torch.inf):
        with pytest.raises(QuantizationError, match="NaN or Inf"):
            observer.observe(torch.tensor([0.0, bad]))
    assert observer.count == 0


def test_observers_of_different_kinds_do_not_merge() -> None:
    with pytest.raises(QuantizationError, match="observer 'mse' cannot take over"):
        observer_named("mse")(static).merge(observer_named("min_max")(static))
    with pytest.raises(QuantizationError, match="observer state holds nothing"):
        observer_named("mse")(static).load_state({})
