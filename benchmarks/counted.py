"""``rotq`` with the tokens counted that parity runs, for benchmarks.job:

    python -m benchmarks.counted FILE export ...

writes to FILE, as JSON, how many tokens each model was run on, and how many there are to evaluate
on. Whatever computes a whole model counts: torch models by what enters their embedding, sessions of
ONNX Runtime by what they are fed.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from torch import Tensor

if TYPE_CHECKING:
    from calib.process.progress import Progress
    from exporter.parity import Subject
    from exporter.reporting.report import ParityRow


def main() -> None:
    """Run the command that stands behind FILE."""
    path = Path(sys.argv.pop(1))
    from exporter.cli.app import main as run
    from exporter.parity import check_parity

    def counted(subject: Subject, progress: Progress) -> list[ParityRow]:
        found = Counter[str]()
        with counting(found, subject.quantized.config["vocab_size"]):
            rows = check_parity(subject, progress)
        evaluation = sum(row.numel() for row in subject.rows)
        path.write_text(json.dumps({"tokens": found, "evaluation": evaluation}), encoding="utf-8")
        return rows

    with patch("exporter.run.writing.check_parity", counted):
        sys.exit(run())


@contextmanager
def counting(found: Counter[str], vocabulary: int) -> Iterator[None]:
    """Within the block, tokens are counted; an embedding of ``vocabulary`` rows is a model's."""
    from backends.onnx.runner import OnnxModel

    embed, run = torch.nn.Embedding.forward, OnnxModel._run

    def embedded(module: torch.nn.Embedding, ids: Tensor) -> Tensor:
        if module.num_embeddings >= vocabulary:
            found["torch"] += ids.numel()
        return embed(module, ids)

    def ran(model: OnnxModel, outputs: Sequence[str], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        found["ONNX Runtime"] += inputs["input_ids"].numel()
        return run(model, outputs, inputs)

    with (
        patch.object(torch.nn.Embedding, "forward", embedded),
        patch.object(OnnxModel, "_run", ran),
    ):
        yield


if __name__ == "__main__":
    main()
