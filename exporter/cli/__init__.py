"""The ``rotq`` command. Importing it is cheap: whatever a command needs is imported when that
command runs.
"""

from __future__ import annotations

from exporter.cli.app import main

__all__ = ["main"]
