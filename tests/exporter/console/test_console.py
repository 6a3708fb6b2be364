"""What a person sees: bars only on a terminal, plain lines elsewhere, ASCII where nothing else can
be shown.
"""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest
from cli_support import sample_report
from rich.console import Console

from calib.process.progress import track
from exporter.console import ConsoleProgress, output_console, show_report
from exporter.reporting.summary import human_bytes, human_seconds


def console(*, terminal: bool = False, encoding: str = "utf-8") -> tuple[Console, io.BytesIO]:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    return Console(
        file=stream, width=160, force_terminal=terminal, highlight=False, markup=False, _environ={}
    ), raw


def summary_text(encoding: str = "utf-8", **changes: object) -> str:
    screen, raw = console(encoding=encoding)
    show_report(screen, sample_report(**changes), Path("out/x"))  # type: ignore[arg-type]
    return raw.getvalue().decode(encoding)


def test_without_a_terminal_each_finished_stage_is_one_line() -> None:
    screen, raw = console()
    with ConsoleProgress(screen) as progress:
        list(track(range(3), "capture", 3, progress))
        list(track(range(2), "open end", None, progress))
        list(track(range(1), "verify", 1, progress))
        progress("last", 0, None)
    lines = raw.getvalue().decode().splitlines()
    assert [line.split(":")[0] for line in lines] == ["capture", "open end", "verify", "last"]
    assert all(re.fullmatch(r"[\w ]+: \d+\.\d s", line) for line in lines)


def test_where_nothing_is_said_for_long_a_line_says_where_the_run_is() -> None:
    screen, raw = console()

    def said() -> str:
        """What is printed until it is the same twice in the time of three lines."""
        length = len(raw.getvalue())
        deadline = time.monotonic() + 20
        while raw.getvalue().count(b"\n", length) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        return raw.getvalue()[length:].decode().splitlines()[-1]

    with ConsoleProgress(screen, quiet=0.02) as progress:
        assert re.fullmatch(r"at work, \d+\.\d s so far", said())
        progress("trace", 0, None)
        assert re.fullmatch(r"trace: \d+\.\d s so far", said())
        progress("gate", 1, 4)
        progress("gate 2/4 r1,r2: calibrate", 1, 4)
        assert re.fullmatch(r"gate 2/4 r1,r2: calibrate: 25%, about \d+\.\d s left", said())
        progress("gate 2/4 r1,r2: calibrate", 4, 4)
        assert said().startswith("gate: 25%, about")  # what is still at work
    ended = raw.getvalue()
    time.sleep(0.1)  # five lines, if it went on
    assert raw.getvalue() == ended


def test_a_run_that_speaks_gets_no_lines_between() -> None:
    screen, raw = console()
    with ConsoleProgress(screen, quiet=30) as progress:
        list(track(range(3), "capture", 3, progress))
    assert raw.getvalue().decode().count("\n") == 1


def test_bars_that_move_stay_in_sight() -> None:
    """A terminal of 25 lines, and more stages than that."""
    screen, raw = console(terminal=True)
    with ConsoleProgress(screen) as progress:
        for number in range(60):
            list(track(range(1), f"gate {number}/60", 1, progress))
        raw.truncate(0)
        progress("gate 0/60", 0, 2)  # one that was taken down, and comes again
        progress("parity", 1, 4)
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw.getvalue().decode())
    assert "parity" in drawn
    assert "gate 59/60" in drawn
    assert "gate 0/60" in drawn
    assert "gate 1/60" not in drawn


def test_an_interrupted_stage_is_not_reported_as_finished() -> None:
    screen, raw = console()

    def interrupted() -> None:
        with ConsoleProgress(screen) as progress:
            progress("capture", 1, 3)
            progress("tokens", 1, None)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert raw.getvalue() == b""


def test_a_stage_that_comes_again_is_reported_again() -> None:
    screen, raw = console()
    with ConsoleProgress(screen) as progress:
        for _ in range(2):
            list(track(range(2), "calibrate", 2, progress))
    assert raw.getvalue().decode().count("calibrate:") == 2


