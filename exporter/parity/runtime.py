"""Rung 2: the torch fake-quant reference against the export, run in its runtime."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from backends.asking import slow_linears
from backends.base import RuntimeMissing, RuntimeModel
from calib.architectures import wiring_of
from calib.measure.floor import Difference, distances, settled
from calib.measure.perplexity import model_logits, remembered_logits
from calib.measure.reference import ReferenceLinear, build_reference, unrounded_inputs
from calib.process.memory import give_back
from exporter.parity.bounds import LINEAR_BOUND, NAIVE_FACTOR, UNROUNDED_BOUND, Floors
from exporter.parity.passes import (
    DECODE_STEPS,
    PADDED_ROWS,
    Pass,
    decode,
    padded,
    prefill_logits,
    steady_length,
)
from exporter.parity.rows import not_run, ran, row
from exporter.parity.subject import Missing, Sessions, Subject
from exporter.reporting.report import ParityRow

_PROBE_ROWS, _PROBE_TOKENS = 3, 64
_LINEARS = "each linear on identical inputs"
_EXACT, _DEFAULT = "prefill, exact session", "prefill, default session"
_UNROUNDED = "prefill, activations not rounded"
_PASSES: Mapping[str, Pass] = {
    f"decode with cache, step by step, {DECODE_STEPS} tokens": decode,
    f"batch of {PADDED_ROWS}, left-padded": padded,
}
"""What is run beside prefill, with arithmetic as written."""


def runtime_rows(subject: Subject, sessions: Sessions) -> list[ParityRow]:
    """The figures of rung 2."""
    reference = build_reference(subject.quantized)
    rows = _linears_rows(subject, sessions, reference)
    give_back(subject.nbytes)  # each of these has a session of its own
    unrounded = _unrounded_rows(subject, sessions, reference)
    give_back(subject.nbytes)
    if isinstance(sessions.exact, Missing) and isinstance(sessions.default, Missing):
        rows += [_missing(name, sessions.exact) for name in (_EXACT, _DEFAULT, *_PASSES)]
    else:
        rows += _end_to_end_rows(subject, sessions, reference)
    return [*rows, *unrounded, *_fusion_rows(subject)]


def _end_to_end_rows(subject: Subject, sessions: Sessions, reference: nn.Module) -> list[ParityRow]:
    """The whole export against the reference, whose decoder runs once over each row. What it is
    compared with is a model of its own each: one after the other, never two at a time.
    """
    logits = remembered_logits(reference)
    walk = partial(distances, logits, rows=subject.proof_rows, last=subject.last)
    floors = Floors(subject, reference)
    found = walk(floors.naive())
    give_back(subject.nbytes)

    session = sessions.exact
    running = {} if isinstance(session, Missing) else {_EXACT: prefill_logits(session)}
    found |= walk(floors.split() | running)
    exact, rows = floors.exact_bound(found)
    if isinstance(session, Missing):
        passes = [_missing(name, session) for name in (_EXACT, *_PASSES)]
    else:
        passes = [_judged(_EXACT, session, found[_EXACT].value, exact)]
        steady = steady_length(wiring_of(subject.quantized.config).config)
        cut = [ids[:steady] for ids in subject.proof_rows]
        passes += [
            _judged(name, session, run(session, logits, cut), exact)
            for name, run in _PASSES.items()
        ]
    del session, running
    sessions.forget_exact()
    give_back(subject.nbytes)

    default = sessions.default
    if isinstance(default, Missing):
        own = [_missing(_DEFAULT, default)]
    else:
        found |= walk(floors.own(default) | {_DEFAULT: prefill_logits(default)})
        bound, own = floors.default_bound(default, found, exact)
        own.append(_judged(_DEFAULT, default, found[_DEFAULT].value, bound))
    return [*rows, *own[:-1], passes[0], own[-1], *passes[1:]]


def _unrounded_rows(subject: Subject, sessions: Sessions, reference: nn.Module) -> list[ParityRow]:
    """The whole export where nothing is rounded on the way, so that nothing amplifies: faults of
    attention, norms or the head far below one flip show.
    """
    session = None if subject.short else sessions.unrounded()
    if session is None or isinstance(session, Missing):
        return []
    runtime = {_UNROUNDED: prefill_logits(session)}
    with unrounded_inputs(reference):
        found = distances(
            model_logits(reference), runtime, subject.proof_rows[:_PROBE_ROWS], last=subject.last
        )
    return [_judged(_UNROUNDED, session, found[_UNROUNDED].value, UNROUNDED_BOUND)]


def _missing(name: str, session: Missing) -> ParityRow:
    return not_run(2, _named(name), "relative L2", session.reason)


def _judged(name: str, runtime: RuntimeModel, measured: float, bound: float) -> ParityRow:
    """What the runtime approximates of its own accord is reported with the reason, and not
    judged.
    """
    judged = None if runtime.note else bound
    return row(2, _named(name), "relative L2", measured, judged, runtime.note, **ran(runtime))


def _named(name: str) -> str:
    return f"end to end: {name}"


def _linears_rows(subject: Subject, sessions: Sessions, reference: nn.Module) -> list[ParityRow]:
    """The worst linear of the runtime against torch, both fed what entered that linear in the
    runtime.
    """
    modules = {name: reference.get_submodule(name) for name in subject.quantized.linears}
    linears = {
        name: module for name, module in modules.items() if isinstance(module, ReferenceLinear)
    }
    if not linears:
        # a float model, or one whose embeddings alone are quantized: nothing is computed in
        # integers
        return []
    probed = sessions.probed()
    if isinstance(probed, Missing):
        return [not_run(2, _LINEARS, "relative L2", probed.reason)]

    lost = {name: Difference() for name in linears}
    naive = {name: Difference() for name in linears} if subject.short else {}
    flips = 0
    for ids in subject.proof_rows[:_PROBE_ROWS]:
        pairs = probed.probe(ids[:_PROBE_TOKENS].unsqueeze(0), list(linears))
        for name, (entering, leaving) in pairs.items():
            x = entering.float()
            expected, flipped = settled(linears[name], x, leaving)
            lost[name].add(leaving, expected)
            flips += flipped
            if naive:
                naive[name].add(_naive(linears[name], x, subject.quantized.dtype), expected)

    # The worst is the one that comes closest to its bound, or is farthest beyond it.
    bounds = {name: NAIVE_FACTOR * naive[name].value if naive else LINEAR_BOUND for name in linears}
    worst = max(linears, key=lambda name: lost[name].value - bounds[name])
    notes = [f"worst: {worst}"]
    if naive:
        notes.append(f"the same in torch in {subject.dtype_name}: {naive[worst].value:.3g}")
    if flips:
        notes.append(
            f"{flips} inputs lie on a rounding boundary and were rounded to the other side of it"
        )
    figures = lost[worst].value, bounds[worst]
    return [row(2, _LINEARS, "relative L2", *figures, "; ".join(notes), **ran(probed))]


def _naive(linear: ReferenceLinear, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The linear with every value in ``dtype``."""
    weight, bias = cast(Tensor, linear.weight), cast("Tensor | None", linear.bias)
    return functional.linear(
        linear.quantize(x.to(dtype)), weight.to(dtype), None if bias is None else bias.to(dtype)
    )


def _fusion_rows(subject: Subject) -> list[ParityRow]:
    """Linears whose weights are turned into floats on every run; those that the backend warned of
    may be.
    """
    name, metric = "linears left to dequantize at run time", "unfused"
    try:
        fusion = subject.backend.fusion(subject.folder, subject.target)
    except RuntimeMissing as error:
        return [not_run(2, name, metric, error.message)]
    if fusion is None or not fusion.quantized:
        return []

    warned = slow_linears(subject.backend, subject.target, subject.quantized.schemes())
    unexpected = [linear for linear in fusion.unfused if linear not in warned]
    notes = [f"{fusion.quantized - len(fusion.unfused)} linears fused"]
    if len(unexpected) < len(fusion.unfused):
        notes.append(f"{len(fusion.unfused) - len(unexpected)} not fused, as warned")
    if unexpected:
        notes.append(f"not fused: {', '.join(unexpected[:3])}")
    return [row(2, name, metric, float(len(unexpected)), 0.0, "; ".join(notes))]
