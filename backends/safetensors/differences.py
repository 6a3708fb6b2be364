"""In what two sets of tensors differ, all of it in one line that a person can read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from backends.safetensors.manifest import dtype_name

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def differences(
    actual: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    expected: Mapping[str, tuple[torch.dtype, Sequence[int]]],
) -> str:
    """What ``actual`` lacks, has too much or has in another dtype, rank or shape than ``expected``;
    empty if nothing.

    Keys that differ in one number alone, as those of equal layers do, are named together:
    ``h.{0-11}.ln_1.weight``.
    """
    problems: dict[str, list[str]] = {}
    for key in expected.keys() - actual.keys():
        problems.setdefault("missing", []).append(key)
    for key in actual.keys() - expected.keys():
        problems.setdefault("unexpected", []).append(key)

    for key in actual.keys() & expected.keys():
        (dtype, shape), (expected_dtype, expected_shape) = actual[key], expected[key]
        complaints = []
        if dtype != expected_dtype:
            complaints.append(f"dtype {dtype_name(dtype)} instead of {dtype_name(expected_dtype)}")
        if len(shape) != len(expected_shape):
            complaints.append(
                f"rank {len(shape)} {list(shape)} instead of {len(expected_shape)}"
                f" {list(expected_shape)}"
            )
        elif list(shape) != list(expected_shape):
            complaints.append(f"shape {list(shape)} instead of {list(expected_shape)}")
        if complaints:
            problems.setdefault(" and ".join(complaints), []).append(key)

    # what is missing or too much explains the rest, so it comes first
    order = sorted(problems, key=lambda what: (what not in ("missing", "unexpected"), what))
    return "; ".join(f"{what}: {', '.join(grouped(problems[what]))}" for what in order)


def grouped(keys: Iterable[str]) -> list[str]:
    """``keys`` with those that differ in their first number alone put together, sorted."""
    members: dict[tuple[str, str], list[int]] = {}

    single = []
    for key in keys:
        match = _NUMBER.search(key)
        if match is None:
            single.append(key)
        else:
            members.setdefault((key[: match.start()], key[match.end() :]), []).append(int(match[0]))

    return sorted(
        [
            *single,
            *(f"{before}{_ranges(numbers)}{after}" for (before, after), numbers in members.items()),
        ]
    )


def _ranges(numbers: Iterable[int]) -> str:
    """``3`` for one number, ``{0-2,5}`` for several."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    return texts[0] if len(texts) == 1 and "-" not in texts[0] else f"{{{','.join(texts)}}}"
