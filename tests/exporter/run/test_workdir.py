"""Work folders: what may be another setting in a resume, and what may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calib.errors import OutputError
from exporter.recipe import Recipe, load_recipe
from exporter.run.workdir import WorkDir

STARTED: dict[str, Any] = {"overrides": {"*.0.*": "float", "*.up_proj": "w4a8"}}


def resume(folder: Path, **changes: Any) -> None:
    WorkDir(folder, load_recipe(None, STARTED), resume=False)
    WorkDir(folder, load_recipe(None, {**STARTED, **changes}), resume=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"backend": "safetensors"},
        {"target": ["ort", "openvino"]},
        {"logits": "last"},
        {"kv_buffer": "shared"},
        {"max_shard_size": "1GB"},
        {"layerwise.max_memory": "1GB"},
    ],
    ids=str,
)
def test_what_no_kept_step_depends_on_may_change(changes: dict[str, Any], tmp_path: Path) -> None:
    resume(tmp_path / "work", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": {}}, r"overrides was {'\*\.0\.\*': float"),
        ({"overrides": {**STARTED["overrides"], "*.1.*": "float"}}, r"and is now .*'\*\.1\.\*'"),
        (
            {"overrides": dict(reversed(STARTED["overrides"].items()))},
            r"is now {'\*\.up_proj': w4a8, '\*\.0\.\*': float}",  # the last match counts
        ),
        ({"rotate": "r1,r2"}, "rotate was auto and is now r1,r2"),
        ({"revision": "abc"}, "revision was null and is now abc"),
        ({"device": "cpu"}, "device was auto and is now cpu"),
        ({"seed": 3, "scheme": "w4a8"}, r"scheme was int8 and is now w4a8 \(and 1 more: seed\)"),
        ({"layerwise.enabled": True}, "layerwise.enabled was false and is now true"),
        ({"evaluation.dataset": "a.txt"}, "evaluation.dataset was null and is now a.txt"),
        ({"evaluation.column": "title"}, "evaluation.column was null and is now title"),
        ({"evaluation.nsamples": 3}, "evaluation.nsamples was 32 and is now 3"),
        ({"rotation.files": ["a"]}, r"rotation.files was \[\] and is now \[a\]"),
    ],
    ids=str,
)
def test_what_a_kept_step_depends_on_may_not(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=message):
        resume(tmp_path / "work", **changes)


def test_a_pattern_added_to_none_is_noticed_too(tmp_path: Path) -> None:
    WorkDir(tmp_path / "work", Recipe(), resume=False)
    added = load_recipe(None, {"overrides": {"*": "float"}})
    with pytest.raises(OutputError, match=r"overrides was {} and is now {'\*': float}"):
        WorkDir(tmp_path / "work", added, resume=True)


@pytest.mark.parametrize("name", ["thesis.tex", "layerwise", "artifact"])
def test_a_folder_of_somebody_else_is_no_work_folder(tmp_path: Path, name: str) -> None:
    """Steps would be read from it, and removed."""
    (tmp_path / "work" / name).mkdir(parents=True)
    for resumed in (True, False):
        with pytest.raises(OutputError, match=f"holds no run of rotq, but {name}"):
            WorkDir(tmp_path / "work", Recipe(), resume=resumed)
    assert [path.name for path in (tmp_path / "work").iterdir()] == [name]


@pytest.mark.parametrize("text", ["", "scheme: [", "scheem: int8", "- 1"])
def test_a_damaged_recipe_is_one_line(tmp_path: Path, text: str) -> None:
    WorkDir(tmp_path / "work", Recipe(), resume=False)
    (tmp_path / "work" / "rotq.yaml").write_text(text)
    with pytest.raises(OutputError, match=r"its rotq\.yaml is damaged: ") as caught:
        WorkDir(tmp_path / "work", Recipe(), resume=True)
    assert "another --work-dir" in str(caught.value.hint)


def test_a_kill_leaves_no_half_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            WorkDir(tmp_path / "work", Recipe(), resume=False)
    assert [path.suffix for path in (tmp_path / "work").iterdir()] == [".partial"]
    WorkDir(tmp_path / "work", Recipe(), resume=True)
