"""``python -m tests.census [TYPE ...]``: the table, of these types or of all."""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path

from tests.census.configs import decoder_types
from tests.census.measure import Row, measured
from tests.census.table import line


def _main(names: list[str]) -> None:
    for name in names or decoder_types():
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = measured(name, Path(folder))
            except Exception as error:  # of a type that nobody has looked at
                traceback.print_exc(limit=-3)
                row = Row(name, "failed", f"{type(error).__name__}: {error}"[:200])
        print(line(row), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
