"""``report.html``: everything that a report says, with charts, as one page that needs nothing from
a network.

The tables are those of the console and the card (:mod:`exporter.reporting.summary`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from exporter.flags import command
from exporter.recipe import Recipe
from exporter.reporting import summary
from exporter.reporting.card import title_of
from exporter.reporting.charts.choice import gate_chart, rotation_gate_chart, training_chart
from exporter.reporting.charts.outcome import bytes_chart, parity_chart
from exporter.reporting.charts.style import Chart
from exporter.reporting.charts.values import (
    channel_chart,
    histogram_chart,
    noise_chart,
    spread_chart,
)
from exporter.reporting.evidence import Continuation, Evidence
from exporter.reporting.html import table_html
from exporter.reporting.report import Report

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem;
  background: Canvas; color: CanvasText; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin-bottom: .3rem; }
nav a { margin-right: .9rem; white-space: nowrap; }
.verdict { border-left: .4rem solid #8a8f98; padding: .6rem .9rem; font-weight: 600; }
.passed { border-color: #2f9e6e; } .failed { border-color: #cc4b4b; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem;
  border-bottom: 1px solid color-mix(in srgb, CanvasText 18%, Canvas); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.marked { font-weight: 600; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; opacity: .85; }
pre { white-space: pre-wrap; font-size: .8rem; padding: .6rem;
  background: color-mix(in srgb, CanvasText 6%, Canvas); }
.texts { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem 1rem; font-size: .9rem; }
.texts .prompt { grid-column: 1 / -1; opacity: .8; margin-top: .8rem; white-space: pre-wrap; }
.texts div { white-space: pre-wrap; }
mark { background: color-mix(in srgb, #d98324 35%, Canvas); color: inherit; }
@media (max-width: 40rem) { .texts { grid-template-columns: 1fr; } body { padding: .6rem; }
  figure { overflow-x: auto; } figure svg { min-width: 36rem; } figcaption { max-width: 92vw; } }
@media print { :root { color-scheme: light; } nav { display: none; }
  h2, h3 { break-after: avoid; } figure, tr, .texts div { break-inside: avoid; }
  body { max-width: none; } }
"""


def web_page(report: Report, recipe: Recipe, folder: Path | str, parts: Mapping[str, int]) -> str:
    """The page.

    Args:
        report: of an export.
        recipe: what it was made by.
        folder: where it is, as its reader should see it.
        parts: bytes that are stored, by what they are.
    """
    evidence = report.evidence
    sections = [
        ("Quality", _quality(report)),
        ("How rotations were chosen", _choice(report)),
        ("Values before and after rotation", _values(report, evidence)),
        ("What quantization does to each layer", _noise(report, evidence)),
        ("What the model writes", _texts(evidence.continuations)),
        ("Where the bytes went", _bytes(report, parts)),
        ("Parity", _parity(report)),
        ("Calibration", _calibration(report)),
        ("Time", _table(summary.seconds_table(report))),
        ("How to repeat it", _recipe(report, recipe, folder)),
    ]

    shown = [(name, text) for name, text in sections if text]
    links = "".join(f'<a href="#s{at}">{escape(name)}</a>' for at, (name, _) in enumerate(shown))
    body = "".join(
        f'<section><h2 id="s{at}">{escape(name)}</h2>{text}</section>'
        for at, (name, text) in enumerate(shown)
    )
    title = f"{title_of(report.model.source)}, {report.scheme} for {report.backend}/{report.target}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{_verdict(report, folder)}<nav>{links}</nav>{body}"
        "</body></html>\n"
    )


def _verdict(report: Report, folder: Path | str) -> str:
    line = escape(summary.verdict_line(report, folder))
    failed = _list(summary.failed_rows(report))
    remedies = summary.remedy_lines(report, Path(folder))
    advice = "" if not remedies else "<pre>" + escape("\n".join(remedies)) + "</pre>"
    return f'<p class="verdict {report.status}">{line}</p>{failed}{advice}'


def _quality(report: Report) -> str:
    rows = [row for row in report.parity if row.rung == 3]
    if not rows:
        return _paragraph("Nothing was measured: the parity check was skipped.")
    lines = [
        f"{row.metric}: {summary.figure_words(row.measured)}"
        + ("" if row.bound is None else f" (bound {summary.figure_words(row.bound)})")
        + f", {summary.verdict(row)}"
        + (f"; {row.note}" if row.note else "")
        for row in rows
    ]
    return _list(lines) + _list(summary.runtime_lines(report))


def _choice(report: Report) -> str:
    parts = [
        _figure(
            gate_chart(report.gate),
            "Candidates of the gate, quantized, on held-out tokens against the float model.",
        ),
        _list(summary.gate_findings(report)),
        _table(summary.gate_table(report)),
        _figure(
            rotation_gate_chart(report.rotation_gate),
            "What the quantizer of the scheme loses after each candidate of each rotation.",
        ),
        _list(summary.rotation_gate_findings(report.rotation_gate)),
        _figure(
            training_chart(report.training), "Training, whether what it gave was taken or not."
        ),
        _list(f"{each.rotation}: {each.note}" for each in report.training if each.note),
        _table(summary.rotation_table(report)),
    ]
    return "".join(parts)


