"""The tables and sentences that a :class:`Report` amounts to, as plain strings: the console and the
model card show the same ones, so they cannot disagree.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from calib.architectures.generic import GENERIC
from exporter.flags import command, flags_of
from exporter.recipe import EMBEDDED, RECIPE_FILE
from exporter.reporting.report import (
    CalibrationSummary,
    GateRow,
    ParityRow,
    Report,
    RotateReport,
    RotationGateRow,
    RotationSummary,
)

_INDEX = re.compile(r"(?<=[.\[])\d+")

NAMES_SHOWN = 4
"""Layer names listed for one reason before the rest is only counted."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header. ``marked`` rows stand out: the chosen candidate, a failed
    figure.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()
    """Columns of numbers, aligned to the right."""
    marked: frozenset[int] = frozenset()


def human_bytes(count: int) -> str:
    """``1536`` as ``1.5 KiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def digest_line(sha256: str) -> str:
    """The digest of an export, as ``rotq verify --expect-sha256`` takes it."""
    return f"sha256 of the export: {sha256}"


def human_seconds(seconds: float) -> str:
    """``75`` as ``1 min 15 s``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def source_words(source: str) -> str:
    """The model as a reader should see it; nobody should take the example for their own model."""
    return "the embedded example model" if source == EMBEDDED else source


def quantized_words(quantized: str | None) -> str:
    """That the weights were read from a quantized checkpoint; nothing where it was a float one.

    Args:
        quantized: how, as a report says it.
    """
    if quantized is None:
        return ""
    return (
        f"The source is quantized ({quantized}); its weights are read as the floats they stand for."
    )


def size_words(before: int, after: int) -> str:
    """Bytes before and after, with the ratio."""
    ratio = f" ({before / after:.2f} x smaller)" if 0 < after <= before else ""
    if before and after > before:
        ratio = (
            f" ({after / before:.2f} x larger: 'rotq inspect' says what is stored in which dtype)"
        )
    return f"{human_bytes(before)} -> {human_bytes(after)}{ratio}"


def calibration_words(calibration: CalibrationSummary) -> str:
    """How much text the statistics saw: rows, tokens, and tokens for each channel that they are
    of.
    """
    words = f"{calibration.rows} rows, {calibration.tokens:,} tokens"
    if calibration.channels:
        words += (
            f" ({calibration.tokens / calibration.channels:.1f} for each of the"
            f" {calibration.channels:,} input channels of the widest linear)"
        )
    return words


def layer_lines(report: Report) -> list[str]:
    """How many linears are quantized, and which are kept in float and why."""
    layers = report.layers
    lines = [
        f"{layers.quantized} linears quantized ({report.scheme}), {len(layers.kept)} kept in float"
    ]
    if report.model.how == "generic":
        lines.insert(0, GENERIC)
    if len(layers.schemes) > 1:
        lines += [f"{count} with {words}" for words, count in layers.schemes.items()]
    if layers.cache is not None:
        lines.append(
            f"KV cache: {layers.cache}, one static scale each for the keys and the values of a"
            " layer"
        )
    kept = kept_lines({layer.name: layer.reason for layer in layers.kept})
    return lines + kept + massive_lines(report)


def kept_lines(kept: Mapping[str, str]) -> list[str]:
    """Which linears stay in float, a line for each reason."""
    lines = []
    names_by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in kept.items():
        names_by_reason[reason].append(name)
    for reason, names in names_by_reason.items():
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        lines.append(f"kept in float: {', '.join(names[:NAMES_SHOWN])}{more}: {reason}")
    return lines


MASSIVE_SHOWN = 3
"""Inputs with massive tokens that are named before the rest is only counted."""


def massive_lines(report: Report) -> list[str]:
    """Which inputs have massive tokens, and what stands before every sequence because of them."""
    lines = []
    if report.massive:
        shown = "; ".join(
            f"{row.name} {row.ratio:.0f} x"
            + ("" if row.with_prefix is None else f" ({row.with_prefix:.0f} x with the prefix)")
            for row in report.massive[:MASSIVE_SHOWN]
        )
        more = len(report.massive) - MASSIVE_SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        lines.append(f"massive tokens, largest over median of an input: {shown}{rest}")
    if report.prefix is not None:
        words = report.prefix.words or [str(token) for token in report.prefix.tokens]
        count = len(report.prefix.tokens)
        lines.append(
            f"a prefix of {count} token{'s' if count > 1 else ''} stands before every sequence, as"
            f" constant keys and values: {', '.join(map(repr, words))}"
        )
    return lines


def gate_table(report: Report) -> Table:
    """The candidates of ``--rotate auto`` and ``--prefix auto`` on held-out tokens."""
    tokens = next((row.row_tokens for row in report.gate if row.row_tokens), [])
    counted = f"{len(tokens)} held-out rows, {sum(tokens):,} tokens" if tokens else "held-out rows"
    return Table(
        f"Gate ({counted}, against the float model)",
        (
            *("candidate", "KL", "above the lowest", "95 % interval"),
            *("top-1 agreement", "perplexity", ""),
        ),
        tuple(
            (
                row.name,
                "-" if row.kl is None else f"{row.kl:.4g}",
                *_margin_words(row),
                "-" if row.top1 is None else f"{row.top1:.2%}",
                "-" if row.perplexity is None else f"{row.perplexity:.3f}",
                "chosen" if row.chosen else "not tried" if row.kl is None else "",
            )
            for row in report.gate
        ),
        right=frozenset({1, 2, 3, 4, 5}),
        marked=frozenset(index for index, row in enumerate(report.gate) if row.chosen),
    )


