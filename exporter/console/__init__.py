"""What a person sees in a terminal: settings before a run, bars during it, the summary after it."""

from __future__ import annotations

from exporter.console.progress import ConsoleProgress
from exporter.console.show import (
    show_environment,
    show_evaluation,
    show_evaluations,
    show_plan,
    show_report,
    show_rotated,
    show_settings,
)
from exporter.console.show_backends import show_backends
from exporter.console.streams import error_console, output_console

__all__ = [
    "ConsoleProgress",
    "error_console",
    "output_console",
    "show_backends",
    "show_environment",
    "show_evaluation",
    "show_evaluations",
    "show_plan",
    "show_report",
    "show_rotated",
    "show_settings",
]
