"""Where a machine is too small for an import: that is told for what it is, and never as damage."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sm_tiered.errors import CorruptPartError, SaveError, TierFullError, TierRefusedError
from sm_tiered.policies.keep import Latest
from sm_tiered.settings import HyperPodSettings
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.tiers import open_tier
from sm_tiered_dcp.predecessor import OLDER, import_step, shards
from sm_tiered_dcp.predecessor.origins import open_daemon
from sm_tiered_dcp.predecessor.temporary import using_temporary
from tests.integrations.predecessor_imports import taken
from tests.integrations.predecessor_made import NAMESPACE, directory, source, two_ranks
from tests.integrations.test_predecessor_cli import filled


def no_memory(*_: object, **__: object) -> Any:
    raise MemoryError


def torch_says(*_: object, **__: object) -> Any:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to")


@pytest.mark.parametrize(
    ("owner", "name", "fails"),
    [
        (torch, "load", no_memory),
        (torch, "load", torch_says),
        (shards.zipfile.ZipFile, "testzip", no_memory),
        (shards, "load_stream", no_memory),
        (shards, "bytearray", no_memory),
    ],
)
def test_too_little_memory_is_no_damage(
    owner: Any, name: str, fails: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_ranks(10).put(tmp_path / "base", 10)
    monkeypatch.setattr(owner, name, fails, raising=False)
    with pytest.raises(SaveError, match="there is not enough memory for its") as caught:
        taken(tmp_path / "base", directory(tmp_path / "out", "ours"))
    assert not isinstance(caught.value, OLDER), "no older step is taken for it"


def test_another_error_of_torch_is_still_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> Any:
        raise RuntimeError("PytorchStreamReader failed")

    two_ranks(10).put(tmp_path / "base", 10)
    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(CorruptPartError, match="PytorchStreamReader failed"):
        taken(tmp_path / "base", directory(tmp_path / "out", "ours"))


class Full:
    """Files that have room for nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None: ...

    def seek(self, at: int) -> None: ...

    def truncate(self) -> None: ...

    def close(self) -> None: ...

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_temporary_directory_is_named_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_ranks(10).put(tmp_path / "base", 10)
    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", Full)
    with pytest.raises(TierFullError, match=r"TMPDIR \(/.*\) has no room for the values in .*, \d+ bytes") as caught:
        taken(tmp_path / "base", directory(tmp_path / "out", "ours"))
    assert "Set TMPDIR" in (caught.value.hint or "")


def test_a_shard_that_does_not_fit_into_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StandInDaemon() as daemon:
        filled(daemon, 10)
        place = open_daemon(HyperPodSettings(name="cluster", save=None, keep=Latest(3), url=daemon.url), NAMESPACE)
        size = len(two_ranks(10).shards[0])
        monkeypatch.setattr(tempfile, "TemporaryFile", Full)
        with pytest.raises(TierFullError, match=rf"TMPDIR .* has no room for .*, {size} bytes"):
            import_step(place, place.listed()[0], directory(tmp_path / "out", "ours"), namespace="ours")
        place.close()


def test_room_for_what_goes_to_the_cluster_s_memory_is_looked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    two_ranks(10).put(tmp_path / "base", 10)
    place = source(tmp_path / "base")
    with StandInDaemon() as daemon:
        settings = HyperPodSettings(name="cluster", save=None, keep=Latest(2), url=daemon.url)
        tier = open_tier(settings, "ours")
        usage = type("Usage", (), {"free": 100})
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(TierFullError, match=r"no room for step 10 on its way to cluster, \d+ bytes"):
            import_step(place, place.listed()[0], tier, namespace="ours")
        tier.close()


def test_a_temporary_directory_that_can_not_be_used_is_named() -> None:
    with (
        pytest.raises(TierRefusedError, match=r"TMPDIR .* can't take it, whose size is not known"),
        using_temporary("it", None),
    ):
        raise PermissionError(errno.EACCES, "Permission denied")
