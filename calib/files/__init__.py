"""Files: those of others, read bounded and typed, and manifests that show what was altered."""

from __future__ import annotations

__all__: list[str] = []
