"""The table of supported model families, generated from the architecture table.

``python -m exporter.tables.support_table`` writes it into ``README.md`` between its markers; a test
fails while they differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

from calib.architectures import KINDS, Architecture
from calib.architectures.table import ARCHITECTURES
from calib.errors import OutputError

BEGIN, END = "<!-- support table -->", "<!-- end of support table -->"

_OFFERED = {"r1": "folded", "r2": "folded", "r3": "online", "r4": "online"}


_GENERIC = (
    "other decoders",
    "",
    "generic",
    *("no" for _ in KINDS),
    "every decoder of text that transformers has and that keeps keys and values: linears are found"
    " in the module tree, nothing is folded, ONNX only; see [docs/families.md](docs/families.md)",
)
"""The row of all families that are not in the table."""


def support_table() -> str:
    """One Markdown row for each family: its model types, what becomes of each rotation, and what it
    refuses.
    """
    header = ("family", "model types", "how", *(kind.upper() for kind in KINDS), "note")
    rows = [header, ("---",) * len(header), *map(_row, ARCHITECTURES), _GENERIC]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(text: str) -> str:
    """``text`` with the table between the markers; without an end marker, right after the first
    one.

    Raises:
        OutputError: ``text`` has no marker.
    """
    before, begin, rest = text.partition(BEGIN)
    if not begin:
        raise OutputError(f"there is no line '{BEGIN}'", hint="add it where the table shall be")
    after = rest.partition(END)[2] if END in rest else rest
    return f"{before}{BEGIN}\n\n{support_table()}\n\n{END}{after}"


def _row(entry: Architecture) -> tuple[str, ...]:
    kinds = ("no" if kind in entry.rotations_refused else _OFFERED[kind] for kind in KINDS)
    return (
        entry.name,
        ", ".join(f"`{name}`" for name in entry.model_types),
        entry.how,
        *kinds,
        "; ".join(_notes(entry)),
    )


def _notes(entry: Architecture) -> list[str]:
    notes = [
        f"{kind.upper()} is refused: {reason}" for kind, reason in entry.rotations_refused.items()
    ]
    if entry.norm_kind == "layer":
        notes.append("LayerNorm: R1 fixes the all-ones vector")
    if entry.experts is not None:
        notes.append("every expert has scales of its own; the router stays in float")
    notes += [f"a model is refused if {refusal.reason}" for refusal in entry.refusals]
    return notes


def _main(path: Path) -> None:
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    _main(Path(sys.argv[1] if len(sys.argv) > 1 else "README.md"))
