"""What layouts have in common."""

from __future__ import annotations

import pytest
import torch

from backends.safetensors.differences import differences, grouped
from backends.safetensors.layout import Entry, in_parts


def test_an_entry_knows_its_bytes_before_it_is_read() -> None:
    entry = Entry("a", "other", torch.bfloat16, (3, 5), lambda: torch.zeros(0))
    assert entry.nbytes == 30
    assert Entry("a", "other", torch.float32, (), lambda: torch.zeros(0)).nbytes == 4
    assert Entry("a", "other", torch.float32, (0, 7), lambda: torch.zeros(0)).nbytes == 0


@pytest.mark.parametrize("at_once", [1, 7, 64, 10**6])
def test_parts_make_the_whole(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("backends.safetensors.layout._VALUES_AT_ONCE", at_once)
    weight = torch.arange(10 * 6).reshape(10, 6)
    lengths = []

    def rows(part: slice) -> torch.Tensor:
        lengths.append(part.stop - part.start)
        return weight[part] + 1

    assert torch.equal(in_parts(10, (10, 6), torch.int64, rows), weight + 1)
    assert sum(lengths) == 10
    assert max(lengths) == min(10, max(1, at_once // 6))
    transposed = in_parts(10, (6, 10), torch.int64, lambda part: weight[part].T, axis=1)
    assert torch.equal(transposed, weight.T)
    assert transposed.is_contiguous()
    pairs = in_parts(10, (10, 3), torch.int64, lambda part: weight[part, ::2])
    assert torch.equal(pairs, weight[:, ::2])
    flat = in_parts(10, (60,), torch.int64, lambda part: weight[part].flatten())
    assert torch.equal(flat, weight.flatten())


def test_keys_of_equal_layers_are_named_together() -> None:
    keys = [f"h.{layer}.a.weight" for layer in (0, 1, 2, 5)] + [
        "h.7.b",
        "norm",
        "x.10.y.3",
        "x.10.y.4",
        "r2d2.weight",
    ]
    assert grouped(keys) == [
        "h.7.b",
        "h.{0-2,5}.a.weight",
        "norm",
        "r2d2.weight",
        "x.10.y.3",
        "x.10.y.4",
    ]


def test_differences_come_in_an_order_that_does_not_change() -> None:
    found = {"a": (torch.int8, [2]), "b": (torch.int8, [2]), "extra": (torch.int8, [])}
    wanted = {
        "a": (torch.int8, [3]),
        "b": (torch.float32, (2, 1)),
        "z": (torch.int8, [1]),
        "c": (torch.int8, [1]),
    }
    assert (
        differences(found, wanted)
        == "missing: c, z; unexpected: extra; dtype int8 instead of float32 and rank 1 [2] instead"
        " of 2 [2, 1]: b; shape [2] instead of [3]: a"
    )
    assert differences(found, found) == ""