def _values(report: Report, evidence: Evidence) -> str:
    parts = [
        _figure(
            spread_chart(evidence.inputs),
            "The largest magnitude of a token over that of the median token. A static scale has to"
            " hold the largest: each doubling costs the others a bit.",
        ),
        _figure(
            histogram_chart(evidence.inputs),
            "Magnitudes of values; of each kind the layer whose largest token stands out most in"
            " the original. The narrower, the more of an integer range is used.",
        ),
        _figure(
            channel_chart(evidence.inputs),
            "Largest magnitude of each channel, same layers; of many, neighbours together.",
        ),
        _list(summary.massive_lines(report)),
    ]
    text = "".join(parts)
    return text or ("" if not report.parity else _paragraph("Not looked at in this run."))


def _noise(report: Report, evidence: Evidence) -> str:
    chart = _figure(
        noise_chart(evidence.noise),
        "Each linear by itself: its output with input and weight quantized, against float, on the"
        " input that the rotated float model gives it.",
    )

    worst = sorted(evidence.noise, key=lambda row: -row.noise)[:8]
    table = summary.Table(
        "The linears that lose most",
        ("linear", "relative L2 of its output"),
        tuple((row.name, summary.figure_words(row.noise)) for row in worst),
        right=frozenset({1}),
    )
    massive = summary.massive_lines(report)  # it stands above
    lines = [line for line in summary.layer_lines(report) if line not in massive]
    return chart + _table(table) + _list(lines)


def _texts(continuations: Sequence[Continuation]) -> str:
    """Prompts, and what the float model and the export write; marked is where they part."""
    if not continuations:
        return ""

    cells = []
    for each in continuations:
        cells.append(f'<div class="prompt">{escape(each.prompt)}</div>')
        shared = _common_start(each.original, each.exported)
        original = "(not run)" if each.original is None else _marked(each.original, shared)
        cells += [f"<div>{original}</div>", f"<div>{_marked(each.exported, shared)}</div>"]
    head = "<div><b>float model</b></div><div><b>exported, in its runtime</b></div>"
    return (
        _paragraph("Each next token is the most likely one; marked is what differs.")
        + f'<div class="texts">{head}{"".join(cells)}</div>'
    )


def _common_start(one: str | None, other: str) -> int:
    """Characters that both begin with."""
    if one is None:
        return len(other)
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _marked(text: str, shared: int) -> str:
    rest = f"<mark>{escape(text[shared:])}</mark>" if text[shared:] else ""
    return escape(text[:shared]) + rest


def _bytes(report: Report, parts: Mapping[str, int]) -> str:
    words = summary.size_words(report.layers.bytes_before, report.layers.bytes_after)
    table = summary.Table(
        "Stored",
        ("what", "bytes"),
        tuple((name, summary.human_bytes(size)) for name, size in parts.items()),
        right=frozenset({1}),
    )
    chart = bytes_chart(report.layers.bytes_before, parts)
    return _figure(chart, f"Weights: {words}.") + _table(table)


def _parity(report: Report) -> str:
    return _figure(
        parity_chart(report.parity),
        "Every judged figure over its bound; of the perplexity ratio, their logarithms. Rung 0: the"
        " files; 1: original against rotated float model; 2: simulated against exported model, in"
        " the runtime; 3: original against exported model.",
    ) + _table(summary.parity_table(report))


def _calibration(report: Report) -> str:
    own = report.calibration
    lines = [
        f"{summary.calibration_words(own)} of {own.dataset}",
        f"limits of activations: {own.observer}; rounding of weights: {own.weights};"
        f" smoothing: {own.smoothing}",
        f"SHA-256 of the token ids: {own.sha256}",
        f"SHA-256 of the source weights: {report.model.fingerprint}",
        summary.quantized_words(report.model.quantized),
    ]
    return _list(line for line in lines if line)


def _recipe(report: Report, recipe: Recipe, folder: Path | str) -> str:
    again = command("rotq", "export", "--recipe", Path(folder) / "rotq.yaml", "-o", "OUT")
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    return (
        f"<pre>{escape(again)}</pre>"
        + _list(
            [f"versions: {versions}", *([f"processor: {report.cpu}"] if report.cpu else [])]
            + ([summary.digest_line(report.export_sha256)] if report.checksums else [])
        )
        + f"<details><summary>Recipe</summary><pre>{escape(recipe.to_yaml())}</pre></details>"
    )


def _figure(chart: Chart | None, caption: str) -> str:
    if chart is None:
        return ""
    return f"<figure>{chart.svg()}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(table: summary.Table) -> str:
    return f'<div class="wide">{table_html(table)}</div>' if table.rows else ""


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""
