"""Perplexity at W4A4 by rotation, with and without R4, in one run on one text.

Activations are fake-quantized per token to int4, symmetric and asymmetric; weights per output
channel to symmetric int4 by rounding to nearest. Nothing is trained but rotations. RowSplits: no
rotation, random Hadamard, DartQuant's reference (Whip, QR latent, SGD; 100 steps over 4 n tokens)
and what the pipeline makes of the scheme ``w4a4``; that one again with weight scales that clip for
the least squared error, still rounded to nearest.

Figures: perplexity, how far its logarithm is above the float model's, and KL(float || quantized) in
nats per token, which varies far less from one text or seed to the next.

The first ``--windows`` windows of the text are evaluated and windows further on calibrate.
``--windows 0`` splits the text by documents instead, one a row, as the pipeline does.

    python -m benchmarks.w4a4 --text FILE.txt [--model DIR] [--windows 24] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.capture.storage import Capture
from calib.data.rows import RowSplits
from calib.fusing import FusedModel, fuse, materialize
from calib.rotations.from_capture import train_rotations
from calib.rotations.quantizer import fake_quantize
from calib.rotations.rotation_set import (
    Rotation,
    RotationSet,
    fused_rotation,
    hadamard_rotations,
    online_rotations,
)
from calib.rotations.selection import integer_quantizer
from calib.rotations.train import train_rotation
from calib.rotations.train_config import TrainConfig
from calib.schemes import Scheme, scheme_named
from calib.weights.algorithms import algorithm_named
from exporter.recipe import load_recipe
from exporter.run.capturing import captured
from exporter.run.destination import Destination
from exporter.run.inputs import Inputs, open_inputs
from exporter.run.options import RunOptions
from exporter.run.rotations import judge_of
from exporter.run.stopwatch import Stopwatch
from exporter.run.workdir import WorkDir

REFERENCE_STEPS = 100
HELD_OUT = 0.2
APART, CALIBRATION = 32, 128
"""Windows between evaluation and calibration, and windows of calibration."""

W4A4 = scheme_named("w4a4")
assert W4A4.activation is not None
SCHEMES = {"sym": W4A4, "asym": replace(W4A4, activation=replace(W4A4.activation, symmetric=False))}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="embedded", help="checkpoint folder (default: the embedded model)"
    )
    parser.add_argument("--text", default="embedded", help="text (default: the embedded one)")
    parser.add_argument(
        "--windows", type=int, default=24, help="evaluation windows; 0: rows are documents"
    )
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        measure(arguments, seed)


def measure(arguments: argparse.Namespace, seed: int) -> None:
    """One table for one seed."""
    windows = {"calibration.layout": "windows"} if arguments.windows else {}
    recipe = load_recipe(
        None,
        {
            "model": arguments.model,
            "calibration.dataset": arguments.text,
            "calibration.seqlen": arguments.seqlen,
            "evaluation.nsamples": 64,
            "seed": seed,
            **windows,
        },
    )
    inputs, options, clock = (
        open_inputs(recipe, Destination.of(recipe)),
        RunOptions(Path()),
        Stopwatch(),
    )
    splits = _consecutive(inputs, arguments) if arguments.windows else inputs.rows(clock)
    rows = splits.evaluation
    original = [scores.log_softmax(-1) for scores in _logits(inputs.source.original("cpu"), rows)]
    plain = _nll(original, rows)
    tokens = sum(row.numel() - 1 for row in rows)
    print(
        f"seed {seed}: {inputs.source.name}, {len(rows)} rows, {tokens} tokens, float perplexity"
        f" {math.exp(plain):.3f}"
    )
    print(f"{'rotations':<24} {'R4':<4}", *(f"{kind:>8} {'gap':>7} {'KL':>7}" for kind in SCHEMES))
    makers: dict[str, Callable[[Inputs, Capture, Scheme, int], list[Rotation]]] = {
        "none": lambda inputs, capture, scheme, seed: [],
        "hadamard": _hadamard,
        "reference": _reference,
        "auto": _auto,
    }
    capture = captured(inputs, splits.train, options, WorkDir.of(options, inputs), clock)
    for name, make in makers.items():
        made = {kind: make(inputs, capture, scheme, seed) for kind, scheme in SCHEMES.items()}
        for algorithm in ("rtn", "mse") if name == "auto" else ("rtn",):
            for r4 in (False, True):
                figures = []
                for kind, scheme in SCHEMES.items():
                    found = _logits(
                        _quantized(_fused(inputs, made[kind], r4), inputs, scheme, algorithm), rows
                    )
                    scores = [part.log_softmax(-1) for part in found]
                    nll = _nll(scores, rows)
                    figures.append(
                        f"{math.exp(nll):>8.3f} {nll - plain:>7.4f} {_kl(original, scores):>7.4f}"
                    )
                label = name if algorithm == "rtn" else f"{name}, clipped weights"
                print(f"{label:<24} {'yes' if r4 else 'no':<4}", *figures, flush=True)


def _consecutive(inputs: Inputs, arguments: argparse.Namespace) -> RowSplits:
    """Windows of running text: the first ones to evaluate, others further on to calibrate."""
    text = Path(arguments.text).read_text(encoding="utf-8")
    tokens = torch.tensor(inputs.source.tokenizer(text, verbose=False)["input_ids"])
    windows = [row for row in torch.split(tokens, arguments.seqlen) if len(row) == arguments.seqlen]
    first = arguments.windows
    return RowSplits(
        train=windows[first + APART : first + APART + CALIBRATION],
        gate=windows[first : first + APART],
        evaluation=windows[:first],
        layout="windows",
    )


def _hadamard(inputs: Inputs, capture: Capture, scheme: Scheme, seed: int) -> list[Rotation]:
    source = inputs.source
    return list(hadamard_rotations(source.wiring, ["r1", "r2"], seed=seed).values())


def _reference(inputs: Inputs, capture: Capture, scheme: Scheme, seed: int) -> list[Rotation]:
    """As published, on 4 n tokens: 100 full-batch steps."""
    settings = TrainConfig(
        objective="whip",
        optimizer="qr",
        epochs=REFERENCE_STEPS,
        lr=1.5e-3,
        start="hadamard",
        seed=seed,
        normalize=False,
        fix_ones=inputs.source.wiring.layer_norm,
    )
    samples = capture.r1.samples.values.float()
    some = samples[
        torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[
            : 4 * samples.shape[1]
        ]
    ]
    r1 = train_rotation(some, settings)
    r2 = train_rotation(capture.r2_samples().float(), replace(settings, lr=1e-3, fix_ones=False))
    heads = [
        fused_rotation("r2", matrix, layer=layer)
        for layer, matrix in zip(capture.r2, r2.matrix, strict=True)
    ]
    return [fused_rotation("r1", r1.matrix), *heads]


def _auto(inputs: Inputs, capture: Capture, scheme: Scheme, seed: int) -> list[Rotation]:
    """What the pipeline trains and its gate keeps."""
    settings = TrainConfig(seed=seed)
    found = train_rotations(
        capture,
        inputs.source.wiring,
        ["r1", "r2"],
        r1=settings,
        r2=settings,
        held_out=HELD_OUT,
        judge=judge_of(scheme, inputs.fuse(RotationSet(), Stopwatch())),
    )
    return list(found.rotations.values())


def _fused(inputs: Inputs, rotations: list[Rotation], r4: bool) -> FusedModel:
    source = inputs.source
    online = online_rotations(source.wiring, ["r4"] if r4 else [])
    made = RotationSet([*rotations, *online])
    return fuse(source.checkpoint, source.wiring, made, dtype=torch.float32)


def _quantized(fused: FusedModel, inputs: Inputs, scheme: Scheme, algorithm: str) -> nn.Module:
    """Every decoder linear at W4A4. The hook comes after that of R4, which is attached first."""
    model: Any = materialize(fused)
    assert scheme.activation is not None
    quantizer = integer_quantizer(scheme.activation)
    assert quantizer is not None

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        return (fake_quantize(x.reshape(-1, x.shape[-1]), quantizer).view_as(x), *args[1:])

    for name in inputs.source.wiring.linear_names:
        linear = model.get_submodule(name)
        weight = (
            linear.weight.data
            if isinstance(linear, nn.Linear)
            else linear.weight.data.T.contiguous()
        )
        assert scheme.weight is not None  # both schemes here quantize
        rounded = (
            algorithm_named(algorithm).round(weight, None, scheme.weight).values(scheme.weight)
        )
        # transformers' Conv1D stores the transpose of a linear
        linear.weight.data = rounded if isinstance(linear, nn.Linear) else rounded.T.contiguous()
        linear.register_forward_pre_hook(hook)
    network: nn.Module = model
    return network


def _logits(model: Any, rows: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(input_ids=row.unsqueeze(0)).logits[0] for row in rows]


def _nll(scores: list[Tensor], rows: list[Tensor]) -> float:
    """Mean negative log-likelihood of a token given those before it in its row."""
    lost = [
        -part[:-1].gather(-1, row[1:, None]).sum() for part, row in zip(scores, rows, strict=True)
    ]
    return float(torch.stack(lost).sum()) / sum(row.numel() - 1 for row in rows)


def _kl(original: list[Tensor], scores: list[Tensor]) -> float:
    parts = [(p.exp() * (p - q)).sum(-1) for p, q in zip(original, scores, strict=True)]
    return float(torch.cat(parts).mean())


if __name__ == "__main__":
    main()
