"""The page of a report: whole in itself, safe to open, and the same for the same report."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from cli_support import sample_report
from pydantic import ValidationError

from calib.errors import BackendError
from exporter.recipe import Recipe
from exporter.reporting.charts import style
from exporter.reporting.evidence import Continuation, Evidence, InputFigures, NoiseFigure, Spread
from exporter.reporting.page_files import page_text
from exporter.reporting.report import GateRow, Report, RotationGateRow, TrainingSummary

PARTS = {"quantized weight, int8": 4_000_000, "float weight, float": 1_000_000}
HOSTILE = "<script>alert('x')</script><img src=http://example.com/x>&amp;"


class Page(HTMLParser):
    """What a browser would find in it."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def spread(largest: float, *, whole: bool) -> Spread:
    histogram = [0] * 80
    histogram[30:50] = range(1, 21)
    return Spread(
        absmax=largest,
        rms=1.0,
        token_ratio=largest,
        channel_ratio=2.0,
        histogram=histogram if whole else None,
        channels=[1.0, largest, 0.5] if whole else [],
    )


def full_report(layers: int = 2, status: str = "passed") -> Report:
    """A report with something of everything."""
    base = sample_report(status)  # type: ignore[arg-type]
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    evidence = Evidence(
        inputs=[
            InputFigures(
                name=f"model.layers.{layer}.{kind}",
                kind=kind,
                layer=layer,
                original=spread(100.0 + layer, whole=layer == 0),
                rotated=spread(4.0 + layer, whole=layer == 0),
            )
            for layer in range(layers)
            for kind in kinds
        ],
        noise=[
            NoiseFigure(name=f"{layer}.{kind}", kind=kind, layer=layer, noise=0.01 * (layer + 1))
            for layer in range(layers)
            for kind in kinds
        ],
        continuations=[
            Continuation(prompt=HOSTILE, original="same one", exported="same two", together=1)
        ],
    )
    rows = [base.parity[0].model_copy(update={"evidence": evidence}), *base.parity[1:]]
    candidates = ("identity", "hadamard", "trained")
    return base.model_copy(
        update={
            "parity": rows,
            "gate": [
                GateRow(rotate="none", kl=0.5, margin=0.4, margin_low=0.3, margin_high=0.5),
                GateRow(rotate="r1,r2", kl=0.1, margin=0.0, chosen=True),
            ],
            "rotation_gate": [
                RotationGateRow(
                    rotation="R2",
                    candidate=name,
                    error=1e-3 / (at + 1),
                    layers=[1e-3, 1e-4],
                    measure="held-out",
                    chosen=name == "trained",
                )
                for at, name in enumerate(candidates)
            ],
            "training": [
                TrainingSummary(
                    rotation="R1",
                    objective="whip",
                    losses=[3.0, 2.0, 1.5],
                    held_out_errors=[0.3, 0.2],
                )
            ],
        }
    )


def drawn(report: Report) -> str:
    return page_text(report, Recipe(), Path("out/x"), PARTS)


@pytest.fixture(scope="module")
def text() -> str:
    return drawn(full_report())


def test_the_page_needs_nothing_from_elsewhere(text: str) -> None:
    page = Page(text)
    assert not page.open
    assert {"script", "link", "iframe", "img"}.isdisjoint(page.tags)
    loaded = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert loaded
    assert all(value.startswith("#") for value in loaded)
    assert "@import" not in text
    assert "url(http" not in text


def test_what_a_model_writes_is_text_and_nothing_else(text: str) -> None:
    page = Page(text)
    assert HOSTILE in page.words
    assert "script" not in page.tags


def test_every_chart_is_drawn_and_ids_are_unique(text: str) -> None:
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) == 9
    for chart in charts:
        ElementTree.fromstring(chart)  # well-formed
        assert 'role="img"' in chart
        assert "currentColor" in chart
        assert style._INK not in chart
        assert "mathdefault" not in chart  # numbers are text, and no formula that nobody sets
    ids = re.findall(r'\bid="([^"]+)"', text)
    defined = [each for each in ids if re.search(rf"[#]{re.escape(each)}\b", text)]
    assert len(defined) == len(set(defined))


def test_the_same_report_gives_the_same_page(text: str) -> None:
    assert drawn(full_report()) == text


def test_a_report_of_which_little_is_known_has_a_page_too() -> None:
    bare = sample_report("unverified", parity=[], gate=[])
    page = Page(drawn(bare))
    assert not page.open
    words = " ".join(page.words)
    assert "parity not checked" in words
    assert "Nothing was measured" in words


def test_a_failure_stands_first() -> None:
    words = " ".join(Page(drawn(full_report(status="failed"))).words)
    assert words.index("PARITY FAILED") < words.index("Quality")


def test_the_page_of_a_model_of_32_layers_is_small() -> None:
    """3 MB is the bar."""
    assert len(drawn(full_report(layers=32)).encode()) < 3_000_000


def test_evidence_of_several_rows_is_joined() -> None:
    report = full_report()
    twice = report.model_copy(update={"parity": [*report.parity, report.parity[0]]})
    assert len(twice.evidence.inputs) == 2 * len(report.evidence.inputs)


def test_without_matplotlib_the_hint_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="matplotlib") as caught:
        drawn(sample_report())
    assert caught.value.hint == style.INSTALL


@pytest.mark.parametrize(
    "broken",
    [
        {"histogram": [1, 2]},
        {"histogram": [-1] * 80},
        {"absmax": -1.0},
        {"rms": float("nan")},
        {"channels": [float("inf")]},
    ],
)
def test_figures_that_no_chart_can_show_are_no_report(broken: dict[str, object]) -> None:
    """The page of a stranger's folder is drawn from a stranger's report.json."""
    values = {"absmax": 1.0, "rms": 1.0, "token_ratio": 1.0, "channel_ratio": 1.0, **broken}
    with pytest.raises(ValidationError):
        Spread.model_validate(values)


def test_bounds_and_figures_at_the_edge_are_drawn() -> None:
    report = full_report()
    rows = [
        row.model_copy(update={"metric": "perplexity ratio", "measured": measured, "bound": bound})
        for row, (measured, bound) in zip(
            [report.parity[1]] * 4,
            [(1.0, 1.0), (0.0, 1.02), (1e300, 1.02), (2.0, 0.0)],
            strict=True,
        )
    ]
    empty = report.parity[0].model_copy(
        update={
            "evidence": Evidence(
                inputs=[
                    InputFigures(
                        name="a",
                        kind="$\\frac{a}{b}$",
                        layer=0,
                        original=None,
                        rotated=Spread(
                            absmax=0, rms=0, token_ratio=0, channel_ratio=0, histogram=[0] * 80
                        ),
                    )
                ],
                noise=[NoiseFigure(name="a", kind="a", layer=0, noise=0.0)],
            )
        }
    )
    page = Page(drawn(report.model_copy(update={"parity": [empty, *rows]})))
    assert not page.open
    assert any("$\\frac{a}{b}$" in word for word in page.words)
    assert not any("mathdefault" in word for word in page.words)
