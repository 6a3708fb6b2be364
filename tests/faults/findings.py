"""What the faults found, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

_Point = TypeVar("_Point")


@dataclass
class Table:
    """Counts by group, and everything that went wrong."""

    good: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By group and outcome."""
    wrong: list[tuple[str, str, str]] = field(default_factory=list)
    """Group, fault, and what is wrong."""

    def add(self, group: str, fault: str, wrong: str, outcome: str = "good") -> None:
        """One fault; ``wrong`` is empty where nothing is."""
        if wrong:
            self.wrong.append((group, fault, wrong))
            print(f"WRONG {group}: {fault}: {wrong}", flush=True)
        else:
            self.good[group, outcome] += 1

    def take(self, other: Table) -> None:
        """What another table holds as well."""
        self.good += other.good
        self.wrong += other.wrong

    def count(self, kind: str = "") -> int:
        """How many there were, of the groups whose name begins with ``kind``."""
        good = sum(count for (group, _), count in self.good.items() if group.startswith(kind))
        return good + sum(group.startswith(kind) for group, *_ in self.wrong)

    def lines(self) -> list[str]:
        """The table."""
        groups = list(
            dict.fromkeys([group for group, _ in self.good] + [g for g, *_ in self.wrong])
        )
        wrong = Counter(group for group, *_ in self.wrong)
        rows = []
        for group in groups:
            words = ", ".join(
                f"{count} {outcome}"
                for (own, outcome), count in sorted(self.good.items())
                if own == group
            )
            rows.append(f"{group:<44} {words or '0 good'}, {wrong[group]} wrong")
        return [*rows, f"{'all':<44} {self.count()} faults, {len(self.wrong)} wrong"]


def evenly(points: Sequence[_Point], most: int | None) -> list[_Point]:
    """At most ``most`` of ``points``, the first and the last among them; the middle one of one."""
    if most is None or len(points) <= most:
        return list(points)
    if most == 1:
        return [points[len(points) // 2]]
    step = (len(points) - 1) / max(1, most - 1)
    return [points[round(index * step)] for index in range(most)]
