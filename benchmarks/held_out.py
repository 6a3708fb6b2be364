"""Error of the exported quantizer on a test split by rotation: every candidate, the reference, and
what ``auto`` picks.

Train, gate and test: candidates are trained and chosen by the function that the pipeline calls, on
tokens sampled from the training documents, of which the gate's were kept apart; the test documents
share none with either. Static limits are those of each layer's own training tokens. Activations
only: weights stay in float here.

* identity, hadamard, pca-hadamard, trained: the candidates of the gate,
* reference: DartQuant's (Whip, QR latent, SGD of momentum 0.9; 100 full-batch steps over 4 n
  tokens),
* auto: the candidate that the gate picked, named, and its error over the best of all five.

    python -m benchmarks.held_out --model DIR [--model DIR ...] --text FILE.txt [--seed 0] [--kinds
    r1 r2]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calib.capture.collector import by_kv_head
from calib.capture.result import Samples
from calib.capture.storage import Capture
from calib.fusing import materialize
from calib.rotations.from_capture import choose
from calib.rotations.rotation_set import RotationSet
from calib.rotations.selection import Judge, candidates, relative_error
from calib.rotations.train import train_rotation
from calib.rotations.train_config import TrainConfig
from calib.schemes import INT4, INT8, PerBlock, PerTensor, PerToken, TensorScheme
from exporter.recipe import load_recipe
from exporter.run.capturing import captured
from exporter.run.destination import Destination
from exporter.run.inputs import Inputs, open_inputs
from exporter.run.options import RunOptions
from exporter.run.stopwatch import Stopwatch
from exporter.run.workdir import WorkDir

REFERENCE_STEPS = 100
HELD_OUT = 0.2
GROUP = 128
TARGET = 1.02
Kind = Literal["r1", "r2"]


@dataclass(frozen=True)
class Case:
    """Test errors of one rotation of one model under one scheme."""

    model: str
    kind: Kind
    scheme: str
    errors: dict[str, float]
    picked: str

    @property
    def auto(self) -> float:
        """The test error of what the gate picked."""
        return self.errors[self.picked]

    @property
    def ratio(self) -> float:
        """``auto`` over the best of all, the reference included."""
        return self.auto / min(self.errors.values())


def main() -> None:
    """Print the table and the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", action="append", help="checkpoint folder (default: the embedded model)"
    )
    parser.add_argument(
        "--text", default="embedded", help="text of all three splits (default: the embedded one)"
    )
    parser.add_argument("--kinds", nargs="+", choices=["r1", "r2"], default=["r1", "r2"])
    parser.add_argument("--test-rows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names = ["identity", "hadamard", "pca-hadamard", "trained", "reference"]
    print(
        f"{'model':<14} {'':<3} {'scheme':<16}",
        *(f"{name:>12}" for name in names),
        "  auto            / best",
    )
    cases = []
    for model in arguments.model or ["embedded"]:
        for case in measure(model, arguments):
            cases.append(case)
            figures = (f"{case.errors[name]:>12.4g}" for name in names)
            print(f"{case.model:<14} {case.kind.upper():<3} {case.scheme:<16}", *figures, end="  ")
            print(
                f"{case.picked:<14} {case.ratio:>7.3f}{'' if case.ratio <= TARGET else '  MISSED'}",
                flush=True,
            )
    for name in ("hadamard", "reference"):
        better = sum(case.auto < case.errors[name] for case in cases)
        print(f"auto strictly better than {name}: {better} of {len(cases)}")
    print(
        f"auto within {TARGET} of the best: {sum(case.ratio <= TARGET for case in cases)} of"
        f" {len(cases)}"
    )
    untrained = [
        f"{case.model} {case.kind.upper()} {case.scheme}"
        for case in cases
        if case.picked != "trained"
    ]
    print("training gained nothing for:", "; ".join(untrained) or "none")


def measure(model: str, arguments: argparse.Namespace) -> list[Case]:
    """All cases of one model."""
    recipe = load_recipe(
        None,
        {
            "model": model,
            "calibration.dataset": arguments.text,
            "evaluation.nsamples": arguments.test_rows,
            "seed": arguments.seed,
        },
    )
    inputs, options, clock = (
        open_inputs(recipe, Destination.of(recipe)),
        RunOptions(Path()),
        Stopwatch(),
    )
    wiring = inputs.source.wiring
    rows, layer_norm = inputs.rows(clock), wiring.layer_norm
    capture = captured(inputs, rows.train, options, WorkDir.of(options, inputs), clock)
    train, test = (
        _site_tokens(inputs, some) for some in (rows.train[: arguments.test_rows], rows.evaluation)
    )
    cases = []
    for kind in arguments.kinds:
        if wiring.refusal(kind) is not None:
            continue
        settings = TrainConfig(seed=arguments.seed, fix_ones=layer_norm and kind == "r1")
        reference = _reference(capture, kind, settings)
        for name, scheme in _schemes(capture.r1.samples.values.shape[-1]).items():
            chosen = choose(capture, kind, settings, HELD_OUT, Judge(name, scheme))
            kept, _ = capture.held_out(kind, HELD_OUT)
            gated = candidates(
                chosen.trained.matrix, kept, seed=arguments.seed, fix_ones=settings.fix_ones
            )
            made: dict[str, Tensor | None] = {str(key): matrix for key, matrix in gated.items()}
            made["reference"] = reference
            errors = {
                key: _error(matrix, train[kind], test[kind], scheme) for key, matrix in made.items()
            }
            cases.append(Case(Path(model).name, kind, name, errors, chosen.name))
    return cases


def _schemes(n: int) -> dict[str, TensorScheme]:
    """Groups of 128 channels; half the channels where that would be all of them."""
    group = min(GROUP, n // 2)
    return {
        "int8 static": TensorScheme(INT8, PerTensor()),
        "int4 token sym": TensorScheme(INT4, PerToken(), dynamic=True),
        "int4 token asym": TensorScheme(INT4, PerToken(), symmetric=False, dynamic=True),
        f"int4 group {group}": TensorScheme(INT4, PerBlock(group), dynamic=True),
    }


def _reference(capture: Capture, kind: Kind, settings: TrainConfig) -> Tensor:
    """As published, on 4 n tokens; fixing ones where the model needs it."""
    published = replace(
        settings,
        objective="whip",
        optimizer="qr",
        epochs=REFERENCE_STEPS,
        start="hadamard",
        normalize=False,
    )
    if kind == "r2":
        return train_rotation(capture.r2_samples().float(), replace(published, lr=1e-3)).matrix
    values = capture.r1.samples.values.float()
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(settings.seed))
    return train_rotation(
        values[order[: 4 * values.shape[1]]], replace(published, lr=1.5e-3)
    ).matrix


def _site_tokens(inputs: Inputs, rows: list[Tensor]) -> dict[Kind, list[Samples]]:
    """Every token of ``rows`` at every site: ``[tokens, n]`` for R1, ``[1, kv_heads, tokens *
    group, n]`` for R2.
    """
    source = inputs.source
    sizes = source.wiring.sizes
    model: Any = materialize(inputs.fuse(RotationSet(), Stopwatch()))
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            seen.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))

        return hook

    sites = source.wiring.capture_sites
    with ExitStack() as hooks, torch.no_grad():
        for site in sites:
            module = model.get_submodule(site.module)
            hooks.callback(
                module.register_forward_pre_hook(keep(site.module), with_kwargs=True).remove
            )
        for row in rows:
            model.base_model(input_ids=row.unsqueeze(0))
    found: dict[Kind, list[Samples]] = {"r1": [], "r2": []}
    for site in sites:
        x = torch.cat(seen[site.module])
        if site.rotation == "r1":
            found["r1"].append(Samples(x, torch.ones(len(x)), massive=0))
        elif site.rotation == "r2":
            heads = by_kv_head(x, sizes.kv_heads, sizes.head_dim).unsqueeze(0)
            found["r2"].append(
                Samples(heads, torch.ones(1, heads.shape[2]), massive=0, group=sizes.group)
            )
    return found


def _error(
    matrix: Tensor | None, train: list[Samples], test: list[Samples], scheme: TensorScheme
) -> float:
    """Mean over sites of the relative squared error on test tokens."""
    errors = []
    for index, (seen, unseen) in enumerate(zip(train, test, strict=True)):
        own = matrix[index : index + 1] if matrix is not None and matrix.dim() == 4 else matrix
        errors.append(float(relative_error(own, unseen, scheme, train=seen)))
    return sum(errors) / len(errors)


if __name__ == "__main__":
    main()
