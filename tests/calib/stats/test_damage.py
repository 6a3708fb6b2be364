"""What schemes do to linears, against arithmetic written out in the test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calib.architectures import LinearSpec, Space
from calib.data.batches import Batch
from calib.errors import QuantizationError
from calib.schemes import LinearScheme, PerCluster, scheme_named
from calib.stats.clusters import cluster_linears
from calib.stats.damage import LinearDamage, linear_damage, rounded_weight
from calib.stats.linears import LinearMoments, linear_moments

WIDTH, OUT, TOKENS = 64, 96, 512
SPEC = LinearSpec("linear", Space.RESIDUAL, layer=0)
BATCH = Batch(torch.arange(TOKENS).unsqueeze(0), (0,))


class Table(nn.Module):
    """A "language model" whose only linear sees chosen vectors: row i for token i."""

    def __init__(self, rows: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.rows = rows
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight = nn.Parameter(weight)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return self.linear(self.rows[input_ids])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlying(seed: int = 0) -> Tensor:
    """[TOKENS, WIDTH] inputs of which a few channels are much larger."""
    scales = torch.ones(WIDTH)
    scales[::16] = 50.0
    return normal(TOKENS, WIDTH, seed=seed) * scales


def measure(
    x: Tensor,
    weight: Tensor,
    scheme: LinearScheme | None,
    clusters: Mapping[str, Tensor] | None = None,
) -> tuple[LinearDamage, LinearMoments]:
    model = Table(x, weight)
    moments = linear_moments(model, [SPEC], [BATCH])
    schemes = {} if scheme is None else {"linear": scheme}
    return linear_damage(model, [SPEC], moments, schemes, [BATCH], clusters=clusters)[
        "linear"
    ], moments["linear"]


def relative_error(rounded: Tensor, x: Tensor) -> float:
    return float((rounded.double() - x.double()).square().sum() / x.double().square().sum())


# Sums of tens of thousands of squares in float32, against float64: 1e5 · 2**-24 / √1e5 at random,
# and some room.
FLOAT32_SUM = 1e-4


def test_int8_rounds_inputs_by_the_tensor_and_weights_by_the_row() -> None:
    x, weight = outlying(), normal(OUT, WIDTH, seed=1)
    found, _ = measure(x, weight, scheme_named("int8").linear)
    step, steps = x.abs().max() / 127, weight.abs().amax(1, keepdim=True) / 127
    x_hat, w_hat = (x / step).round() * step, (weight / steps).round() * steps
    assert found.input_error == pytest.approx(relative_error(x_hat, x), rel=FLOAT32_SUM)
    assert found.weight_error == pytest.approx(relative_error(w_hat, weight), rel=FLOAT32_SUM)
    assert found.damage == pytest.approx(
        relative_error(x_hat @ w_hat.T, x @ weight.T), rel=FLOAT32_SUM
    )


def test_w4a4_rounds_inputs_by_the_token() -> None:
    x, weight = outlying(), normal(OUT, WIDTH, seed=1)
    found, _ = measure(x, weight, scheme_named("w4a4").linear)
    step = x.abs().amax(1, keepdim=True) / 7
    assert found.input_error == pytest.approx(
        relative_error((x / step).round() * step, x), rel=FLOAT32_SUM
    )


@pytest.mark.parametrize(
    "name", ["int8", "int8-dynamic", "w4a4", "float8", "nvfp4", "mxfp4", "mxfp8"]
)
def test_errors_add_up_where_nothing_has_a_preferred_direction(name: str) -> None:
    """As derived in the module. 49 thousand outputs: a few per cent of chance, and as much for the
    product of both.
    """
    found, _ = measure(normal(TOKENS, WIDTH), normal(OUT, WIDTH, seed=1), scheme_named(name).linear)
    assert found.damage == pytest.approx(found.input_error + found.weight_error, rel=0.1)


def test_errors_count_less_where_the_weight_amplifies_the_input() -> None:
    """All inputs along one direction that the weight is ten times larger in; the error goes into
    all directions.
    """
    direction = torch.ones(1, WIDTH) / WIDTH**0.5
    x = normal(TOKENS, 1) @ direction + 0.01 * normal(TOKENS, WIDTH, seed=2)
    weight = normal(OUT, WIDTH, seed=1) / 10 + normal(OUT, 1, seed=3) @ direction
    found, _ = measure(x, weight, scheme_named("int8").linear)
    assert found.damage < (found.input_error + found.weight_error) / 2


def test_weight_only_schemes_leave_the_input_alone() -> None:
    found, _ = measure(outlying(), normal(OUT, WIDTH), scheme_named("int4-weight-only").linear)
    assert found.input_error == 0 < found.weight_error
    assert found.damage > 0


def test_a_linear_without_a_scheme_is_not_damaged() -> None:
    found, _ = measure(outlying(), normal(OUT, WIDTH), None)
    assert (found.input_error, found.weight_error, found.damage) == (0, 0, 0)
    assert found.input_outliers > 0


def test_asymmetric_inputs_lose_less_where_one_sign_prevails() -> None:
    x, weight = normal(TOKENS, WIDTH).abs(), normal(OUT, WIDTH)
    scheme = scheme_named("int8").linear
    assert scheme.input is not None
    symmetric, _ = measure(x, weight, scheme)
    asymmetric, _ = measure(
        x, weight, replace(scheme, input=replace(scheme.input, symmetric=False))
    )
    # Twice the levels for the same range: a quarter of the squared error, up to the 1/255 of a
    # level and chance.
    assert asymmetric.input_error == pytest.approx(symmetric.input_error / 4, rel=0.05)


def clustered(k: int) -> LinearScheme:
    scheme = scheme_named("int8").linear
    assert scheme.input is not None
    return replace(scheme, input=replace(scheme.input, granularity=PerCluster(k)))


def test_one_cluster_is_one_scale_for_the_tensor() -> None:
    x, weight = outlying(), normal(OUT, WIDTH)
    one, moments = measure(
        x, weight, clustered(1), {"linear": torch.zeros(WIDTH, dtype=torch.int64)}
    )
    plain, _ = measure(x, weight, scheme_named("int8").linear)
    assert one == plain
    labels = cluster_linears({"linear": moments.input}, [SPEC], 2)
    assert torch.equal(labels["linear"], (torch.arange(WIDTH) % 16 == 0).long())
    two, _ = measure(x, weight, clustered(2), labels)
    # 60 of 64 channels get a step that is 50 times finer; the other four, with nearly all of the
    # energy, keep theirs.
    assert two.input_error < plain.input_error / 10


def test_clusters_need_labels() -> None:
    with pytest.raises(QuantizationError, match="needs the cluster"):
        measure(outlying(), normal(OUT, WIDTH), clustered(2))


def test_outliers_are_counted_beyond_six_deviations() -> None:
    x, weight = torch.zeros(TOKENS, WIDTH), torch.zeros(OUT, WIDTH)
    x[::2], x[1::2] = 1.0, -1.0  # deviation 1, but for the five values below
    x[:5, 0] = torch.tensor([5.5, 5.9, 6.5, -7.0, 30.0])
    weight[:, 0] = 1.0  # each output is the input's first channel
    weight[0, 1] = 100.0
    found, moments = measure(x, weight, scheme_named("int8").linear)
    assert float(moments.input.pooled().std) == pytest.approx(1, abs=0.02)
    assert found.input_outliers == 3 / (TOKENS * WIDTH)
    assert found.weight_outliers == 1 / (OUT * WIDTH)
    y = x @ weight.T
    assert found.output_outliers == float((y.abs() > 6 * y.std(correction=0)).double().mean())


def test_a_zero_weight_and_a_zero_input_lose_nothing() -> None:
    found, _ = measure(
        torch.zeros(TOKENS, WIDTH), torch.zeros(OUT, WIDTH), scheme_named("int8").linear
    )
    assert found == LinearDamage(0, 0, 0, 0, 0, 0)


def test_finer_formats_damage_less() -> None:
    weight = normal(OUT, WIDTH)
    schemes = [scheme_named(name).weight for name in ("int8", "int4-weight-only", "mxfp4")]
    errors = [relative_error(rounded_weight(weight, scheme), weight) for scheme in schemes]
    assert errors == sorted(errors)
