"""What is said of a static range is the arithmetic of its scale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backends.onnx.backend import OnnxBackend
from calib.artifact import QuantizedLinear, QuantizedModel
from calib.fusing import FusedModel, materialize
from calib.measure.perplexity import model_logits
from calib.schemes import INT8, PerTensor, TensorScheme
from exporter.parity import Subject
from exporter.parity.ranges import Use, range_rows, ranges_watched
from exporter.parity.shared_inputs import shared_input_rows
from exporter.reporting.report import ParityRow
from tests.tiny import CONFIGS, fuse_tiny, make_tiny, quantize_fused, token_rows

STATIC = TensorScheme(INT8, PerTensor())


def test_the_use_of_a_range_is_its_largest_value_over_its_end() -> None:
    use = Use(STATIC, torch.tensor(0.5), None)
    use.look(torch.tensor([[1.0, -31.75, 0.0, 2.0]]))
    assert use.largest == 0.5  # 63.5 steps of 127
    assert (use.values, use.clipped, use.width) == (4, 0, 4)
    use.look(torch.tensor([[63.7, 64.0, -64.0, 0.0]]))  # half a step beyond is rounded to the end
    assert use.clipped == 2
    assert use.largest == pytest.approx(128 / 127)


def test_an_asymmetric_range_is_used_from_its_middle() -> None:
    scheme = replace(STATIC, symmetric=False)
    use = Use(scheme, torch.tensor(1.0), torch.tensor(-128.0))
    use.look(torch.tensor([[0.0, 255.0]]))
    assert use.largest == 1.0
    assert use.clipped == 0


@pytest.fixture(scope="module")
def made() -> tuple[FusedModel, QuantizedModel]:
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()), ["r1", "r4"])
    return fused, quantize_fused(fused)


def scaled_subject(
    made: tuple[FusedModel, QuantizedModel], factor: float, only: str = ""
) -> Subject:
    """Of the tiny model, whose scales of inputs of linears with ``only`` in their names are
    ``factor`` times as large.
    """
    fused, quantized = made

    def scaled(linear: QuantizedLinear) -> QuantizedLinear:
        assert linear.input_scale is not None
        own = factor if only in linear.name else 1.0
        return replace(linear, input_scale=own * linear.input_scale)

    linears = {name: scaled(linear) for name, linear in quantized.linears.items()}
    changed = replace(quantized, linears=linears)
    return Subject(changed, OnnxBackend(), "ort", Path(), [], None, fused)


def watched(subject: Subject) -> dict[str, Use]:
    """On the rows of calibration themselves, whose maxima are the scales'."""
    assert subject.fused is not None
    rotated = materialize(subject.fused)
    with ranges_watched(subject, rotated) as uses:
        for row in token_rows():
            model_logits(rotated)(row.unsqueeze(0))
    return uses


def judged(subject: Subject) -> dict[str, ParityRow]:
    """By name and metric."""
    rows = range_rows(subject, watched(subject))
    return {f"{row.name}, {row.metric}": row for row in rows}


SHARE = "static ranges on held-out inputs, share of ranges that do not fit"
KIND = "static ranges of one kind on held-out inputs, share of ranges that do not fit"


def test_the_rows_of_calibration_use_a_range_to_its_end(
    made: tuple[FusedModel, QuantizedModel],
) -> None:
    for use in watched(scaled_subject(made, 2.0)).values():
        assert use.largest * 2 == pytest.approx(1, rel=1e-5)  # the order of float32 sums


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (2.0, False), (0.5, False)])
def test_ranges_that_are_wrong_by_two_fail(
    made: tuple[FusedModel, QuantizedModel], factor: float, passed: bool
) -> None:
    rows = judged(scaled_subject(made, factor))
    for name in (SHARE, KIND):
        assert rows[name].passed is passed
        assert rows[name].measured == (0.0 if passed else 1.0)


@pytest.mark.parametrize(("only", "measured"), [("o_proj", 1.0), ("1.self_attn.o", 0.5)])
def test_a_kind_that_is_wrong_in_most_layers_fails(
    made: tuple[FusedModel, QuantizedModel], only: str, measured: float
) -> None:
    """Two linears of fourteen are no quarter; one layer of two may hold a massive token."""
    rows = judged(scaled_subject(made, 2.0, only))
    assert rows[SHARE].passed
    assert rows[KIND].measured == measured
    assert rows[KIND].passed is (measured <= 0.5)


@pytest.mark.parametrize(
    ("only", "apart"), [("", 0), ("up_proj", 2), ("1.self_attn.q", 2), ("o_proj", 0)]
)
def test_linears_that_read_one_input_have_one_scale(
    made: tuple[FusedModel, QuantizedModel], only: str, apart: int
) -> None:
    """Of ``q`` the other two are apart; ``o`` has nothing beside it. A step of float32 is seen."""
    (row,) = shared_input_rows(scaled_subject(made, 1 + 2**-22, only))
    assert row.measured == apart
    assert row.passed is (apart == 0)


def test_experts_have_ranges_of_their_own() -> None:
    """Each reads the tokens that were sent to it."""
    fused = fuse_tiny(make_tiny(CONFIGS["mixtral"]()), ["r1"])
    (row,) = shared_input_rows(
        Subject(quantize_fused(fused), OnnxBackend(), "ort", Path(), [], None, fused)
    )
    assert row.passed
    assert row.note == "4 compared"  # key and value beside query, of two layers
