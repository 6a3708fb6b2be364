"""What a run has around it: torch as nobody set it, freed memory, who is told how far it is."""

from __future__ import annotations

__all__: list[str] = []
