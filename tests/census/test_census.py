"""Every decoder of text that the installed transformers has, exported and held against it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from calib.architectures import supported_model_types
from tests.census.configs import decoder_types, tiny_config
from tests.census.conftest import PROPERTY
from tests.census.expected import BAR, REFUSED
from tests.census.measure import measured
from tests.census.table import line

pytestmark = pytest.mark.census


@pytest.mark.parametrize("name", decoder_types())
def test_type(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    row = measured(name, tmp_path)
    record_property(PROPERTY, line(row))
    if name in REFUSED:
        assert row.how == "refused"
        assert REFUSED[name] in row.reason
    else:
        listed = tiny_config(name).model_type in supported_model_types()  # gpt-sw3 is a gpt2
        assert row.how == ("table" if listed else "generic"), row.reason
        assert row.worst <= BAR.get(name, BAR[""])


def test_nothing_is_expected_of_a_type_that_is_not_there() -> None:
    assert {*REFUSED, *BAR} - {""} <= {*decoder_types()}
