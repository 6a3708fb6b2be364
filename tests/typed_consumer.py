"""What a package that uses rotq may look like: ``make package`` checks it with ``mypy --strict``
against the installed wheel, which fails where rotq does not carry its types along."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import rotq
from exporter import export, load_recipe
from exporter.recipe import Recipe


def passed(output: Path) -> bool:
    """Whether an export is fit for use."""
    result = export(recipe=load_recipe("int8"), output=output)
    assert_type(result.recipe, Recipe)
    assert_type(result.output, Path)
    assert_type(rotq.load_recipe("int8", nsamples=8), Recipe)
    return result.report.status == "passed"
