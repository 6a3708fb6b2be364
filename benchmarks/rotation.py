"""Rotation training against the reference algorithm as published, in one run and on the same data.

Reference: Whip, autograd through a QR, SGD of momentum 0.9, lr 1.5e-3, 100 steps over 4 n tokens,
from a random Hadamard matrix. Ours: the monotone step from the same start on the same tokens.
Reported as ratios, since both share the machine:

* time to the reference's final Whip loss on a shared evaluation set (0.1: in a tenth of the
  reference's time),
* held-out error of each quantizer, ours over the reference's and over the Hadamard start's,
* peak memory of the training step beyond the samples, and bytes kept on disk.

With fewer ``--reference-steps`` the reference's final loss is unknown, and nothing claims it. The
time ratio then is that to the loss after the steps that were run, over the time of those; early on
both are at their fastest. Beside it stand our ``--full-steps`` over the reference's 100 steps at
its measured time a step, with our loss after them: the part of the row called "extrapolated".

    python benchmarks/rotation.py                                  # synthetic activations, labelled
    so python benchmarks/rotation.py --model DIR --text FILE.txt      # inputs of q_proj and up_proj
    of a checkpoint python benchmarks/rotation.py --orders 4096 --reference-steps 10   # the
    reference extrapolated from 10 steps
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from calib.rotations.hadamard import hadamard_matrix
from calib.rotations.objectives import make_objective
from calib.rotations.optimizers import QrStepper, Stepper
from calib.rotations.polar import project_orthogonal
from calib.rotations.problem import Problem
from calib.rotations.quantizer import ActivationScheme, scheme_error
from calib.rotations.train import make_stepper
from calib.rotations.train_config import TrainConfig

SCHEMES = {
    "int8 static": ActivationScheme(8, granularity="tensor"),
    "int4 token sym": ActivationScheme(4),
    "int4 token asym": ActivationScheme(4, symmetric=False),
    "int4 group128": ActivationScheme(4, granularity="group", group_size=128),
}
PUBLISHED_STEPS = 100
PUBLISHED_TOKENS = 128 * 2048  # per layer and site, all of them written to disk by the reference
EVALUATION_TOKENS = 4096
MOST_STEPS = 20  # of ours, where the target is not reached


@dataclass(frozen=True)
class Activations:
    """Training and evaluation tokens ``[tokens, n]`` of unit mean square, and where they come
    from.
    """

    source: str
    train: Tensor
    evaluation: Tensor
    sites: int


def synthetic(n: int) -> Activations:
    """Sparse features in superposition with a power-law spectrum, and four massive channels.

    Sparsity and exponent are such that at n = 256 the spectrum (37, 1.8, 0.2 for the 1st, 26th and
    128th eigenvalue) and the reference's gain in Whip (5 %) resemble those of a trained 256-channel
    Llama (36, 2.4, 0.27; 4 %).
    """
    generator = torch.Generator().manual_seed(n)
    count = 4 * n + EVALUATION_TOKENS
    directions = torch.randn(n, n, generator=generator) / n**0.5
    strength = torch.arange(1, n + 1).float().pow(-0.8)
    active = torch.rand(count, n, generator=generator) < 0.03
    features = torch.randn(count, n, generator=generator) * active * strength
    x = features @ directions
    x[:, torch.randperm(n, generator=generator)[:4]] *= 8.0
    x /= x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)  # what a norm without gain gives
    return Activations("synthetic", x[: 4 * n].contiguous(), x[4 * n :].contiguous(), sites=2)


def captured(model_dir: Path, text: Path) -> Activations:
    """Inputs of q_proj and up_proj of every layer, gains divided out, drawn at random over layers
    and positions.
    """
    # heavy, and not needed for synthetic runs
    from transformers import AutoTokenizer

    from calib.network.checkpoint import load_config
    from calib.network.original import load_network

    model: Any = load_network(model_dir, load_config(model_dir))
    n = int(model.config.hidden_size)
    layers = model.model.layers
    window = 256
    sequences = -(-(4 * n + EVALUATION_TOKENS) // window)
    ids = AutoTokenizer.from_pretrained(model_dir)(text.read_text()[: sequences * window * 8])[
        "input_ids"
    ]
    ids = torch.tensor(ids[: sequences * window]).view(-1, window)
    kept: list[Tensor] = []

    def keep(gain: Tensor) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: kept.append((args[0] / gain).reshape(-1, n))

    for layer in layers:
        layer.self_attn.q_proj.register_forward_pre_hook(
            keep(layer.input_layernorm.weight.detach())
        )
        layer.mlp.up_proj.register_forward_pre_hook(
            keep(layer.post_attention_layernorm.weight.detach())
        )
    with torch.no_grad():
        for first in range(0, sequences, 8):
            model(ids[first : first + 8])
    x = torch.cat(kept)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return Activations(
        model_dir.name,
        x[: 4 * n].clone(),
        x[4 * n : 4 * n + EVALUATION_TOKENS].clone(),
        sites=2 * len(layers),
    )


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Peak bytes of the tensors, but ``given``, that operators returned and somebody still held,
    autograd included.

    Deterministic, unlike the resident size, which allocators keep after the first run. Workspaces
    inside LAPACK do not count; they are the same for both sides.
    """

    def __init__(self, given: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._given = given.untyped_storage()._cdata
        self.peak = 0
        self._live: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then count what is alive."""
        reference: Any = StorageWeakRef
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata != self._given:
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = (reference(storage), storage.nbytes())
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def whip(x: Tensor, q: Tensor) -> float:
    """Whip loss per channel of ``x q``."""
    return float(make_objective("whip")(x @ q)) / x.shape[-1]


def reference_stepper(start: Tensor) -> QrStepper:
    """The published algorithm at its start."""
    return QrStepper(
        start, Problem(make_objective("whip")), lr=1.5e-3, momentum=0.9, update="sgd", accumulate=1
    )


def monotone_stepper(start: Tensor) -> Stepper:
    """Ours, with the default options."""
    return make_stepper(start, Problem(make_objective("whip")), TrainConfig())


def peak_of_two_steps(stepper: Stepper, data: Activations) -> int:
    """Live bytes beyond the samples: the second step runs with all the optimiser's state in
    place.
    """
    with LiveBytes(data.train) as memory:
        for _ in range(2):
            stepper.step(data.train, None)
    peak: int = memory.peak
    return peak


def run_reference(data: Activations, start: Tensor, steps: int) -> tuple[Tensor, float]:
    """Rotation after ``steps``, and seconds a step."""
    stepper = reference_stepper(start)
    # warm-up counts as a step but is not timed: the first one pays for allocations
    stepper.step(data.train, None)
    began = time.perf_counter()
    for _ in range(steps - 1):
        stepper.step(data.train, None)
    seconds = (time.perf_counter() - began) / (steps - 1)
    return stepper.rotation(), seconds


@dataclass(frozen=True)
class Ours:
    """A run of the monotone step; seconds are of the steps and one float64 projection, from
    cold.
    """

    stop_steps: int
    """Steps until the evaluation loss reached the target, or all of them."""
    stop_seconds: float
    stop_loss: float
    rotation: Tensor
    """After the last step."""
    seconds: float


def run_ours(data: Activations, start: Tensor, target: float, full_steps: int) -> Ours:
    """``full_steps`` steps, or more until the projected rotation reaches ``target`` on the
    evaluation set.

    The clock does not cover the evaluations that decide when to stop.
    """
    stepper = monotone_stepper(start)
    seconds, steps, stop = 0.0, 0, None
    while steps < full_steps or (stop is None and steps < MOST_STEPS):
        began = time.perf_counter()
        stepper.step(data.train, None)
        stepped = time.perf_counter()
        q = project_orthogonal(stepper.rotation()).float()
        projection = time.perf_counter() - stepped
        seconds += stepped - began
        steps += 1
        if stop is None and (loss := whip(data.evaluation, q)) <= target:
            stop = steps, seconds + projection, loss
        if steps == full_steps:
            full, full_seconds = q, seconds + projection
    return Ours(*(stop or (steps, math.inf, whip(data.evaluation, q))), full, full_seconds)


def held_out_errors(data: Activations, rotations: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Relative error of each quantizer on the evaluation set, and the ratio of ours to the
    reference's.
    """
    errors = {}
    for name, scheme in SCHEMES.items():
        at = {key: float(scheme_error(data.evaluation @ q, scheme)) for key, q in rotations.items()}
        errors[name] = {**at, "ours / reference": at["ours"] / at["reference"]}
    return errors


def compare(data: Activations, reference_steps: int, full_steps: int) -> dict[str, object]:
    """One row of the report."""
    n = data.train.shape[-1]
    start = hadamard_matrix(n, seed=0, dtype=torch.float32)
    memory = (
        peak_of_two_steps(monotone_stepper(start), data),
        peak_of_two_steps(reference_stepper(start), data),
    )
    reference, step_seconds = run_reference(data, start, reference_steps)
    target = whip(data.evaluation, reference)
    ours = run_ours(data, start, target, full_steps)
    # The reference stores every token of every site; here a reservoir of 4 n tokens and a
    # covariance stay.
    disk = 4 * n * (4 * n + n), 4 * n * data.sites * PUBLISHED_TOKENS
    row: dict[str, object] = {
        "activations": data.source,
        "n": n,
        "tokens": len(data.train),
        "threads": torch.get_num_threads(),
        "reference steps run": reference_steps,
        "time ratio": ours.stop_seconds / (step_seconds * reference_steps),
        "seconds to the same loss (ours, reference)": [
            ours.stop_seconds,
            step_seconds * reference_steps,
        ],
        "ours steps to that loss": ours.stop_steps,
        "whip on the evaluation set": {
            "hadamard": whip(data.evaluation, start),
            "reference": target,
            "ours at the stop": ours.stop_loss,
            f"ours after {full_steps} steps": whip(data.evaluation, ours.rotation),
        },
        f"held-out error after {full_steps} steps": held_out_errors(
            data, {"hadamard": start, "reference": reference, "ours": ours.rotation}
        ),
        "memory ratio": memory[0] / memory[1],
        "memory MiB (ours, reference)": [size / 2**20 for size in memory],
        "disk ratio": disk[0] / disk[1],
        "disk MiB (ours, reference)": [size / 2**20 for size in disk],
    }
    if reference_steps < PUBLISHED_STEPS:
        row["extrapolated"] = {
            "note": (
                f"the reference's loss and errors are those after {reference_steps} of"
                f" {PUBLISHED_STEPS} steps"
            ),
            f"reference seconds for {PUBLISHED_STEPS} steps": step_seconds * PUBLISHED_STEPS,
            f"ours seconds for {full_steps} steps": ours.seconds,
            "time ratio": ours.seconds / (step_seconds * PUBLISHED_STEPS),
        }
    return row


def main() -> None:
    """Parse the arguments and print one JSON object per order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="Llama-like checkpoint folder; default: synthetic activations"
    )
    parser.add_argument("--text", type=Path, help="text to run through the model")
    parser.add_argument(
        "--orders", type=int, nargs="+", default=[256, 1024, 2048], help="orders of synthetic runs"
    )
    parser.add_argument(
        "--reference-steps",
        type=int,
        default=PUBLISHED_STEPS,
        help="fewer extrapolate the reference's time",
    )
    parser.add_argument(
        "--full-steps", type=int, default=10, help="monotone steps before the errors are compared"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if (args.model is None) != (args.text is None):
        parser.error("--model and --text go together")
    if args.reference_steps < 2:
        parser.error("--reference-steps must be 2 or more: the first step warms up")
    torch.set_num_threads(args.threads)
    for order in [None] if args.model else args.orders:
        data = captured(args.model, args.text) if order is None else synthetic(order)
        print(
            json.dumps(compare(data, args.reference_steps, args.full_steps), indent=2), flush=True
        )


if __name__ == "__main__":
    main()
