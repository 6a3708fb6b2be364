"""Output folders: they appear complete or not at all, belong to one process while they are made,
and are replaced only where they hold nothing but what rotq wrote.

``claim`` puts it together; ``lock`` says who is at work, ``listing`` what rotq wrote, ``swap`` puts
one folder in another's place, ``strays`` tells what nobody put there, ``failures`` knows a full
disk, ``whole`` replaces single files.
"""

from __future__ import annotations

from exporter.output.claim import (
    Claim,
    atomic_folder,
    check_free,
    check_target,
    claimed,
    is_in,
    sweep,
)
from exporter.output.failures import why_not_written
from exporter.output.listing import LIST_FILE, entries, sha256_tree, unlisted, write_list
from exporter.output.lock import HOLDER_FILE, LOCK_FILE, locked, making
from exporter.output.strays import is_disposable, is_hidden
from exporter.output.whole import is_partial, replace_text

__all__ = [
    "HOLDER_FILE",
    "LIST_FILE",
    "LOCK_FILE",
    "Claim",
    "atomic_folder",
    "check_free",
    "check_target",
    "claimed",
    "entries",
    "is_disposable",
    "is_hidden",
    "is_in",
    "is_partial",
    "locked",
    "making",
    "replace_text",
    "sha256_tree",
    "sweep",
    "unlisted",
    "why_not_written",
    "write_list",
]