def _margin_words(row: GateRow | RotationGateRow) -> tuple[str, str]:
    """How far a candidate is above the lowest one, and the interval of that; the lowest one has
    none.
    """
    if row.margin is None or row.margin_low is None or row.margin_high is None:
        return "-", "-"
    if row.margin == row.margin_low == row.margin_high:
        return f"{row.margin:.2g}", "-"
    return f"{row.margin:.2g}", f"{row.margin_low:.2g} to {row.margin_high:.2g}"


def gate_findings(report: Report) -> list[str]:
    """Say plainly what each candidate did: where it helped, and where it made things worse."""
    findings = _choice_findings(report)
    plain = next((row for row in report.gate if row.name == "none"), None)
    if plain is None or plain.kl is None:
        return findings
    for row in report.gate:
        if row.kl is None:
            continue
        if row is not plain and row.kl >= plain.kl:
            findings.append(
                f"{row.name} did not help: KL {row.kl:.4g} against {plain.kl:.4g} of the model as"
                " it is"
            )
        elif row.chosen and row is not plain:
            findings.append(f"{row.name} lowers KL from {plain.kl:.4g} to {row.kl:.4g}")
    if plain.chosen and len(report.gate) > 1:
        findings.append(
            "nothing was applied: none of the candidates was better than leaving the model as it"
            " is, beyond noise"
        )
    return findings


def _choice_findings(report: Report) -> list[str]:
    """Why the candidate with the lowest KL was not taken, where it was not; and what one row alone
    cannot say.
    """
    chosen = next((row for row in report.gate if row.chosen), None)
    lowest = next((row for row in report.gate if row.margin == 0), None)
    if chosen is None or lowest is None:
        return []
    if len(lowest.row_kls) == 1:
        return ["one held-out row shows no noise: the lowest KL was taken (gate.nsamples)"]
    if chosen.margin:
        return [
            f"{lowest.name} has the lowest KL; {chosen.name} is within noise of it, and simpler"
        ]
    return []


def rotation_gate_table(rows: Sequence[RotationGateRow]) -> Table:
    """The candidates of each rotation by the error of the exported quantizer."""
    return Table(
        "Candidates of each rotation (relative squared quantization error)",
        (
            *("rotation", "candidate", "error", "above the lowest", "95 % interval"),
            *("range over layers", "measured on", ""),
        ),
        tuple(
            (
                row.rotation,
                row.candidate,
                f"{row.error:.3e}",
                *_margin_words(row),
                f"{min(row.layers):.2e} to {max(row.layers):.2e}" if row.layers else "",
                row.measure,
                "chosen" if row.chosen else row.note,
            )
            for row in rows
        ),
        right=frozenset({2, 3, 4}),
        marked=frozenset(index for index, row in enumerate(rows) if row.chosen),
    )


def rotation_gate_findings(rows: Sequence[RotationGateRow]) -> list[str]:
    """Say plainly where training, or rotating at all, gained nothing."""
    chosen = {row.rotation: row for row in rows if row.chosen}
    trained = {row.rotation: row for row in rows if row.candidate == "trained"}
    findings = []
    for name, best in chosen.items():
        if best.candidate == "identity":
            findings.append(f"{name} is left out: no rotation lowers this error beyond noise")
        elif best.candidate != "trained" and name in trained:
            ratio = trained[name].error / best.error
            within = ", within noise" if ratio < 1 else ""
            findings.append(
                f"training {name} gained nothing over {best.candidate}: {ratio:.2f} x its"
                f" error{within}"
            )
    return findings


class _Rotated(Protocol):
    @property
    def rotations(self) -> list[RotationSummary]: ...


def rotation_table(report: _Rotated) -> Table:
    """The rotations of the result; equal ones (R2 of every layer and head) share a row."""
    kinds: Counter[tuple[str, str, str, str, str]] = Counter()
    for rotation in report.rotations:
        where = "online: computed at run time" if rotation.online else "folded into the weights"
        name, space = (_INDEX.sub("*", text) for text in (rotation.name, rotation.space))
        kinds[name, space, str(rotation.order), where, rotation.origin] += 1
    return Table(
        "Rotations",
        ("rotation", "space", "order", "count", "where", "origin"),
        tuple(
            (name, space, order, str(count), where, origin)
            for (name, space, order, where, origin), count in kinds.items()
        ),
        right=frozenset({2, 3}),
    )


