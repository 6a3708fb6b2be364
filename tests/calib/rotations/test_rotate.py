"""``--rotate`` as a value: its text, and what each run makes of ``auto``."""

from __future__ import annotations

import pytest

from calib.architectures import KINDS
from calib.rotations.rotate import AUTO, NO_ROTATION, Rotate, gate_sets, trainable, union


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("auto", "auto"), ("none", "none"), ("R4, r1", "r1,r4"), ("r2", "r2"), (" AUTO ", "auto")],
)
def test_text_and_value_are_the_same_thing(text: str, canonical: str) -> None:
    rotate = Rotate.parse(text)
    assert str(rotate) == canonical
    assert Rotate.parse(str(rotate)) == rotate
    assert Rotate.of(rotate.certain) == (NO_ROTATION if rotate.auto else rotate)


@pytest.mark.parametrize("text", ["", "r1,r1", "r5", "r1,", "auto,r1", "none,r1"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected 'auto', 'none' or distinct names"):
        Rotate.parse(text)


def words(sets: tuple[object, ...]) -> list[str]:
    return [str(each) for each in sets]


def test_auto_compares_what_is_offered_and_nothing_twice() -> None:
    assert words(AUTO.sets(KINDS)) == ["none", "r1,r2", "r1,r2,r4"]
    assert words(AUTO.sets(["r2", "r4"])) == ["none", "r2", "r2,r4"]
    assert words(AUTO.sets(["r1", "r2"])) == ["none", "r1,r2"]
    assert words(AUTO.sets([])) == ["none"]
    assert words(AUTO.sets(KINDS, quantizes=False)) == ["none"]


def test_a_set_that_was_named_is_the_only_one_whatever_is_offered() -> None:
    named = Rotate.of(["r3", "r1"])
    assert named.sets([]) == (named,)
    assert named.sets(KINDS, quantizes=False) == (named,)
    assert named.folded([]) == named
    assert named.certain == ("r1", "r3")
    assert AUTO.certain == ()


def test_auto_folds_r1_and_r2_as_far_as_they_are_offered() -> None:
    assert str(AUTO.folded(KINDS)) == "r1,r2"
    assert str(AUTO.folded(["r2", "r4"])) == "r2"
    assert str(AUTO.folded([])) == "none"


def test_the_gate_adds_the_largest_set_without_training_where_there_is_a_choice() -> None:
    sets = AUTO.sets(KINDS)
    assert words(gate_sets(sets)) == ["none", "r1,r2", "r1,r2,r4", "r1,r2,r4, Hadamard"]
    assert gate_sets(sets)[-1].plain == ("r1", "r2")
    assert gate_sets(sets, imported=["r1"])[-1].plain == ("r2",)
    assert words(gate_sets(sets, imported=["r1", "r2"])) == ["none", "r1,r2", "r1,r2,r4"]
    assert words(gate_sets(Rotate.of(["r1"]).sets(KINDS))) == ["r1"]
    assert [each.trained for each in gate_sets(sets)] == [False, True, True, False]
    # a matrix from a file is no simpler than one that was trained here
    assert gate_sets(sets, imported=["r1"])[-1].trained
    assert not gate_sets([Rotate.of(["r4"])])[0].trained


def test_kinds_are_in_order_and_r3_and_r4_are_never_trained() -> None:
    assert union([Rotate.of(["r4"]), Rotate.of(["r1"]), NO_ROTATION]) == ("r1", "r4")
    assert trainable(KINDS) == ("r1", "r2")
    assert trainable(["r4", "r2"], imported=["r2"]) == ()
