"""Printing: settings, reports, plans and the environment. No decisions are made here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from exporter.console.fit import fitted, widths
from exporter.console.streams import table_box
from exporter.environment import Environment
from exporter.reporting import summary
from exporter.reporting.report import Report, RotateReport, RotationGateRow
from exporter.reporting.summary import Table, human_bytes, human_seconds

if TYPE_CHECKING:
    from exporter.commands.evaluate import EvalResult
    from exporter.planning.plan import Plan


def show_settings(console: Console, settings: Mapping[str, str]) -> None:
    """Print names and values, aligned."""
    width = max(map(len, settings))
    for name, value in settings.items():
        show_line(console, f"  {name:<{width}}  {value}")


def show_report(
    console: Console, report: Report, folder: Path, stages: Collection[str] = ()
) -> None:
    """Print the summary of a finished run, what matters most first.

    Args:
        console: where.
        report: what was found.
        folder: what it is of.
        stages: whose time is shown; by default that of all.
    """
    style = {"passed": "green", "failed": "bold red", "unverified": "yellow"}[report.status]
    show_line(console, summary.verdict_line(report, folder), style)
    show_line(
        console,
        f"{summary.source_words(report.model.source)}: {report.model.model_type}, "
        f"{report.model.parameters:,} parameters",
    )
    if report.model.quantized is not None:
        show_line(console, summary.quantized_words(report.model.quantized))
    for line in summary.layer_lines(report):
        show_line(console, line)
    show_line(
        console,
        f"size: {summary.size_words(report.layers.bytes_before, report.layers.bytes_after)}",
    )

    calibration = report.calibration
    show_line(
        console,
        f"calibration: {summary.calibration_words(calibration)} of {calibration.dataset}",
    )
    show_rotation_gate(console, report.rotation_gate)
    show_table(console, summary.gate_table(report))
    for line in summary.gate_findings(report):
        show_line(console, line)

    show_table(console, summary.rotation_table(report))
    if not report.rotations:
        show_line(console, "rotations: none")
    show_table(console, summary.parity_table(report), alarm=True)
    for line in summary.runtime_lines(report):
        show_line(console, line)
    show_table(console, summary.seconds_table(report, stages))
    for warning in report.warnings:
        show_line(console, f"warning: {warning}", "yellow")

    show_line(console, summary.digest_line(report.export_sha256))
    verdict = {
        "passed": "parity passed"
        + (f", not run in {report.not_run_in}" if report.not_run_in else ""),
        "failed": "PARITY FAILED: do not deploy",
        "unverified": "parity not checked",
    }
    if report.remedies:
        show_line(console, "\nWhat would most likely mend it, the most promising first", "bold")
    for line in summary.remedy_lines(report, folder):
        show_line(console, line, whole=line.lstrip().startswith("rotq "))
    show_line(
        console,
        f"{folder} ({report.backend}, {report.target}, {report.scheme}, rotate {report.rotate}): "
        f"{verdict[report.status]}",
        style,
    )


def show_rotated(console: Console, report: RotateReport, folder: Path) -> None:
    """Print the summary of ``rotq rotate``."""
    show_line(
        console,
        f"{summary.source_words(report.model.source)}: {report.model.model_type}, "
        f"{report.model.parameters:,} parameters",
    )
    show_rotation_gate(console, report.rotation_gate)
    show_table(console, summary.rotation_table(report))
    if not report.rotations:
        show_line(console, "rotations: none; the norms alone are folded")
    show_table(console, summary.parity_table(report), alarm=True)
    show_table(console, summary.seconds_table(report))
    show_line(
        console,
        f"{folder} ({report.dtype}, rotate {report.rotate}): computes what the original does",
        "green",
    )


def show_rotation_gate(console: Console, rows: Sequence[RotationGateRow]) -> None:
    """Print what each rotation was chosen from."""
    show_table(console, summary.rotation_gate_table(rows))
    for line in summary.rotation_gate_findings(rows):
        show_line(console, line)


def show_plan(console: Console, plan: Plan) -> None:
    """Print a plan, then the complete recipe, which can be saved and edited."""
    show_line(
        console,
        f"{summary.source_words(plan.model)}: {plan.model_type}, {plan.parameters:,} parameters, "
        f"{plan.quantized_parameters:,} of them to be quantized",
    )

    if plan.source_quantized is not None:
        show_line(console, summary.quantized_words(plan.source_quantized))

    stages = tuple(
        (stage.name, stage.detail, human_seconds(stage.seconds)) for stage in plan.stages
    )
    total = ("total", "an estimate: see docs/cli.md", human_seconds(plan.seconds))
    show_table(
        console, Table("Plan", ("stage", "what", "time"), (*stages, total), right=frozenset({2}))
    )

    show_line(
        console,
        f"weights: {human_bytes(plan.bytes_before)} -> about {human_bytes(plan.bytes_after)}",
    )
    show_line(console, f"memory: about {human_bytes(plan.peak_memory)} at the peak")
    show_line(console, f"output: {plan.output or '(no -o/--output given)'}")
    show_line(console, f"files: {', '.join(plan.files)}")
    for warning in plan.warnings:
        show_line(console, f"warning: {warning}", "yellow")
    show_line(console, "\nrecipe:")
    show_line(console, plan.recipe.rstrip(), whole=True)


def show_evaluation(console: Console, result: EvalResult) -> None:
    """Print a perplexity."""
    show_line(
        console,
        f"perplexity {result.perplexity:.4f} (nll {result.nll:.5f} nats per token, "
        f"{result.tokens:,} tokens, in {result.runtime})",
    )
    own = result.divergence
    if own is not None:
        show_line(
            console,
            f"against {own.reference} (perplexity {own.perplexity:.4f}): KL {own.kl:.4g} nats,"
            f" top-1 {own.top1:.2%}, top-5 {own.top5:.2%}",
        )


def show_evaluations(
    console: Console, sources: Sequence[str], results: Sequence[EvalResult]
) -> None:
    """Print a table of several sources, the lowest perplexity marked."""
    rows = []
    for source, result in zip(sources, results, strict=True):
        own = result.divergence
        compared = (
            ["-"] * 3 if own is None else [f"{own.kl:.4g}", f"{own.top1:.2%}", f"{own.top5:.2%}"]
        )
        size = "-" if result.nbytes is None else human_bytes(result.nbytes)
        rows.append((source, f"{result.perplexity:.4f}", *compared, size, result.runtime))
    lowest = min(range(len(results)), key=lambda at: results[at].perplexity)
    header = ("source", "perplexity", "KL", "top-1", "top-5", "weights", "in")
    title = f"On {results[0].tokens:,} tokens"
    numbers = frozenset(range(1, 6))
    show_table(
        console, Table(title, header, tuple(rows), right=numbers, marked=frozenset({lowest}))
    )
    references = {own.reference: own.perplexity for r in results if (own := r.divergence)}
    for name, perplexity in references.items():
        show_line(console, f"compared with {name}: perplexity {perplexity:.4f}")


def show_environment(console: Console, environment: Environment) -> None:
    """Print the environment, aligned."""
    settings = {
        "python": f"{environment.python} ({environment.executable})",
        "system": environment.system,
        "cpu": f"{environment.cpu}, {environment.cores} cores",
        "memory": "unknown"
        if environment.memory_bytes is None
        else human_bytes(environment.memory_bytes),
        "cuda": "; ".join(environment.cuda_devices) or "none",
        **{name: version or "not installed" for name, version in environment.versions.items()},
        **environment.variables,
    }
    show_settings(console, settings)


def show_table(console: Console, table: Table, *, alarm: bool = False) -> None:
    """Print a table, unless it has no rows."""
    if not table.rows:
        return
    show_line(console, f"\n{table.title}", "bold")
    parts, below = fitted(table, console.width)
    for part in parts:
        drawn = RichTable(box=table_box(console), pad_edge=False)
        columns = zip(part.header, widths(part, console.width), strict=True)
        for index, (name, width) in enumerate(columns):
            # Folding, because an ellipsis would hide figures, and is not ASCII.
            justify: Literal["right", "left"] = "right" if index in part.right else "left"
            drawn.add_column(name, justify=justify, overflow="fold", width=width)
        for index, row in enumerate(part.rows):
            style = ("bold red" if alarm else "bold green") if index in part.marked else None
            drawn.add_row(*map(Text, row), style=style)
        console.print(drawn)
    for line in below:
        show_line(console, line)


def show_line(
    console: Console, text: str, style: str | None = None, *, whole: bool = False
) -> None:
    """Print one line; on a terminal it is broken between words, unless it is to be copied as a
    ``whole``.
    """
    soft = whole or not console.is_terminal
    console.print(Text(text), style=style, soft_wrap=soft)