def test_a_stage_without_work_is_finished_at_once() -> None:
    screen, raw = console()
    with ConsoleProgress(screen) as progress:
        list(track([], "nothing", 0, progress))
    assert raw.getvalue().decode().startswith("nothing: ")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_on_a_terminal_there_is_one_bar_a_stage(encoding: str) -> None:
    screen, raw = console(terminal=True, encoding=encoding)
    with ConsoleProgress(screen) as progress:
        for _ in range(2):
            list(track(range(4), "capture", 4, progress))
        list(track(range(2), "open end", None, progress))
        progress("unfinished", 1, 4)
    drawn = raw.getvalue().decode(encoding)
    last = (
        re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn).replace("\r", "\n").strip().splitlines()[-3:]
    )
    assert [line.split()[0] for line in last[:1]] == ["capture"]
    assert "4/4" in last[0]
    assert "2/2" in last[1]
    assert "1/4" in last[2]


def test_the_summary_says_everything_once() -> None:
    text = summary_text()
    for expected in (
        "the embedded example model: llama, 5,478,656 parameters",
        "42 linears quantized (int8), 1 kept in float",
        "lm_head: the scheme keeps the output head in float",
        "10.4 MiB -> 8.2 MiB (1.27 x smaller)",
        "r1,r2 did not help: KL 0.17 against 0.16 of the model as it is",
        "r1,r2,r4 lowers KL from 0.16 to 0.004",
        "1 min 19 s",
        "out/x (onnx, ort, int8, rotate r1,r2,r4): parity passed",
    ):
        assert text.count(expected) == 1, expected
    assert "Gate (2 held-out rows, 220 tokens, against the float model)" in text
    assert re.search(r"r1,r2 +0\.17 +0\.17 +0\.16 to 0\.17 +80\.00% +17\.100", text)
    assert re.search(r"r1,r2,r4 +0\.004 +0 +- +97\.00% +14\.460 +chosen", text)
    assert re.search(r"1 +rotated +relative L2 +2e-07 +1e-05 +pass", text)
    assert re.search(r"3 +decode +KL +- +- +not run +no cache outputs", text)
    assert re.search(r"r4 +ffn +704 +1 +online: computed at run time", text)


def test_a_rotation_that_hurts_is_called_that() -> None:
    gate = [
        row.model_copy(update={"chosen": row.rotate == "none"}) for row in sample_report().gate
    ][:2]
    text = summary_text(gate=gate, rotations=[])
    assert "nothing was applied: none of the candidates was better" in text
    assert "rotations: none" in text


def test_the_one_with_the_lowest_kl_is_named_where_it_was_not_taken() -> None:
    none, _, lowest = sample_report().gate
    gate = [
        none.model_copy(update={"chosen": True, "margin": 0.1, "margin_low": -0.2}),
        lowest.model_copy(update={"chosen": False}),
    ]
    text = summary_text(gate=gate)
    assert "r1,r2,r4 has the lowest KL; none is within noise of it, and simpler" in text
    one = [row.model_copy(update={"row_kls": [0.1], "row_tokens": [9]}) for row in gate]
    text = summary_text(gate=one)
    assert "one held-out row shows no noise: the lowest KL was taken (gate.nsamples)" in text


def test_a_failed_parity_stands_out() -> None:
    text = summary_text(status="failed")
    assert "FAIL" in text
    assert "PARITY FAILED: do not deploy" in text
    assert "parity not checked" in summary_text(status="unverified", parity=[])


def test_a_runtime_that_did_not_run_it_is_named() -> None:
    row = sample_report().parity[1].model_copy(update={"runtime": "torch", "not_run_in": "vLLM"})
    text = summary_text(parity=[row])
    assert "ran in: torch\nnot run in: vLLM\n" in text
    assert "parity passed, not run in vLLM" in text
    assert "not run in" not in summary_text()


def test_growing_is_not_called_shrinking() -> None:
    layers = sample_report().layers.model_copy(update={"bytes_after": 2 * 10_957_312})
    assert "(2.00 x larger: 'rotq inspect' says what is stored in which dtype)" in summary_text(
        layers=layers
    )


def test_ascii_streams_get_ascii_only() -> None:
    assert summary_text(encoding="ascii").isascii()


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert output_console().no_color


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**41, "2.0 TiB")],
)
def test_bytes_in_words(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (75, "1 min 15 s"),
        (7260, "2 h 1 min"),
    ],
)
def test_seconds_in_words(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text
