"""Moments of the linears of tiny models, against what hooks of the test's own see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from calib.architectures import LinearSpec
from calib.data.batches import Batch, length_batches
from calib.errors import DataError, QuantizationError
from calib.fusing import FusedModel, materialize
from calib.stats.linears import linear_moments, linear_weight, matrix_moments
from calib.stats.moments import MomentStatistics
from tests.tiny import CONFIGS, fuse_tiny, make_tiny, relative_l2, token_rows

FLOAT64 = 1e-12
"""Relative: a few hundred float64 additions in another order."""


def fused(
    name: str = "llama", kinds: tuple[Any, ...] = (), dtype: torch.dtype = torch.float64
) -> FusedModel:
    return fuse_tiny(make_tiny(CONFIGS[name]()), kinds, dtype)


def specs_of(model: FusedModel) -> list[LinearSpec]:
    names = model.wiring.linear_names
    return [spec for spec in model.wiring.linears if spec.name in names]


def seen(network: Any, names: list[str], batches: list[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs [tokens, n] of linears without padding."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda _, args, y, kept=found[name]: kept.append(
                (args[0].flatten(0, -2), y.flatten(0, -2))
            )
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            network(batch.input_ids)
    for handle in handles:
        handle.remove()
    return {
        name: tuple(map(torch.cat, zip(*parts, strict=True)))  # type: ignore[misc]
        for name, parts in found.items()
    }


def expect(found: MomentStatistics, x: Tensor) -> None:
    assert found.count == len(x)
    assert torch.equal(found.minimum, x.amin(0).double())
    assert torch.equal(found.maximum, x.amax(0).double())
    deviation = x.double() - x.double().mean(0)
    assert relative_l2(found.mean, x.double().mean(0)) < FLOAT64
    assert relative_l2(found.std, deviation.square().mean(0).sqrt()) < FLOAT64
    assert (
        relative_l2(found.kurtosis, (deviation**4).mean(0) / deviation.square().mean(0) ** 2)
        < FLOAT64
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2_moe"])
def test_inputs_outputs_and_weights_of_every_linear(name: str) -> None:
    # R4 runs online: what counts is what the linear multiplies
    model = fused(name, ("r1", "r2", "r4"))
    network, specs = materialize(model), specs_of(model)
    batches = length_batches(token_rows(), 4)
    found = linear_moments(network, specs, batches)
    wanted = seen(network, [spec.name for spec in specs], batches)
    assert list(found) == [spec.name for spec in specs]
    for spec in specs:
        moments, (x, y) = found[spec.name], wanted[spec.name]
        stored = network.get_submodule(spec.name).weight
        weight = stored.T if spec.layout == "conv1d" else stored
        assert weight.shape == (y.shape[1], x.shape[1])
        assert torch.equal(linear_weight(network, spec), weight)
        bias = getattr(network.get_submodule(spec.name), "bias", None)
        # x is what W is multiplied with
        assert relative_l2(x @ weight.T + (0 if bias is None else bias), y) < FLOAT64
        expect(moments.input, x)
        expect(moments.output, y)
        expect(moments.weight_in, weight)
        expect(moments.weight_out, weight.T)


def test_pad_positions_do_not_count() -> None:
    """The same rows with and without padding, which the model itself computes up to rounding."""
    model = fused()
    network, specs = materialize(model), specs_of(model)
    rows = token_rows()
    length = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in rows])
    mask = torch.stack([torch.arange(length) < len(row) for row in rows]).long()
    padded = linear_moments(network, specs, [Batch(ids, tuple(range(len(rows))), mask)])
    plain = linear_moments(network, specs, length_batches(rows, 4))
    for name, moments in plain.items():
        assert padded[name].input.count == moments.input.count == sum(map(len, rows))
        for part in ("mean", "std", "minimum", "maximum", "kurtosis"):
            # The norms of transformers drop to float32 inside, whose last digit depends on the
            # order of sums.
            assert (
                relative_l2(getattr(padded[name].input, part), getattr(moments.input, part)) < 1e-5
            )


def test_moments_follow_the_model_they_are_taken_from() -> None:
    """Smoothing by a power of two: inputs halve, weight columns double, outputs stay; all
    exactly.
    """
    model = fused(dtype=torch.float32)
    network, specs = materialize(model), specs_of(model)[:3]  # q, k and v of the first layer
    batches = length_batches(token_rows(), 4)
    before = linear_moments(network, specs, batches)
    with torch.no_grad():
        network.model.layers[0].input_layernorm.weight.mul_(0.5)
        for spec in specs:
            network.get_submodule(spec.name).weight.mul_(2)
    after = linear_moments(network, specs, batches)
    for name in before:
        assert torch.equal(after[name].input.std, before[name].input.std / 2)
        assert torch.equal(after[name].weight_in.maximum, before[name].weight_in.maximum * 2)
        assert torch.equal(after[name].output.kurtosis, before[name].output.kurtosis)


def test_matrices_larger_than_a_chunk_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calib.stats.moments.CHUNK_ELEMENTS", 10)
    matrix = torch.randn(37, 3, generator=torch.Generator().manual_seed(0))
    expect(matrix_moments(matrix), matrix)


def test_a_linear_that_sees_nan_is_named() -> None:
    model = fused()
    network, specs = materialize(model), specs_of(model)
    with torch.no_grad():
        network.model.layers[1].post_attention_layernorm.weight[3] = torch.nan
    with pytest.raises(
        QuantizationError, match=r"input of 'model\.layers\.1\.mlp\.gate_proj' holds NaN"
    ):
        linear_moments(network, specs, length_batches(token_rows(), 4))


def test_nothing_to_run_is_refused() -> None:
    model = fused()
    with pytest.raises(DataError, match="no calibration batches"):
        linear_moments(materialize(model), specs_of(model), [])


def test_a_linear_that_is_never_reached_is_named_and_hooks_are_removed() -> None:
    model = fused()
    network = materialize(model)
    head = model.wiring.head  # only the body is run
    with pytest.raises(QuantizationError, match="lm_head"):
        linear_moments(network, [*specs_of(model), head], length_batches(token_rows(), 4))
    assert not any(module._forward_hooks for module in network.modules())
