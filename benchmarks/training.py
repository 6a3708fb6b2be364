"""What a training step costs against the two matmuls that it cannot do without.

    python -m benchmarks.training [--objectives whip lp] [--steps 5] [--threads 1]

For R1 of ``[60000, 576]`` and for R2 of 30 layers with 3 KV heads of 64 channels (SmolLM2-135M),
whose 1024 tokens a layer give each KV head 3 entries. For each objective: CPU time of a monotone
step over that of ``X Q`` and ``X^T G`` (batched, into memory that is there), both measured in turns
in this run, the least of each; system time in CPU time, and page faults a step.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from calib.process.memory import freed_memory_kept
from calib.rotations.hadamard import hadamard_matrix
from calib.rotations.objectives import OBJECTIVE_NAMES, make_objective, over_heads
from calib.rotations.problem import Problem
from calib.rotations.quantizer import ActivationScheme
from calib.rotations.train import make_stepper
from calib.rotations.train_config import TrainConfig

SHAPES = {"R1": (60_000, 576), "R2": (30, 3, 3 * 1024, 64)}
QUERIES = 3
"""Query heads that share a KV head."""
WARM_UP = 3
"""Steps in which the monotone step still looks for its curvature, and memory is asked for."""


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    known = [name for name in OBJECTIVE_NAMES if name != "auto"]
    parser.add_argument("--objectives", nargs="+", choices=known, default=known)
    parser.add_argument("--rotations", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    print(f"{given.threads} threads, torch {torch.__version__}")
    print("      objective   step ms  matmuls ms  ratio  system  faults a step")
    for rotation in given.rotations:
        with freed_memory_kept():
            x = activations(SHAPES[rotation])
            for name in given.objectives:
                print(measured(rotation, name, x, given.steps), flush=True)


def activations(shape: Sequence[int]) -> Tensor:
    """Heavy-tailed tokens of unit mean square."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator)
    x *= torch.randn(*shape[:-2], 1, shape[-1], generator=generator).exp()
    return x / x.square().mean().sqrt()


def measured(rotation: str, name: str, x: Tensor, steps: int) -> str:
    """A line of the table."""
    objective = make_objective(name, scheme=ActivationScheme(4))  # type: ignore[arg-type]
    if rotation == "R2":
        objective = over_heads(objective, x.shape[-3], QUERIES)
    n = x.shape[-1]
    start = hadamard_matrix(n, seed=0, dtype=torch.float32).expand(*x.shape[:-2], n, n).contiguous()
    stepper = make_stepper(start, Problem(objective), TrainConfig())
    weights = torch.ones(x.shape[:-1])
    y, product = torch.empty_like(x), torch.empty_like(start)

    def two_products() -> None:
        torch.matmul(x, start, out=y)
        torch.matmul(x.mT, y, out=product)

    for _ in range(WARM_UP):
        stepper.step(x, weights)
    two_products()
    own, plain = [], []
    for _ in range(steps):
        own.append(used(lambda: stepper.step(x, weights)))
        plain.append(used(two_products)[0])
    total = [sum(column) for column in zip(*own, strict=True)]
    step, matmuls = min(cpu for cpu, _, _ in own), min(plain)
    return (
        f"{rotation:<5} {name:<9} {1e3 * step:9.1f} {1e3 * matmuls:11.1f} {step / matmuls:6.2f}"
        f" {total[1] / total[0]:7.1%} {total[2] / steps:14.0f}"
    )


def used(call: Callable[[], object]) -> tuple[float, float, int]:
    """CPU seconds, those of them in the kernel, and page faults of a call."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    call()
    after = resource.getrusage(resource.RUSAGE_SELF)
    system = after.ru_stime - before.ru_stime
    faults = after.ru_minflt - before.ru_minflt
    return after.ru_utime - before.ru_utime + system, system, faults


if __name__ == "__main__":
    main()
