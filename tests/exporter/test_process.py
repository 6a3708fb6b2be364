"""How many threads a process gets: its cores, a container's quota, or what somebody says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import exporter.process as process
from exporter.process import cgroup_quota, settle, usable_cores


def group(root: Path, path: str, **files: str) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def own(root: Path, text: str) -> Path:
    path = root / "own"
    path.write_text(text)
    return path


def test_the_least_quota_of_a_group_and_those_above_it(tmp_path: Path) -> None:
    group(tmp_path, "", cpu__max="max 100000\n")
    group(tmp_path, "a", cpu__max="150000 100000\n")
    group(tmp_path, "a/b", cpu__max="400000 100000\n")
    assert cgroup_quota(tmp_path, own(tmp_path, "0::/a/b\n")) == 1.5
    assert cgroup_quota(tmp_path, own(tmp_path, "0::/\n")) is None
    # in a container the path is the host's, and the root the container's own group
    group(tmp_path, "", cpu__max="50000 100000\n")
    assert cgroup_quota(tmp_path, own(tmp_path, "0::/docker/0123\n")) == 0.5


@pytest.mark.parametrize(
    "lines", ["\n", "no colons\n", "0::/a\fb\n", "0::/a\0b\n", "0::/\udcff\n"], ids=repr
)
def test_an_odd_name_is_no_error(lines: str, tmp_path: Path) -> None:
    path = tmp_path / "own"
    path.write_bytes(os.fsencode(lines))
    assert cgroup_quota(tmp_path, path) is None


def test_an_odd_quota_is_none(tmp_path: Path) -> None:
    for content in (b"\xff\xfe", b"9" * 4000 + b" 1", b"one two"):
        (tmp_path / "cpu.max").write_bytes(content)
        assert cgroup_quota(tmp_path, own(tmp_path, "0::/\n")) is None


def test_version_1(tmp_path: Path) -> None:
    group(tmp_path, "cpu/a", cpu__cfs_quota_us="300000\n", cpu__cfs_period_us="100000\n")
    group(tmp_path, "cpu", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    lines = "4:memory:/a\n3:cpu,cpuacct:/a\n"
    assert cgroup_quota(tmp_path, own(tmp_path, lines)) == 3.0
    assert cgroup_quota(tmp_path, own(tmp_path, "3:cpu,cpuacct:/\n")) is None
    assert cgroup_quota(tmp_path, tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("quota", "cores"), [(None, 8), (64.0, 8), (4.0, 4), (1.5, 2), (0.2, 1), (2.4, 2)]
)
def test_cores_that_may_be_used_up(
    quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "runnable_cores", lambda: 8)
    monkeypatch.setattr(process, "cgroup_quota", lambda: quota)
    assert usable_cores() == cores


def test_what_is_said_wins_over_the_environment_and_that_over_the_quota(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "runnable_cores", lambda: 8)
    monkeypatch.setattr(process, "cgroup_quota", lambda: 4.0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    settle()
    assert os.environ["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    settle()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    settle(2)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(process, "cgroup_quota", lambda: None)
    settle()
    assert "OMP_NUM_THREADS" not in os.environ


def test_how_threads_wait_is_bounded_unless_somebody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is restored
        monkeypatch.delenv("GOMP_SPINCOUNT")
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        settle(1)
        assert os.environ["GOMP_SPINCOUNT"] == str(process.SPINS)
        monkeypatch.delenv("GOMP_SPINCOUNT")
        monkeypatch.setenv(name, "7" if name == "GOMP_SPINCOUNT" else "active")
        settle(1)
        assert os.environ.get("GOMP_SPINCOUNT") == ("7" if name == "GOMP_SPINCOUNT" else None)
