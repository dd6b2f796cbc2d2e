"""Places that a tier can't use, rows 32 and 33 of the table of bad input: named, with the reason and what to do."""

from __future__ import annotations

import ctypes
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from sm_tiered.errors import TierRefusedError, TierUnavailableError
from sm_tiered.group import SoloGroup
from sm_tiered.recipe import Recipe
from sm_tiered.store import Store
from tests.faults.core_jobs import in_child


def open_store(memory: Path, disk: Path) -> None:
    """Open both tiers, as a launch does, and let go of them."""
    tiers = {
        "near": {"kind": "memory", "path": str(memory), "allow_disk": True},
        "far": {"kind": "local", "path": str(disk), "fsync": False},
    }
    Store(Recipe.parse({"version": 1, "namespace": "run-1", "tiers": tiers}).settings(), SoloGroup()).close()


def without_privileges() -> None:
    """Give up, in a child, what lets root write where it may not."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0


def missing(folder: Path) -> Path:
    return folder / "not" / "there"


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "in"


def a_file(folder: Path) -> Path:
    return below_a_file(folder).parent


def a_link_to_nothing(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "nothing")
    return folder / "link"


def where_none_can_be_made(_folder: Path) -> Path:
    return Path("/proc/sm_tiered/checkpoints")


def read_only(folder: Path) -> Path:
    (folder / "read-only").mkdir(mode=0o500)
    return folder / "read-only"


def below_read_only(folder: Path) -> Path:
    return read_only(folder) / "in"


class Row(NamedTuple):
    make: Callable[[Path], Path]
    near: str
    """What a memory tier says of the path, and next what a local one does."""
    far: str


ROWS = [
    Row(below_a_file, ": Not a directory", " can't be written: Not a directory"),
    Row(a_file, " is no directory", " can't be written: Not a directory"),
    Row(a_link_to_nothing, " is no directory", " can't be written: it is a link, or no directory"),
    Row(read_only, "/run-1: Permission denied", "/run-1 can't be written: Permission denied"),
    Row(below_read_only, ": Permission denied", " can't be written: Permission denied"),
]


def refused(row: Row, folder: Path, kind: str) -> None:
    """Open with a bad place for the tier of that *kind* and a good one for the other; see what is said of it."""
    place, other = row.make(folder), folder / "good"
    with pytest.raises(TierRefusedError) as caught:
        open_store(*((place, other) if kind == "memory" else (other, place)))
    text = str(caught.value)
    assert f"{place}{row.near if kind == 'memory' else row.far}" in text, text
    assert f"tier {'near' if kind == 'memory' else 'far'}" in text
    assert caught.value.hint
    assert ".probe" not in text
    if kind == "memory":
        assert not other.exists(), "a launch that fails has written"


@pytest.mark.parametrize("kind", ["memory", "local"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.make.__name__)
def test_a_place_that_can_not_be_used_is_refused_by_name(row: Row, kind: str, tmp_path: Path) -> None:
    def work() -> None:
        without_privileges()
        refused(row, tmp_path, kind)

    assert in_child(work) == 0


def test_where_nothing_can_be_made_the_place_is_named(tmp_path: Path) -> None:
    place = where_none_can_be_made(tmp_path)
    with pytest.raises(TierRefusedError, match=rf"{place} can't be made .*Set tiers\.near\.path"):
        open_store(place, tmp_path / "disk")
    with pytest.raises(TierUnavailableError, match=rf"{place} can't be written: .*set tiers\.far\.path"):
        open_store(tmp_path / "memory", place)


def test_a_place_that_is_not_there_is_made_for_this_user_alone(tmp_path: Path) -> None:
    places = [missing(tmp_path / name) for name in ("memory", "disk")]
    open_store(*places)
    assert {stat.S_IMODE(place.stat().st_mode) for place in places} == {0o700}
    assert all((place / "run-1").is_dir() for place in places)


@pytest.mark.parametrize("bad", ["memory", "disk"])
def test_after_a_refusal_the_next_launch_finds_nothing_in_its_way(bad: str, tmp_path: Path) -> None:
    (tmp_path / bad).write_text("")
    with pytest.raises(TierRefusedError):
        open_store(tmp_path / "memory", tmp_path / "disk")
    (tmp_path / bad).unlink()
    open_store(tmp_path / "memory", tmp_path / "disk")


def test_a_file_in_the_place_of_what_a_tier_makes_for_itself_is_told_of(tmp_path: Path) -> None:
    for tier, below in (("memory", "run-1/.arena"), ("disk", "run-1")):
        path = tmp_path / tier / below
        path.parent.mkdir(parents=True, mode=0o700)
        (tmp_path / tier).chmod(0o700)
        path.write_text("")
        with pytest.raises(TierRefusedError, match=rf"{tmp_path}/{tier}/run-1 can't be (made|written)"):
            open_store(tmp_path / "memory", tmp_path / "disk")
        path.unlink()
    open_store(tmp_path / "memory", tmp_path / "disk")
