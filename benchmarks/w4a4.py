"""Perplexity at W4A4 by rotation, with and without R4, in one run on one text.

Activations are fake-quantized per token to int4, symmetric and asymmetric; weights per output channel to symmetric
int4 by rounding to nearest. Nothing is trained but rotations. Rows: no rotation, random Hadamard, DartQuant's reference
(Whip, QR latent, SGD; 100 steps over 4 n tokens) and ours (R1 on activations and weight rows together, R2 from PCA).

    python -m benchmarks.w4a4 --model DIR --text FILE.txt [--calib-text FILE.txt] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.architectures import Space
from calib.capture.storage import Capture
from calib.fusing import fuse, materialize
from calib.perplexity import model_logits, perplexity
from calib.progress import silent
from calib.rotations.from_capture import online_rotations
from calib.rotations.joint import with_weight_rows
from calib.rotations.objectives import ActivationScheme, fake_quantize
from calib.rotations.rotation_set import Rotation, RotationSet, fused_rotation, hadamard_rotations
from calib.rotations.starts import StartName
from calib.rotations.train import TrainConfig, train_rotation
from exporter.pipeline import Run
from exporter.recipe import load_recipe
from exporter.run_options import RunOptions

WEIGHTS = ActivationScheme(4)
"""Per output channel: a row of the weight is to this quantizer what a token is."""
ACTIVATIONS = {"sym": ActivationScheme(4), "asym": ActivationScheme(4, symmetric=False)}
REFERENCE_STEPS = 100


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="checkpoint folder (default: the embedded model)")
    parser.add_argument("--text", default=None, help="evaluation text (default: rows of the other apart)")
    parser.add_argument("--calib-text", default="embedded", help="calibration text (default: the embedded one)")
    parser.add_argument("--rows", type=int, default=64, help="evaluation rows")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        measure(arguments, seed)


def measure(arguments: argparse.Namespace, seed: int) -> None:
    """One table for one seed."""
    recipe = load_recipe(
        None,
        {
            "model": arguments.model,
            "calibration.dataset": arguments.calib_text,
            "calibration.seqlen": arguments.seqlen,
            "evaluation.dataset": arguments.text,
            "evaluation.nsamples": arguments.rows,
            "seed": seed,
        },
    )
    run = Run(recipe, RunOptions(Path()), None, None, silent)
    rows = run.rows.evaluation
    plain = _perplexity(run.source.original("cpu"), rows)
    tokens = sum(row.numel() - 1 for row in rows)
    print(f"seed {seed}: {run.source.name}, {len(rows)} rows, {tokens} tokens, float perplexity {plain:.3f}")
    print(f"{'rotations':<12} {'R4':<4} {'sym':>8} {'asym':>8}   log-perplexity gap: {'sym':>7} {'asym':>7}")
    makers: dict[str, Callable[[Run, Capture, str, int], list[Rotation]]] = {
        "none": lambda run, capture, kind, seed: [],
        "hadamard": lambda run, capture, kind, seed: _hadamard(run, seed),
        "reference": lambda run, capture, kind, seed: _reference(run, capture, seed),
        "ours": _ours,
    }
    capture = run.captured()
    for name, make in makers.items():
        made = {kind: make(run, capture, kind, seed) for kind in ACTIVATIONS}
        for r4 in (False, True):
            online = online_rotations(run.source.config, run.source.architecture, ["r4"] if r4 else [])
            found = {kind: _quantized(run, RotationSet([*made[kind], *online]), kind, rows) for kind in ACTIVATIONS}
            gaps = {kind: math.log(value / plain) for kind, value in found.items()}
            print(
                f"{name:<12} {'yes' if r4 else 'no':<4} {found['sym']:>8.3f} {found['asym']:>8.3f}"
                f"   {'':<20} {gaps['sym']:>7.4f} {gaps['asym']:>7.4f}",
                flush=True,
            )


def _hadamard(run: Run, seed: int) -> list[Rotation]:
    source = run.source
    return list(hadamard_rotations(source.config, source.architecture, ["r1", "r2"], seed=seed).values())


def _reference(run: Run, capture: Capture, seed: int) -> list[Rotation]:
    """As published, on 4 n tokens: 100 full-batch steps."""
    settings = TrainConfig(
        objective="whip", optimizer="qr", epochs=REFERENCE_STEPS, lr=1.5e-3, seed=seed, normalize=False
    )
    samples = capture.r1.samples.values.float()
    some = samples[torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[: 4 * samples.shape[1]]]
    r1 = train_rotation(some, settings)
    r2 = train_rotation(capture.r2_samples().float(), TrainConfig(**{**vars(settings), "lr": 1e-3}))
    return _rotations(r1.matrix, r2.matrix)


def _ours(run: Run, capture: Capture, kind: str, seed: int) -> list[Rotation]:
    scheme = ACTIVATIONS[kind]
    source, state = run.source, run.fuse(RotationSet()).state
    readers = [
        state[spec.weight].mT if spec.layout == "conv1d" else state[spec.weight]
        for spec in source.architecture.all_linears(source.config)
        if spec.reads is Space.RESIDUAL and spec.quantizable and spec.layout != "experts"
    ]
    tokens = capture.r1.samples
    samples, weights = with_weight_rows(tokens.values.float(), readers, weights=tokens.weights)
    settings = TrainConfig(scheme=scheme, seed=seed, epochs=40, fix_ones=source.architecture.norm_kind == "layer")
    r1 = train_rotation(samples, settings, weights=weights)
    train, held = capture.held_out("r2", 0.2)
    start: StartName = "hadamard" if scheme.symmetric else "pca-ones"
    r2 = train_rotation(
        train.values.float(), TrainConfig(scheme=scheme, start=start, seed=seed), held_out=held.values.float()
    )
    return _rotations(r1.matrix, r2.matrix)


def _rotations(r1: Tensor, r2: Tensor) -> list[Rotation]:
    heads = [fused_rotation("r2", matrix, layer=layer) for layer, matrix in enumerate(r2)]
    return [fused_rotation("r1", r1), *heads]


def _quantized(run: Run, rotations: RotationSet, kind: str, rows: list[Tensor]) -> float:
    """Perplexity with every decoder linear at W4A4. The hook comes after that of R4, which is attached first."""
    source = run.source
    fused = fuse(source.checkpoint, source.config, source.architecture, rotations, dtype=torch.float32)
    model: Any = materialize(fused)

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        return (fake_quantize(x.reshape(-1, x.shape[-1]), ACTIVATIONS[kind]).view_as(x), *args[1:])

    for name in source.architecture.linear_names(source.config):
        linear = model.get_submodule(name)
        linear.weight.data = _quantized_weight(linear)
        linear.register_forward_pre_hook(hook)
    return _perplexity(model, rows)


def _quantized_weight(linear: nn.Module) -> Tensor:
    """Rounded per output channel; transformers' Conv1D stores the transpose of a linear."""
    weight: Any = linear.weight
    if isinstance(linear, nn.Linear):
        return fake_quantize(weight.data, WEIGHTS)
    return fake_quantize(weight.data.T.contiguous(), WEIGHTS).T.contiguous()


def _perplexity(model: nn.Module, rows: list[Tensor]) -> float:
    window = max(row.numel() for row in rows)
    return perplexity(model_logits(model), rows, window=window, stride=window).value


if __name__ == "__main__":
    main()
