"""Speed and memory of exported graphs in ONNX Runtime on the CPU, as ratios to the float export, in
one run.

rotq's int8 and int4, ONNX Runtime's own ``quantize_dynamic`` and ``quantize_static`` (QDQ) of
rotq's float graph, and the int4 graph of onnxruntime-genai's model builder are made from one
checkpoint and measured with the same prompt and the same number of threads. Every candidate runs in
a process of its own; those of a group take turns, the float export among them, and figures are
medians. Where its memory happens to lie makes a process faster or slower by up to 3 %, so that each
group is started several times, in another order.

Graphs compute the logits of the last token only. Heads are in float unless the name says otherwise;
the builder quantizes its head as all the rest. Graphs make a longer cache at every step, but for
those that keep past and present in one buffer, which onnxruntime-genai has the builder's do. That
one runs either way.

Two models: the embedded one, for the record, and random weights in the shape of TinyLlama-1.1B,
whose figures are checked below its table. Made without rotations and with weights rounded to
nearest, neither of which changes the speed.

    python -m benchmarks.runtime --work DIR [--model embedded | --model FOLDER | --model
        tinyllama-1b ...] [--layers 22] [--prompt 256] [--steps 32] [--rounds 3] [--starts 3]
        [--threads N] [--block-size 32] [--only "int8, prefix"] [--keep]

Linux only: memory is read from /proc. The full shape takes about 18 GB in ``--work``.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

from backends.base import Fusion
from benchmarks.runtime_candidates import (
    BUILDER,
    BUILDER_GROWN,
    DYNAMIC,
    FLOAT,
    GROUPS,
    HAS_BUILDER,
    INT4,
    INT4_HEAD_INT4,
    INT4_HEAD_INT8,
    INT4_SHARED,
    INT8,
    INT8_PREFIX,
    INT8_WEIGHTS,
    MODEL,
    STATIC,
    Candidate,
    Settings,
    make_all,
    make_checkpoint,
)
from benchmarks.runtime_session import Load, Memory, Session
from calib.architectures import wiring_for
from calib.network.checkpoint import load_config
from exporter.source import embedded_folder

SHAPE = "tinyllama-1b"
EMBEDDED = "embedded"
PAUSE = 0.05
"""Seconds between two measurements, in which the threads of the last one stop spinning."""
PREFILL_BOUND, DECODE_BOUND, EQUAL, PREFIX_BOUND = 2.5, 3.0, 1.0, 0.97


Kind = Literal["prefill", "decode"]


@dataclass
class Measured:
    """One candidate in one group.

    Attributes:
        prefill, decode: seconds, a value a round.
        memory: of its process, after it ran.
    """

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    memory: Memory = field(default_factory=lambda: Memory(0, 0))

    def seconds(self, kind: Kind) -> list[float]:
        """Of every round."""
        return self.prefill if kind == "prefill" else self.decode


@dataclass(frozen=True)
class Ratio:
    """How many times faster than another one of its group a candidate is.

    Attributes:
        value: median of the rounds' ratios.
        spread: half of the distance between their quartiles.
    """

    value: float
    spread: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.spread:.2f}"


Groups = Sequence[Mapping[Candidate, Measured]]


def main() -> None:
    """Print a table for each model, and below that of the 1B shape which figures hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for checkpoints and graphs"
    )
    parser.add_argument(
        "--model", action="append", help=f"{EMBEDDED}, {SHAPE} or a folder (default: these two)"
    )
    parser.add_argument("--layers", type=int, default=22, help=f"of {SHAPE}")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded after it")
    parser.add_argument("--rounds", type=int, default=3, help="of a group, each time it is started")
    parser.add_argument("--starts", type=int, default=3, help="fresh processes for each group")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--block-size",
        type=int,
        default=32,
        help="of int4 weights; 32 is the model builder's default",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="only what takes turns with this candidate, by its name")
    parser.add_argument(
        "--keep", action="store_true", help="leave the graphs and the checkpoint in the work folder"
    )
    arguments = parser.parse_args()
    for model in arguments.model or [EMBEDDED, SHAPE]:
        folder = arguments.work / f"graphs-{os.getpid()}"
        checkpoint = checkpoint_of(model, arguments)
        settings = Settings(arguments.block_size, rows=2, tokens=64, seed=arguments.seed)
        began = time.perf_counter()
        groups = [group for group in GROUPS if named(arguments.only, group)]
        candidates = list(dict.fromkeys(candidate for group in groups for candidate in group))
        fusions = make_all(candidates, checkpoint, folder, settings)
        print(f"\n{model}: graphs made in {time.perf_counter() - began:.0f} s", flush=True)
        load = load_of(checkpoint, arguments)
        found = measure(groups, folder, load, arguments.rounds, arguments.starts)
        report(found, candidates, folder, arguments)
        judged = model == SHAPE or arguments.only is not None
        lines = [*share_of_kernels(fusions), *(acceptance(found) if judged else ())]
        print("\n".join(lines), flush=True)
        if not arguments.keep:
            shutil.rmtree(folder)
            if model == SHAPE:
                shutil.rmtree(checkpoint)


