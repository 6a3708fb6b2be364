"""Dotted paths to modules."""

from __future__ import annotations

import pytest
from torch import nn

from calib.errors import CheckpointError
from calib.modules.paths import get_submodule, set_submodule


@pytest.fixture
def tree() -> nn.Module:
    root = nn.Module()
    root.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Linear(3, 4)])
    root.by_name = nn.ModuleDict({"first": nn.Linear(4, 5)})
    root.scale = 3
    return root


def test_paths_through_lists_dictionaries_and_attributes(tree: nn.Module) -> None:
    assert get_submodule(tree, "") is tree
    assert get_submodule(tree, "blocks.0.0") is tree.blocks[0][0]
    assert get_submodule(tree, "blocks.-1") is tree.blocks[1]
    assert get_submodule(tree, "by_name.first") is tree.by_name["first"]


@pytest.mark.parametrize(
    ("path", "message", "hint"),
    [
        ("blocks.2", "'blocks' has no submodule '2'", "0, 1"),
        ("blocks.x", "'blocks' has no submodule 'x'", "0, 1"),
        (
            "blocks.0.0.bias",
            r"'blocks.0.0' has no submodule 'bias' \(wanted 'blocks.0.0.bias'\)",
            "none",
        ),
        ("by_name.values", "'by_name' has no submodule 'values'", "first"),
        ("scale", "'Module' has no submodule 'scale'", "blocks, by_name"),
        ("no.such", "'Module' has no submodule 'no'", "blocks, by_name"),
    ],
)
def test_a_missing_part_is_named_with_what_exists(
    tree: nn.Module, path: str, message: str, hint: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        get_submodule(tree, path)
    assert caught.value.hint == f"its submodules are: {hint}"


@pytest.mark.parametrize("path", ["blocks.0.0", "blocks.1", "by_name.first", "new"])
def test_set_replaces_what_get_finds(tree: nn.Module, path: str) -> None:
    replacement = nn.Identity()
    set_submodule(tree, path, replacement)
    assert get_submodule(tree, path) is replacement
    assert replacement in list(tree.modules())


def test_set_below_a_missing_parent_is_refused(tree: nn.Module) -> None:
    with pytest.raises(CheckpointError, match="no submodule 'absent'"):
        set_submodule(tree, "absent.leaf", nn.Identity())
