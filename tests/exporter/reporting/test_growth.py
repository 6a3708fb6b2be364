"""A folder that outgrows its checkpoint is not left without a word."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from backends.base import StoredTensor
from exporter.commands.export import export
from exporter.recipe import load_recipe
from exporter.reporting.growth import growth_warning
from exporter.reporting.report import LayerSummary
from exporter.run.options import RunOptions

FEW = {"calibration.nsamples": 2, "calibration.seqlen": 32, "rotate": "none"}
CONTENTS = [
    StoredTensor("small", "float weight", "float32", (1,), 4),
    StoredTensor("table", "float weight", "float32", (4, 64), 1024),
    StoredTensor("linear", "quantized weight", "int8", (8, 256), 2048),
]


def layers(before: int) -> LayerSummary:
    after = sum(tensor.nbytes for tensor in CONTENTS)
    return LayerSummary(quantized=1, kept=[], bytes_before=before, bytes_after=after)


def test_the_largest_float_tensors_are_named() -> None:
    def unread() -> list[StoredTensor]:
        raise AssertionError("nothing has to be named")

    assert growth_warning(layers(3076), unread) is None
    found = growth_warning(layers(3075), lambda: CONTENTS)
    assert found is not None
    assert "3.0 KiB -> 3.0 KiB" in found
    assert found.endswith("in float: table (float32, 1.0 KiB), small (float32, 4 B)")


@pytest.mark.parametrize(("scheme", "warned"), [("float", True), ("int8", False)])
def test_an_export_says_it(
    scheme: str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        export(
            load_recipe(None, {**FEW, "scheme": scheme}), RunOptions(tmp_path / "o", verify=False)
        )
    assert ("more room than the checkpoint" in caplog.text) is warned
    assert ("lm_head.weight (float, 2.0 MiB)" in caplog.text) is warned
