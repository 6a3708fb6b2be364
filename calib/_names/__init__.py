"""Names of packages: what is public of them, and what older paths lead to."""

from __future__ import annotations

__all__: list[str] = []
