"""Opens a page in a browser without a screen, and prints what it finds: ``python browser.py PAGE
PICTURE WIDTH``. A process of its own, for Qt ends when it likes.
"""

from __future__ import annotations

import json
import sys

from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineCore import QWebEnginePage
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

ASK = """[document.documentElement.scrollWidth, window.innerWidth,
 document.documentElement.scrollHeight, document.querySelectorAll('svg').length,
 performance.getEntriesByType('resource').length, getComputedStyle(document.body).color,
 getComputedStyle(document.querySelector('svg text')).fill,
 Math.min(...[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().height))]"""
TALLEST = 8000
"""Pixels that a picture is made of at most."""


class Page(QWebEnginePage):
    """Takes note of what the browser complains of."""

    complaints: list[str]

    def javaScriptConsoleMessage(self, level: object, message: str, line: int, source: str) -> None:
        self.complaints.append(message)


def main(path: str, picture: str, width: int) -> None:
    """Load, ask, take the picture."""
    application = QApplication(sys.argv[:1])
    view, page = QWebEngineView(), Page()
    page.complaints = []
    view.setPage(page)
    view.resize(width, 900)

    def answered(found: list[object]) -> None:
        sys.stdout.write(json.dumps({"found": found, "complaints": page.complaints}) + "\n")
        sys.stdout.flush()
        view.resize(width, min(int(str(found[2])), TALLEST))
        QTimer.singleShot(1000, taken)

    def taken() -> None:
        view.grab().save(picture)
        application.quit()

    page.loadFinished.connect(lambda whole: page.runJavaScript(ASK, answered))
    QTimer.singleShot(100_000, application.quit)
    view.show()
    view.load(QUrl.fromLocalFile(path))
    application.exec()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
