"""What the census prints."""

from __future__ import annotations

from tests.census.measure import SCHEMES, WAYS, Row


def line(row: Row) -> str:
    """One type."""
    if not row.errors:
        return f"{row.name:24} {row.how:8} {row.reason}"
    errors = "  ".join(
        " ".join(f"{row.errors[scheme][way]:.1e}" for way in WAYS) for scheme in SCHEMES
    )
    kept = sorted(set(row.kept.values()))
    return f"{row.name:24} {row.how:8} {errors}  {'; '.join(kept)}".rstrip()
