"""What a run is told besides its recipe. Apart from the pipeline, so that the command line can
build and check it without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunOptions:
    """Where a run writes, and what it may reuse. None of it changes the numbers, so none of it is
    in the recipe.
    """

    output: Path
    overwrite: bool = False
    verify: bool = True
    work_dir: Path | None = None
    resume: bool = False
    from_artifact: Path | None = None
    """A saved quantized model to write: nothing is calibrated."""
    from_capture: Path | None = None
    """Captured statistics to train on: nothing is captured."""
