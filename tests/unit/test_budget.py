"""The budget check says, before the first save, what does not fit and what to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import pytest

from sm_tiered.errors import ConfigError, TierFullError, TierUnavailableError
from sm_tiered.tiers.budget import cgroup_room, check_budget

MIB = 1024 * 1024


class Tree(TypedDict):
    """Where the cgroups are."""

    cgroup_root: str
    cgroup_file: str


@pytest.fixture
def small(make_tmpfs: Callable[[str, int], Path]) -> Path:
    """A tmpfs of 4 MiB."""
    return make_tmpfs("small", 4)


@pytest.fixture
def no_cgroup(tmp_path: Path) -> Tree:
    return {"cgroup_root": str(tmp_path / "none"), "cgroup_file": str(tmp_path / "none")}


def v2(tmp_path: Path, limits: dict[str, str], *, used: int, cached: int = 0, own: str = "/a/b") -> Tree:
    """A cgroup v2 tree with limits by directory."""
    root = tmp_path / "cgroup"
    for name, limit in limits.items():
        directory = root / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "memory.max").write_text(f"{limit}\n")
        (directory / "memory.current").write_text(f"{used}\n")
        (directory / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 7\n")
    (tmp_path / "own").write_text(f"0::{own}\n")
    return {"cgroup_root": str(root), "cgroup_file": str(tmp_path / "own")}


def test_what_fits_is_fine(small: Path, no_cgroup: Tree) -> None:
    assert check_budget(small, 4 * MIB, 4 * MIB, checkpoints=4, **no_cgroup) is None
    assert check_budget(small, 3 * MIB, None, checkpoints=4, **no_cgroup) is None


def test_an_explicit_budget_is_a_limit_with_both_figures(small: Path, no_cgroup: Tree) -> None:
    with pytest.raises(
        ConfigError, match=r"3\.0 MiB are needed for 4 checkpoints, tiers\.memory\.budget is 2\.0 MiB"
    ) as caught:
        check_budget(small, 3 * MIB, 2 * MIB, checkpoints=4, **no_cgroup)
    assert "keep.latest" in str(caught.value)


def test_a_small_tmpfs_is_named_with_what_to_change(small: Path, no_cgroup: Tree) -> None:
    with pytest.raises(TierFullError, match=r"5\.0 MiB more are needed .* 4\.0 MiB are free") as caught:
        check_budget(small, 5 * MIB, None, checkpoints=4, **no_cgroup)
    for words in ("--shm-size", "emptyDir", "Memory", "keep.latest", str(small)):
        assert words in str(caught.value)


def test_what_is_taken_already_is_not_needed_again(small: Path, no_cgroup: Tree) -> None:
    (small / "file").write_bytes(bytes(3 * MIB))
    with pytest.raises(TierFullError):
        check_budget(small, 4 * MIB, None, checkpoints=4, **no_cgroup)
    assert check_budget(small, 4 * MIB, None, already_bytes=3 * MIB, checkpoints=4, **no_cgroup) is None


def test_a_path_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(TierUnavailableError):
        check_budget(tmp_path / "nothing", 1, None, checkpoints=4)


def test_a_container_limit_is_a_warning_that_names_the_remedy(small: Path, tmp_path: Path) -> None:
    tree = v2(tmp_path, {"a/b": str(3 * MIB)}, used=2 * MIB)
    warning = check_budget(small, 2 * MIB, None, checkpoints=4, **tree)
    assert warning is not None
    for words in ("2.0 MiB", "1.0 MiB", "--memory", "keep.latest"):
        assert words in warning
    assert check_budget(small, MIB, None, checkpoints=4, **tree) is None


def test_the_tightest_cgroup_on_the_way_up_binds(tmp_path: Path) -> None:
    tree = v2(tmp_path, {"a/b": "max", "a": "5000", ".": "9000"}, used=1000)
    assert cgroup_room(tree["cgroup_root"], tree["cgroup_file"]) == 4000


def test_cached_files_count_as_room(tmp_path: Path) -> None:
    tree = v2(tmp_path, {"a/b": "5000"}, used=4500, cached=500)
    assert cgroup_room(tree["cgroup_root"], tree["cgroup_file"]) == 1000


def test_a_cgroup_over_its_limit_has_no_room(tmp_path: Path) -> None:
    tree = v2(tmp_path, {"a/b": "5000"}, used=6000)
    assert cgroup_room(tree["cgroup_root"], tree["cgroup_file"]) == 0


def test_no_limit_is_none(tmp_path: Path) -> None:
    tree = v2(tmp_path, {"a/b": "max"}, used=1)
    assert cgroup_room(tree["cgroup_root"], tree["cgroup_file"]) is None
    assert cgroup_room(str(tmp_path / "x"), str(tmp_path / "y")) is None


@pytest.mark.parametrize(("limit", "room"), [("5000", 4000), (str(9223372036854771712), None)])
def test_the_old_cgroups_are_read_too(tmp_path: Path, limit: str, room: int | None) -> None:
    directory = tmp_path / "cgroup" / "memory" / "job"
    directory.mkdir(parents=True)
    (directory / "memory.limit_in_bytes").write_text(limit)
    (directory / "memory.usage_in_bytes").write_text("2000")
    (directory / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 1000\n")
    (tmp_path / "own").write_text("12:cpu,cpuacct:/job\n4:memory:/job\n0::/job\n")
    assert cgroup_room(str(tmp_path / "cgroup"), str(tmp_path / "own")) == room
