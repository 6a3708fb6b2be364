from __future__ import annotations

import pytest

from calib.errors import QuantizationError
from calib.smoothing.methods import Awq, SmoothQuant, smoothing_named


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("none", None),
        ("smoothquant", SmoothQuant(0.5)),
        ("smoothquant:0.7", SmoothQuant(0.7)),
        ("smoothquant:auto", SmoothQuant("auto")),
        ("awq", Awq(20)),
        ("awq:grid=5", Awq(5)),
    ],
)
def test_names(text: str, method: object) -> None:
    assert smoothing_named(text) == method


@pytest.mark.parametrize(
    "text", ["", "smooth", "smoothquant:half", "awq:5", "awq:grid=", "none:1", "SmoothQuant"]
)
def test_unknown_names_are_told_the_known_ones(text: str) -> None:
    with pytest.raises(QuantizationError, match=f"unknown smoothing '{text}'") as error:
        smoothing_named(text)
    assert error.value.hint.endswith(
        "choose from none, smoothquant, smoothquant:ALPHA, smoothquant:auto, awq, awq:grid=STEPS"
    )


@pytest.mark.parametrize("text", ["smoothquant:1.5", "smoothquant:nan", "awq:grid=0"])
def test_values_out_of_range(text: str) -> None:
    with pytest.raises(QuantizationError, match=r"alpha is|grid has"):
        smoothing_named(text)