def parity_table(report: Report | RotateReport) -> Table:
    """Every parity figure with its bound and verdict."""
    return Table(
        "Parity",
        ("rung", "compared", "metric", "measured", "bound", "result", "note"),
        tuple(
            (
                str(row.rung),
                row.name,
                row.metric,
                figure_words(row.measured),
                figure_words(row.bound),
                verdict(row),
                row.note,
            )
            for row in report.parity
        ),
        right=frozenset({0, 3, 4}),
        marked=frozenset(index for index, row in enumerate(report.parity) if row.passed is False),
    )


def runtime_lines(report: Report) -> list[str]:
    """What ran the export, and what could not be run here."""
    ran = dict.fromkeys((row.runtime, _session_words(row)) for row in report.parity if row.runtime)
    elsewhere = [f"not run in: {report.not_run_in}"] if report.not_run_in else []
    missing = dict.fromkeys(
        row.note for row in report.parity if row.rung == 2 and row.measured is None
    )
    where = [f"on: {report.cpu}"] if report.cpu and ran else []
    return [f"ran in: {runtime}{session}" for runtime, session in ran] + [
        *elsewhere,
        *where,
        *missing,
    ]


def _session_words(row: ParityRow) -> str:
    """What the session that ran ``row`` reported of itself."""
    settings = ", ".join(f"{name} {value}" for name, value in row.session.items())
    return f"; {settings}" if settings else ""


def ran_in(report: Report) -> str:
    """Everything that ran the export, in words."""
    return "; ".join(dict.fromkeys(row.runtime for row in report.parity if row.runtime))


def verdict(row: ParityRow) -> str:
    """``pass``, ``FAIL``, or why there is no verdict."""
    if row.passed is None:
        return "not run" if row.measured is None else "reported"
    return "pass" if row.passed else "FAIL"


def failed_rows(report: Report) -> list[str]:
    """One phrase for each parity figure that missed its bound."""
    return [
        f"{row.name}: {row.metric} {figure_words(row.measured)}, bound {figure_words(row.bound)}"
        for row in report.parity
        if row.passed is False
    ]


def verdict_line(report: Report, folder: Path | str) -> str:
    """What matters most, in one line: whether it passed, quality and size before and after."""
    words = {
        "passed": "parity passed"
        + (f", not run in {report.not_run_in}" if report.not_run_in else ""),
        "failed": "PARITY FAILED: do not deploy",
        "unverified": "parity not checked",
    }[report.status]
    parts = [words]
    figures = {row.metric: row for row in report.parity if row.rung == 3}
    ratio, kl = figures.get("perplexity ratio"), figures.get("KL")
    if ratio is not None and ratio.measured is not None:
        before_after = ratio.note.partition(" on ")[0]
        parts.append(f"perplexity {before_after or f'x {ratio.measured:.3f}'}")
    if kl is not None and kl.measured is not None:
        parts.append(f"KL {kl.measured:.3g}")
    before, after = report.layers.bytes_before, report.layers.bytes_after
    parts.append(f"{human_bytes(before)} -> {human_bytes(after)}")
    return f"{'; '.join(parts)}: {folder}"


def remedy_commands(report: Report, folder: Path) -> list[str]:
    """The command line of each remedy, complete: of an export that is in ``folder``."""
    return [
        command(
            *("rotq", "export", "--recipe", folder / RECIPE_FILE),
            *flags_of(remedy.change),
            *("-o", f"{folder}-{remedy.name}"),
        )
        for remedy in report.remedies
    ]


def remedy_lines(report: Report, folder: Path) -> list[str]:
    """What would most likely mend a failed report: each command, and under it why, what to expect,
    and how long it takes.
    """
    lines = []
    for line, remedy in zip(remedy_commands(report, folder), report.remedies, strict=True):
        words = [remedy.why]
        if remedy.expected:
            words.append(f"expected: {remedy.expected}")
        if remedy.seconds is not None:
            words.append(f"about {human_seconds(remedy.seconds)}")
        lines += [f"  {line}", f"      {'; '.join(words)}"]
    return lines


def seconds_table(report: Report | RotateReport, stages: Collection[str] = ()) -> Table:
    """Time and memory by stage, and in all; of some ``stages`` alone where they are named."""
    seconds = {name: own for name, own in report.seconds.items() if not stages or name in stages}
    cpu = {name: own for name, own in report.cpu_seconds.items() if name in seconds}
    peak = {name: own for name, own in report.peak_bytes.items() if name in seconds}
    rows = [
        (
            stage,
            human_seconds(spent),
            human_seconds(cpu[stage]) if stage in cpu else "-",
            human_bytes(peak[stage]) if stage in peak else "-",
        )
        for stage, spent in seconds.items()
    ]
    rows.append(
        (
            "total",
            human_seconds(sum(seconds.values())),
            human_seconds(sum(cpu.values())) if cpu else "-",
            human_bytes(max(peak.values())) if peak else "-",
        )
    )
    head = ("stage", "seconds", "of processors", "peak memory")
    return Table("Time", head, tuple(rows), right=frozenset({1, 2, 3}))


def figure_words(value: float | None) -> str:
    """A figure of the parity check; ``-`` for one that is not there."""
    if value is None:
        return "-"
    # a bound of 1.001 is not one of 1
    return f"{value:.4g}" if 0.1 <= abs(value) < 10 else f"{value:.3g}"
