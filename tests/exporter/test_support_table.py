"""The generated table of support."""

from __future__ import annotations

from pathlib import Path

import pytest

from calib.architectures import supported_model_types
from calib.errors import OutputError
from exporter.tables.support_table import BEGIN, END, support_table, with_table

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_is_up_to_date() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run: python -m exporter.tables.support_table"


def test_every_model_type_is_listed_and_refusals_are_marked() -> None:
    rows = {
        row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]]
        for row in support_table().splitlines()
    }
    listed = [name for cells in rows.values() for name in cells[0].replace("`", "").split(", ")]
    assert set(supported_model_types()) == set(listed) - {"model types", "---", ""}
    assert rows["Llama"][1:6] == ["table", "folded", "folded", "online", "online"]
    assert rows["Gemma-2"][1:6] == ["table", "no", "folded", "online", "online"]
    assert "all-ones" in rows["GPT-2"][6]
    assert rows["other decoders"][1:6] == ["generic", "no", "no", "no", "no"]


def test_the_table_replaces_an_old_one_and_nothing_else() -> None:
    once = with_table(f"above\n\n{BEGIN}\n\nbelow\n")
    assert with_table(once.replace("Llama", "Lama")) == once
    assert once.startswith("above\n")
    assert once.endswith(f"{END}\n\nbelow\n")
    with pytest.raises(OutputError, match="no line"):
        with_table("nothing here")
