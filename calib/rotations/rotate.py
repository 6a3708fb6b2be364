"""What ``--rotate`` says: ``auto``, or a set of kinds of rotations. Imports no torch.

``auto`` leaves the kinds to the run, and what each run makes of it is said here and nowhere else:

=====================  =========================================================================
a run that             takes, of what the architecture and the targets offer
=====================  =========================================================================
quantizes              the best of :data:`COMPARED`, by the whole model (:func:`gate_sets`)
only measures (stats)  the largest of these sets
folds (rotate)         :data:`FOLDED`, which is all that a stock folder can hold
captures               the sites of :data:`FOLDED`; no kind is asked for
=====================  =========================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from calib.architectures.spec import KINDS, Kind

FOLDED: tuple[Kind, ...] = ("r1", "r2")
"""Rotations that are matrices, folded into weights: what can be trained, and needs no model code.
"""
COMPARED: tuple[tuple[Kind, ...], ...] = ((), ("r1", "r2"), ("r1", "r2", "r4"))
"""The sets that ``auto`` compares, the simplest first."""
_AUTO, _NONE = "auto", "none"


@dataclass(frozen=True)
class Rotate:
    """Which kinds of rotations a run is to have; ``str()`` is what ``--rotate`` takes."""

    kinds: tuple[Kind, ...] | None
    """In the order r1, r2, r3, r4; ``None``: ``auto``."""

    def __str__(self) -> str:
        if self.kinds is None:
            return _AUTO
        return ",".join(self.kinds) or _NONE

    @classmethod
    def of(cls, kinds: Collection[str]) -> Rotate:
        """The set of these kinds, in whatever order they come."""
        return cls(tuple(kind for kind in KINDS if kind in kinds))

    @classmethod
    def parse(cls, text: str) -> Rotate:
        """What ``str()`` gives, read again; blanks, case and order do not matter.

        Raises:
            ValueError: it is neither ``auto``, ``none`` nor a list of distinct kinds.
        """
        text = text.lower().replace(" ", "")
        if text == _AUTO:
            return AUTO
        names = [] if text == _NONE else text.split(",")
        if len(set(names)) != len(names) or not set(names) <= set(KINDS):
            raise ValueError(
                f"expected 'auto', 'none' or distinct names out of {', '.join(KINDS)}; got '{text}'"
            )
        return cls.of(names)

    @property
    def auto(self) -> bool:
        """Whether the kinds are left to the run."""
        return self.kinds is None

    @property
    def online(self) -> bool:
        """Whether one of the kinds is computed at run time."""
        return bool(set(self.certain) - set(FOLDED))

    @property
    def certain(self) -> tuple[Kind, ...]:
        """The kinds that the result has whatever is measured: none with ``auto``."""
        return self.kinds or ()

    def sets(self, offered: Collection[str], *, quantizes: bool = True) -> tuple[Rotate, ...]:
        """The sets that a run which quantizes decides between; one where it was told which.

        Args:
            offered: kinds that the architecture and every target take.
            quantizes: whether anything is quantized. Where nothing is, there is nothing to compare:
                rotations leave what a float model computes as it is.
        """
        if not self.auto:
            return (self,)
        compared = COMPARED if quantizes else ((),)
        possible = (Rotate.of(set(kinds) & set(offered)) for kinds in compared)
        return tuple(dict.fromkeys(possible))

    def folded(self, offered: Collection[str]) -> Rotate:
        """The set that a run which only folds has.

        Args:
            offered: kinds that the architecture takes.
        """
        return Rotate.of(set(FOLDED) & set(offered)) if self.auto else self


AUTO, NO_ROTATION = Rotate(None), Rotate(())


@dataclass(frozen=True)
class GateSet:
    """One of the sets that the whole model decides between; ``str()`` is what the report calls it.

    Beside the sets of :meth:`Rotate.sets` there is the largest one with random Hadamard matrices in
    place of what was trained: the error that training lowers is that of one linear, and what the
    network makes of it may differ.
    """

    rotate: Rotate
    plain: tuple[Kind, ...] = ()
    """Kinds that are random Hadamard matrices here, and trained in the other sets."""

    def __str__(self) -> str:
        return f"{self.rotate}, Hadamard" if self.plain else str(self.rotate)

    @property
    def trained(self) -> bool:
        """Whether one of its rotations is a matrix that was trained, here or by the maker of a
        file.
        """
        return any(kind in FOLDED and kind not in self.plain for kind in self.rotate.certain)


def gate_sets(sets: Sequence[Rotate], imported: Collection[str] = ()) -> tuple[GateSet, ...]:
    """What a run puts through the gate; one set needs no gate.

    Args:
        sets: of :meth:`Rotate.sets`.
        imported: kinds whose rotations come from files.
    """
    plain = trainable(sets[-1].certain, imported)
    hadamard = (GateSet(sets[-1], plain),) if len(sets) > 1 and plain else ()
    return (*map(GateSet, sets), *hadamard)


def union(sets: Sequence[Rotate]) -> tuple[Kind, ...]:
    """Every kind that one of ``sets`` has, in order."""
    return Rotate.of({kind for rotate in sets for kind in rotate.certain}).certain


def trainable(kinds: Collection[str], imported: Collection[str] = ()) -> tuple[Kind, ...]:
    """Those of ``kinds`` that are trained where they do not come from files.

    Args:
        kinds: any of r1, r2, r3, r4.
        imported: kinds whose rotations come from files.
    """
    return tuple(kind for kind in FOLDED if kind in kinds and kind not in imported)