def checkpoint_of(model: str, arguments: argparse.Namespace) -> Path:
    """The folder of a model, made first where it is the shape."""
    if model == EMBEDDED:
        return embedded_folder()
    if model != SHAPE:
        return Path(model)
    folder: Path = arguments.work / f"{SHAPE}-{arguments.layers}-{arguments.seed}"
    if not (folder / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        make_checkpoint(folder, arguments.layers, embedded_folder(), arguments.seed)
    return folder


def load_of(checkpoint: Path, arguments: argparse.Namespace) -> Load:
    """What all sessions of one model run: random tokens, after which every step has one more."""
    config = load_config(checkpoint)
    sizes = wiring_for(config).sizes
    ids = random.Random(arguments.seed).choices(range(config.vocab_size), k=arguments.prompt)
    return Load(ids, arguments.steps, arguments.threads, sizes.kv_heads, sizes.head_dim)


def named(only: str | None, group: Sequence[Candidate]) -> bool:
    """Whether a group holds the candidate called ``only``; all do where there is no such wish."""
    return only is None or any(candidate.name == only for candidate in group)


def measure(
    groups: Sequence[Sequence[Candidate]], folder: Path, load: Load, rounds: int, starts: int
) -> Groups:
    """All candidates, group by group."""
    found: Groups = [{candidate: Measured() for candidate in group} for group in groups]
    for start in range(starts):
        for group in found:
            first = start % len(group)
            order = [*group][first:] + [*group][:first]
            measure_group(
                {candidate: group[candidate] for candidate in order}, folder, load, rounds
            )
    return found


def measure_group(
    found: Mapping[Candidate, Measured], folder: Path, load: Load, rounds: int
) -> None:
    """Candidates that take turns, in fresh processes; the first round warms up. Adds to what is
    ``found``.
    """
    with ExitStack() as stack:
        sessions = {
            candidate: stack.enter_context(
                Session(
                    folder / candidate.folder / MODEL,
                    load,
                    shared_cache=candidate.kv_buffer == "shared",
                )
            )
            for candidate in found
        }
        for turn in range(rounds + 1):
            for candidate, session in sessions.items():
                time.sleep(PAUSE)
                prefill, decode = session.prefill(), session.decode()
                if turn:
                    found[candidate].prefill.append(prefill)
                    found[candidate].decode.append(decode)
        for candidate, session in sessions.items():
            found[candidate].memory = session.memory()


def ratio(groups: Groups, kind: Kind, candidate: Candidate, other: Candidate = FLOAT) -> Ratio:
    """How many times faster than ``other`` a candidate is, of the first group that has both."""
    group = next(group for group in groups if candidate in group and other in group)
    pairs = zip(group[candidate].seconds(kind), group[other].seconds(kind), strict=True)
    ratios = [theirs / ours for ours, theirs in pairs]
    low, _, high = quantiles(ratios, method="inclusive") if len(ratios) > 1 else 3 * ratios
    return Ratio(median(ratios), (high - low) / 2)


def report(
    groups: Groups,
    candidates: Sequence[Candidate],
    folder: Path,
    arguments: argparse.Namespace,
) -> None:
    """Print the table."""
    print(
        f"{arguments.threads} threads, prompt of {arguments.prompt} tokens, {arguments.steps}"
        f" steps, int4 in blocks of {arguments.block_size}; tokens/s and ratio to float, medians of"
        f" {arguments.starts} x {arguments.rounds}; memory in GB"
    )
    heads = (
        f"{'prefill':>9} {'x':>6} {'decode':>9} {'x':>6} {'resident':>9} {'x':>6} {'anonymous':>10}"
        f" {'disk':>6}"
    )
    print(f"{'':<42} {heads}")
    base = groups[0][FLOAT].memory
    for candidate in candidates:
        one = next(group[candidate] for group in groups if candidate in group)
        disk = sum(path.stat().st_size for path in (folder / candidate.folder).glob(f"{MODEL}*"))
        print(
            f"{candidate.name:<42} {arguments.prompt / median(one.prefill):>9.1f}"
            f" {ratio(groups, 'prefill', candidate).value:>6.2f}"
            f" {arguments.steps / median(one.decode):>9.2f}"
            f" {ratio(groups, 'decode', candidate).value:>6.2f} {one.memory.resident / 1e9:>9.2f}"
            f" {one.memory.resident / base.resident:>6.2f} {one.memory.anonymous / 1e9:>10.2f}"
            f" {disk / 1e9:>6.2f}"
        )


def share_of_kernels(fusions: Mapping[Candidate, Fusion]) -> Iterator[str]:
    """How many of the decoder's MatMuls run in integer kernels."""
    for candidate in (INT8, INT8_WEIGHTS, INT4):
        if candidate not in fusions:
            continue
        fusion = fusions[candidate]
        fused = fusion.quantized - len(fusion.unfused)
        share = f"{fused} of {fusion.quantized} ({100 * fused / fusion.quantized:.0f} %)"
        yield _line(
            f"decoder MatMuls of {candidate.name} in integer kernels: {share}", not fusion.unfused
        )


def acceptance(groups: Groups) -> Iterator[str]:
    """Which figures hold. Slower than ONNX Runtime's quantizers is what is slower by more than
    rounds differ.
    """
    kinds: tuple[Kind, ...] = ("prefill", "decode")
    reach: list[tuple[Kind, Candidate, Candidate, float]] = [
        ("prefill", INT8, FLOAT, PREFILL_BOUND)
    ]
    reach += [
        ("decode", candidate, FLOAT, DECODE_BOUND)
        for candidate in (INT4, INT4_HEAD_INT8, INT4_HEAD_INT4)
    ]
    together = [frozenset(group) for group in groups]
    if HAS_BUILDER:
        reach.append(("decode", INT4_SHARED, BUILDER, EQUAL))
        reach.append(("decode", INT4_HEAD_INT4, BUILDER_GROWN, EQUAL))
    else:
        yield f"not measured: {BUILDER.name}, as onnxruntime-genai is not installed"
    reach += [(kind, INT8_PREFIX, INT8, PREFIX_BOUND) for kind in kinds]
    for kind, candidate, other, bound in reach:
        if not any({candidate, other} <= group for group in together):
            continue
        found = ratio(groups, kind, candidate, other)
        yield _line(
            f"{candidate.name}: {kind} {found} x {other.name}, to reach {bound:.3g}",
            found.value >= bound,
        )
    for kind in kinds:
        for other in (DYNAMIC, STATIC):
            if not any({INT8, other} <= group for group in together):
                continue
            found = ratio(groups, kind, INT8, other)
            line = f"{INT8.name}: {kind} {found} x {other.name}, not slower"
            yield _line(line, found.value + found.spread >= EQUAL)


def _line(text: str, holds: bool) -> str:
    return f"{'holds' if holds else 'FAILS'}  {text}"


if __name__ == "__main__":
    main()
