"""A process that is killed at a file operation leaves the old output or the new one, and the next
run succeeds and leaves nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tests.faults.cases import CASES, Case, Content, Stage, content, leftovers, unsound
from tests.faults.children import Ended, counted, rotq
from tests.faults.findings import Table, evenly
from tests.faults.operations import Fault, Operations

_SIZES = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18)
"""Of the files in the middle of which native code is killed, at least."""


class Trial:
    """One command, and what its folders hold before it and after it."""

    def __init__(self, case: Case, stage: Stage, folder: Path) -> None:
        self.case, self._stage, self.folder = case, stage, folder
        arguments = case.prepare(stage, folder)
        self.old = content(self._output)
        self.operations = counted(arguments, folder)
        self.new = content(self._output)
        self.whole = self._others()
        self._check_repeatable()

    def struck(self, run: Callable[[list[object]], Ended]) -> Ended:
        """``run`` the command anew, from where it begins."""
        return run(self.prepared())

    def prepared(self) -> list[object]:
        """The command, whose folder is as it finds it."""
        return list(self.case.prepare(self._stage, self.folder))

    def half(self) -> str:
        """What is wrong with the output after a fault, in words; empty: it is old or new."""
        try:
            now = content(self._output)
            wrong = list(unsound(self._output))
        except Exception as error:
            return f"unreadable: {error}"
        if now not in (self.old, self.new):
            return f"neither old nor new: {_difference(now, self.new)}"
        return "; ".join(wrong)

    def next_run(self) -> str:
        """Run the command again; what is wrong then, in words."""
        ended = rotq(self.case.next_run(self._stage, self.folder))
        if ended.code != 0:
            return f"the next run ended with {ended.code}: {ended.said[-300:]}"
        wrong = list(unsound(self._output))
        now = content(self._output)
        if now != self.new:
            wrong.append(f"another result: {_difference(now, self.new)}")
        if self._others() != self.whole:
            wrong.append(f"left beside it: {_difference(self._others(), self.whole)}")
        wrong += [f"left: {name}" for name in leftovers(self.folder)]
        return "; ".join(wrong)

    @property
    def _output(self) -> Path:
        return self.folder / self.case.output

    def _others(self) -> Content:
        found = {path.name: "" for path in self.folder.iterdir()}
        for name in found.keys() - {self.case.output}:
            found |= {f"{name}/{each}": "" for each in content(self.folder / name) or {}}
        return found

    def _check_repeatable(self) -> None:
        wrong = self.half() or self.next_run()
        if wrong:
            raise RuntimeError(f"{self.case.name} without any fault: {wrong}")


def kills(
    stage: Stage,
    folder: Path,
    table: Table,
    *,
    most: int | None = None,
    cases: Iterable[Case] = CASES,
) -> None:
    """Kill each of ``cases`` everywhere, or at ``most`` points of each kind."""
    for case in cases:
        trial = Trial(case, stage, folder)
        for what, run in _strikes(trial, most):
            ended = trial.struck(run)
            if not ended.killed:
                continue
            wrong = trial.half()
            later = trial.next_run()
            table.add(f"kill -9: {case.name}", what, wrong or later)


def _strikes(
    trial: Trial, most: int | None
) -> Iterator[tuple[str, Callable[[list[object]], Ended]]]:
    names = trial.operations
    numbers = range(1, len(names) + 1)
    opens = [number for number in numbers if names[number - 1].startswith("open ")]
    for fault, points in ((Fault.KILLED_BEFORE, numbers), (Fault.KILLED_WITHIN, opens)):
        for number in evenly(points, most):
            what = f"{fault.value} {number} ({names[number - 1]})"
            operations = Operations(trial.folder, number, fault)
            yield what, lambda arguments, own=operations: rotq(arguments, own)
    for size in evenly(_SIZES, most):
        yield (
            f"killed while a file grew beyond {size} bytes",
            lambda arguments, own=size: rotq(arguments, most_bytes=own, dies=True),
        )


def _difference(now: Content | None, expected: Content | None) -> str:
    if now is None or expected is None:
        return "it is not there" if now is None else "it is there"
    names = now.keys() | expected.keys()
    return ", ".join(sorted(name for name in names if now.get(name) != expected.get(name)))
