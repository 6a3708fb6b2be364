"""Progress as bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


class Bars:
    """A bar for each stage, as notebooks and terminals have them."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: tqdm[object] | None = None

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Report that ``done`` of ``total`` units of ``stage`` are finished."""
        from tqdm.auto import tqdm as bar

        # a stage whose end nobody knew, or that ended early, ends where another one begins
        if self._bar is not None and (stage != self._stage or done < self._bar.n):
            self._close()
        if self._bar is None:
            self._stage, self._bar = stage, bar(desc=stage, total=total)
        self._bar.update(done - self._bar.n)
        if total is not None and done >= total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
