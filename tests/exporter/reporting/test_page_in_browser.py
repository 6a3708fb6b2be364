"""The page of a report in Chromium, as wide as a desk and as a phone, by day and by night. The
pictures are kept in pytest's folder for whoever wants to look.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_web_page import drawn, full_report

pytestmark = [
    pytest.mark.runtimes,
    pytest.mark.skipif(find_spec("PyQt6") is None, reason="PyQt6-WebEngine is not installed"),
]
FLAGS = "--no-sandbox --disable-gpu"
NIGHT = " --blink-settings=preferredColorScheme=0"
LEAST_DRAWN = 80
"""Pixels of height of a chart that is there."""


@pytest.mark.parametrize("night", [False, True], ids=["day", "night"])
@pytest.mark.parametrize("width", [400, 1000])
def test_the_page_fits_and_is_drawn(width: int, night: bool, tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(drawn(full_report()), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("browser.py")), page, picture, str(width)],
        env={
            **os.environ,
            "QT_QPA_PLATFORM": "offscreen",
            "QTWEBENGINE_DISABLE_SANDBOX": "1",
            "QTWEBENGINE_CHROMIUM_FLAGS": FLAGS + NIGHT * night,
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    if "cannot open shared object file" in done.stderr:
        pytest.skip(f"the browser cannot be loaded: {done.stderr.strip().splitlines()[-1]}")
    answer = json.loads(done.stdout)
    wide, window, _, charts, fetched, ink, label, lowest = answer["found"]
    assert answer["complaints"] == []
    assert wide <= window  # nothing sticks out
    assert charts == 9
    assert lowest > LEAST_DRAWN
    assert fetched == 0  # nothing was asked of anywhere
    assert ink == label == ("rgb(255, 255, 255)" if night else "rgb(0, 0, 0)")
    assert picture.stat().st_size > 10_000
