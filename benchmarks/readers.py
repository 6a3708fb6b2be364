"""What a report says of a bundle for transformers, against what transformers alone makes of it:
``python -m benchmarks.readers --model FOLDER``.

Every scheme that the target takes is exported with the default options, on a few rows. The folder
is then loaded by ``AutoModelForCausalLM.from_pretrained``, with nothing of rotq in between, and its
perplexity over the report's rows, divided by that of the original, is held against the report's.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backends.asking import refusal_of
from backends.base import Request
from backends.registry import get_backend
from calib.measure.perplexity import model_logits, perplexity
from calib.schemes import SCHEMES, PerBlock
from exporter.commands.export import export
from exporter.recipe import load_recipe
from exporter.reporting.report import Report
from exporter.run.options import RunOptions
from exporter.source import open_source, read_rows

TARGET = {"backend": "safetensors", "target": "transformers"}


def main() -> None:
    """Print a line for each scheme."""
    arguments = _arguments()
    settings = {
        "model": arguments.model,
        "calibration.nsamples": arguments.rows,
        "gate.nsamples": max(2, arguments.rows // 4),
        "evaluation.nsamples": arguments.eval_rows,
        "calibration.seqlen": arguments.seqlen,
    }
    if arguments.epochs is not None:
        settings |= {f"rotation.{kind}.epochs": arguments.epochs for kind in ("r1", "r2")}
    if arguments.dataset:
        settings["calibration.dataset"] = arguments.dataset
    for name in arguments.scheme or _taken():
        with tempfile.TemporaryDirectory() as folder:
            blocks = {"weights.block_size": arguments.block_size} if _in_blocks(name) else {}
            print(_line(name, {**settings, **blocks}, Path(folder) / "out"), flush=True)


def _taken() -> list[str]:
    """The schemes that the target takes."""
    backend = get_backend(TARGET["backend"])
    asked = {
        name: Request(TARGET["target"], linears={"model.layers.0.mlp.up_proj": scheme.linear})
        for name, scheme in SCHEMES.items()
        if scheme.linear is not None
    }
    return [name for name, request in asked.items() if refusal_of(backend, request) is None]


def _in_blocks(name: str) -> bool:
    """Whether the blocks of a scheme have a size that may be chosen."""
    weight = SCHEMES[name].weight
    return (
        weight is not None
        and isinstance(weight.granularity, PerBlock)
        and weight.scale_format == "compute"
    )


def _line(scheme: str, settings: Mapping[str, Any], output: Path) -> str:
    """Export, load, compare."""
    recipe = load_recipe(None, {**settings, **TARGET, "scheme": scheme})
    report = export(recipe, RunOptions(output)).report
    source = open_source(recipe)
    rows = read_rows(recipe, source.tokenizer, source.config).evaluation

    original = _scored(source.original("cpu"), rows)
    plain = _scored(_plain(output), rows) / original
    ratio = _ratio(report)
    return (
        f"{scheme:<18} report {ratio:.5f}  transformers {plain:.5f}"
        f"  apart {abs(ratio / plain - 1):.1e}  parity {report.status}"
    )


def _plain(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


@torch.no_grad()
def _scored(model: nn.Module, rows: Sequence[Tensor]) -> float:
    window = max(row.numel() for row in rows)
    return perplexity(model_logits(model), rows, window=window, stride=window).value


def _ratio(report: Report) -> float:
    """What the report says, in transformers."""
    (row,) = [row for row in report.parity if row.metric == "perplexity ratio"]
    if row.measured is None or not row.runtime.startswith("transformers "):
        raise SystemExit(f"{report.scheme}: not measured in transformers: {row.note}")
    return row.measured


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", help="text for all rows; by default that of the recipe")
    parser.add_argument("--scheme", action="append", help="one scheme; may be repeated")
    parser.add_argument("--rows", type=int, default=8, help="calibration rows")
    parser.add_argument("--eval-rows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument(
        "--epochs",
        type=int,
        help="of the training of rotations, most of the time of a scheme: what two readers make of"
        " one folder does not depend on it (default: the recipe's)",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        default=64,
        help="where a scheme has blocks: the target takes none that are short, and 128 does not"
        " divide 576 (default: 64)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
