"""A family is one row of the table and one tiny config, and what it refuses has its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

import backends
import calib
import exporter
from calib.architectures import supported_model_types, wiring_for
from calib.errors import UnsupportedModelError
from tests.rows import EVERY, ROWS

REFUSED = {
    "olmo3": "r1",
    "exaone4": "r1",
    "glm4": "r1",
    "hunyuan_v1_dense": "r3",
    "phi": "r3",
    "stablelm": "r3",
}


def test_every_family_has_a_tiny_config() -> None:
    assert {make().model_type for make in EVERY.values()} == set(supported_model_types())


def test_nothing_but_the_table_names_a_row() -> None:
    packages = [Path(package.__file__ or "").parent for package in (backends, calib, exporter)]
    sources = {path: path.read_text() for root in packages for path in root.rglob("*.py")}
    naming = {
        path.name
        for path, text in sources.items()
        for name in ROWS
        if f'"{name}"' in text or f"'{name}'" in text
    }
    assert naming
    assert all(name.startswith("table_") for name in naming)


@pytest.mark.parametrize("name", ROWS)
def test_rows_refuse_what_does_not_commute_and_nothing_else(name: str) -> None:
    wiring = wiring_for(ROWS[name]())
    refused = [kind for kind in ("r1", "r2", "r3", "r4") if wiring.refusal(kind) is not None]
    assert refused == ([REFUSED[name]] if name in REFUSED else [])


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("stablelm", "use_parallel_residual", True),
        ("stablelm", "qk_layernorm", True),
        ("olmoe", "clip_qkv", 8.0),
    ],
)
def test_features_without_a_place_in_the_row_are_refused(
    name: str, key: str, value: object
) -> None:
    config = ROWS[name]()
    setattr(config, key, value)
    with pytest.raises(UnsupportedModelError, match=key):
        wiring_for(config)
