"""A tier in a directory: the contract, and what only a file system can do to it."""

from __future__ import annotations

import errno
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sm_tiered.errors import (
    ConfigError,
    KeyExistsError,
    KeyNotFoundError,
    TierFullError,
    TierRefusedError,
    TierUnavailableError,
)
from sm_tiered.policies.keep import Latest
from sm_tiered.settings import LocalSettings
from sm_tiered.testing.contract import TierContract
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.local import LocalTier
from tests.unit.children import in_child

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts and foreign owners")


def open_local(path: Path, *, fsync: bool = False) -> LocalTier:
    return LocalTier(LocalSettings(name="disk", save=None, keep=Latest(n=1), path=str(path), fsync=fsync), "run")


@pytest.fixture
def local(tmp_path: Path) -> LocalTier:
    return open_local(tmp_path / "base")


@pytest.fixture
def small(make_tmpfs: Callable[[str, int], Path]) -> LocalTier:
    """A tier on a file system of 1 MiB."""
    return open_local(make_tmpfs("small", 1), fsync=True)


class TestLocalContract(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> LocalTier:
        return open_local(tmp_path / "base", fsync=True)

    def raw_read(self, tier: Tier, key: str) -> bytes | None:
        assert isinstance(tier, LocalTier)
        path = tier.root / key
        return path.read_bytes() if path.exists() else None

    def raw_keys(self, tier: Tier) -> list[str]:
        assert isinstance(tier, LocalTier)
        if not tier.root.exists():
            return []
        hidden = {".replace"}
        found = [str(p.relative_to(tier.root)) for p in tier.root.rglob("*") if p.is_file() and p.name not in hidden]
        return sorted(found)

    def raw_write(self, tier: Tier, key: str, data: bytes) -> None:
        assert isinstance(tier, LocalTier)
        path = tier.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def files_of(tier: LocalTier) -> set[str]:
    return {str(p.relative_to(tier.root)) for p in tier.root.rglob("*") if p.is_file()}


# ---- names


@pytest.mark.parametrize(
    "key",
    ["", "/etc/x", "../x", "a/../b", "a//b", "a/", "./a", "a\0b", "a/.tmp-0123abcd", "x" * 256, "a\ud800"],
    ids=ascii,
)
def test_a_key_that_leads_elsewhere_is_refused(local: LocalTier, key: str) -> None:
    for call in (
        lambda: local.put(key, b"x"),
        lambda: local.get(key),
        lambda: local.delete([key]),
        lambda: local.put_if_absent(key, b"x"),
        lambda: local.put_part(key, lambda: iter([memoryview(b"x")]), 1),
    ):
        with pytest.raises(TierRefusedError, match="can't be a key"):
            call()
    assert not local.root.exists() or not files_of(local)


def test_hidden_files_are_not_listed_except_the_stock_metadata(local: LocalTier) -> None:
    for key in ("step_1/.metadata", "step_1/part", ".queue/entry", "step_1/.secret", ".top"):
        local.put(key, b"x")
    assert [entry.key for entry in local.list("")] == ["step_1/.metadata", "step_1/part"]
    assert [entry.key for entry in local.list(".queue/")] == [".queue/entry"]
    assert list(local.list_dirs("")) == ["step_1"]


def test_a_directory_with_nothing_but_a_dead_writers_file_is_not_listed(local: LocalTier) -> None:
    local.put("step_1/part", b"x")
    (local.root / "step_2").mkdir()
    (local.root / "step_2" / ".tmp-00000000").write_bytes(b"half")
    assert list(local.list_dirs("")) == ["step_1"]


def test_nothing_is_made_by_asking(local: LocalTier) -> None:
    assert local.list("") == []
    assert local.list_dirs("") == []
    local.delete(["a/b"])
    with pytest.raises(KeyNotFoundError):
        local.get("a")
    assert not local.root.exists()


def test_a_directory_is_no_object(local: LocalTier) -> None:
    local.put("a/b", b"x")
    with pytest.raises(KeyNotFoundError):
        local.get("a")
    with pytest.raises(KeyNotFoundError):
        local.get("a/b/c")
    with pytest.raises(TierRefusedError):
        local.put("a", b"y")
    local.delete(["a"])
    assert local.get("a/b").data == b"x"


# ---- whole or not at all


def test_a_crash_at_any_system_call_of_a_put_leaves_old_or_new(local: LocalTier) -> None:
    """Kill the writer at its 1st, 2nd, ... audited call until it gets through."""
    import sys

    local.put("d/k", b"old" * 1000)
    outcomes: set[bytes] = set()
    for limit in range(1, 60):

        def die_at(limit: int = limit) -> None:
            left = limit

            def hook(event: str, _arguments: object) -> None:
                nonlocal left
                if event.startswith(("open", "os.")):
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            local.put("d/k", b"new" * 2000)

        ended = in_child(die_at)
        outcomes.add(local.get("d/k").data)
        assert [entry.key for entry in local.list("")] == ["d/k"]
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    else:
        pytest.fail("never got through")
    assert outcomes == {b"old" * 1000, b"new" * 2000}


def test_what_is_written_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def record(name: str) -> None:
        real = getattr(os, name)

        def wrapped(*arguments: object, **named: object) -> object:
            what = name
            if name == "fsync":
                assert isinstance(arguments[0], int)
                what = "sync dir" if stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else "sync file"
            calls.append(what)
            return real(*arguments, **named)

        monkeypatch.setattr(os, name, wrapped)

    tier = open_local(tmp_path / "base", fsync=True)
    tier.put("a", b"x")
    for name in ("fsync", "rename", "link"):
        record(name)
    tier.put("a", b"y")
    assert calls == ["sync file", "rename", "sync dir"]
    calls.clear()
    tier.put_if_absent("b", b"y")
    assert calls == ["sync file", "link", "sync dir"]
    calls.clear()
    tier.put_part("new/c", lambda: iter([memoryview(b"abc")]), 3)
    assert calls == ["sync dir", "sync file", "rename", "sync dir"]


def test_a_lost_answer_to_a_link_that_was_made_is_no_conflict(
    local: LocalTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.link

    def answer_lost(*arguments: str, **named: int) -> None:
        real(*arguments, **named)
        raise FileExistsError(errno.EEXIST, "there")

    monkeypatch.setattr(os, "link", answer_lost)
    local.put_if_absent("k", b"mine")
    assert local.get("k").data == b"mine"
    with pytest.raises(KeyExistsError):
        local.put_if_absent("k", b"other")


def test_without_hard_links_put_if_absent_still_is_exclusive(local: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_arguments: str, **_named: int) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    local.put_if_absent("k", b"first")
    with pytest.raises(KeyExistsError):
        local.put_if_absent("k", b"second")
    assert local.get("k").data == b"first"
    assert files_of(local) == {"k"}


def test_of_many_who_replace_one_version_one_wins(local: LocalTier) -> None:
    local.put("k", b"0")
    version = local.get("k").version
    won: list[bytes] = []
    barrier = threading.Barrier(8)

    def attempt(value: bytes) -> None:
        barrier.wait()
        try:
            local.replace("k", value, version=version)
        except KeyExistsError:
            return
        won.append(value)

    threads = [threading.Thread(target=attempt, args=(b"%d" % i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [local.get("k").data]


def test_directories_that_come_and_go_do_not_fail_a_write(local: LocalTier) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def churn(name: str) -> None:
        try:
            while not stop.is_set():
                local.put(f"d/e/{name}", b"x")
                local.delete([f"d/e/{name}"])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=churn, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    stop.wait(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert files_of(local) == set()


def test_a_dead_writers_file_goes_with_the_directory_and_a_living_ones_stays(local: LocalTier) -> None:
    local.put("d/k", b"x")
    (local.root / "d" / ".tmp-00000000").write_bytes(b"half")
    local.delete(["d/k"])
    assert not (local.root / "d").exists()

    def chunks() -> Iterator[memoryview]:
        local.delete(["d/k"])
        assert [p for p in (local.root / "d").iterdir() if p.name.startswith(".tmp-")]
        yield memoryview(b"abc")

    local.put("d/k", b"x")
    local.put_part("d/part", chunks, 3)
    assert local.get("d/part").data == b"abc"


# ---- no room, no permission


@needs_root
def test_a_full_file_system_keeps_what_stood_there_and_nothing_of_what_came(small: LocalTier) -> None:
    small.put("k", b"old")
    big = bytes(3 * 1024 * 1024)
    for call in (
        lambda: small.put("k", big),
        lambda: small.put_if_absent("new", big),
        lambda: small.put_part("d/part", lambda: iter([memoryview(big)]), len(big)),
    ):
        with pytest.raises(TierFullError):
            call()
    assert small.get("k").data == b"old"
    assert files_of(small) == {"k"}
    small.put("k", b"there is room again")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, TierFullError),
        (errno.EDQUOT, TierFullError),
        (errno.EACCES, TierRefusedError),
        (errno.EPERM, TierRefusedError),
        (errno.EROFS, TierRefusedError),
        (errno.EIO, TierUnavailableError),
        (errno.ESTALE, TierUnavailableError),
        (errno.ETIMEDOUT, TierUnavailableError),
    ],
)
def test_an_error_of_the_system_has_its_own_kind(
    local: LocalTier, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    def fail(*_arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    local.put("k", b"old")
    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(kind) as caught:
        local.put("k", b"new")
    assert "k" in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    monkeypatch.undo()
    assert local.get("k").data == b"old"
    assert files_of(local) == {"k"}


@needs_root
def test_another_user_is_refused_and_can_neither_list_nor_read(tmp_path: Path) -> None:
    for path in (tmp_path, *tmp_path.parents[:3]):
        path.chmod(0o755)
    local = open_local(tmp_path / "base")
    local.put("k", b"x")
    (tmp_path / "base").chmod(0o755)

    def try_it() -> None:
        os.seteuid(65534)
        with pytest.raises(TierRefusedError):
            local.get("k")
        with pytest.raises(TierRefusedError):
            local.list("")

    assert in_child(try_it) == 0


@needs_root
def test_what_belongs_to_another_user_is_refused(local: LocalTier) -> None:
    local.put("d/k", b"x")
    os.chown(local.root / "d" / "k", 65534, 65534)
    with pytest.raises(TierRefusedError, match="uid 65534"):
        local.get("d/k")
    os.chown(local.root / "d", 65534, 65534)
    with pytest.raises(TierRefusedError, match="uid 65534"):
        local.put("d/other", b"x")
    os.chown(local.root, 65534, 65534)
    with pytest.raises(TierRefusedError, match="uid 65534"):
        local.list("")


def test_planted_links_are_refused(local: LocalTier, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "k").write_bytes(b"secret")
    local.put("d/k", b"x")
    (local.root / "link").symlink_to(outside / "k")
    (local.root / "linked").symlink_to(outside, target_is_directory=True)
    with pytest.raises(TierRefusedError):
        local.get("link")
    for call in (
        lambda: local.get("linked/k"),
        lambda: local.put("linked/k", b"y"),
        lambda: local.delete(["linked/k"]),
    ):
        with pytest.raises(TierRefusedError):
            call()
    assert [entry.key for entry in local.list("")] == ["d/k"]
    local.put("link", b"y")  # replaces the link, never what it points to
    assert (outside / "k").read_bytes() == b"secret"
    assert local.get("link").data == b"y"


def test_a_linked_namespace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "run").symlink_to(tmp_path / "outside")
    with pytest.raises(TierRefusedError):
        open_local(tmp_path / "base").put("k", b"x")
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.timeout(20)
def test_a_pipe_or_a_socket_in_the_place_of_a_file_neither_blocks_nor_is_read(local: LocalTier) -> None:
    import socket

    local.put("d/k", b"x")
    os.mkfifo(local.root / "d" / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(local.root / "s"))
        for key in ("d/pipe", "s"):
            with pytest.raises(TierRefusedError):
                local.get(key)
            with pytest.raises(TierRefusedError):
                local.read_into(key, 0, memoryview(bytearray(1)))


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o200])
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, umask: int) -> None:
    tier = open_local(tmp_path / "base")
    old = os.umask(umask)
    try:
        tier.put("d/k", b"x")
        tier.put_if_absent("d/once", b"x")
        tier.put_part("d/part", lambda: iter([memoryview(b"x")]), 1)
    finally:
        os.umask(old)
    for path in [tier.root, tier.root / "d"]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for name in ("k", "once", "part"):
        assert stat.S_IMODE((tier.root / "d" / name).stat().st_mode) == 0o600


# ---- one directory for all ranks


def test_what_one_rank_probes_another_sees(tmp_path: Path) -> None:
    first, second = open_local(tmp_path / "base"), open_local(tmp_path / "base")
    first.write_probe("token-1")
    assert second.read_probe("token-1")
    assert second.list("") == []
    first.clear_probe("token-1")
    assert not second.read_probe("token-1", timeout_secs=0)
    assert not open_local(tmp_path / "elsewhere").read_probe("token-1", timeout_secs=0.06)


def test_a_probe_token_builds_no_path(local: LocalTier) -> None:
    with pytest.raises(ConfigError):
        local.write_probe("../x")


def test_a_probe_leaves_nothing(local: LocalTier) -> None:
    local.probe()
    assert files_of(local) == set()


def test_no_operation_leaves_a_descriptor(local: LocalTier) -> None:
    def everything() -> None:
        local.put("d/k", b"x")
        local.replace("d/k", b"y", version=local.get("d/k").version)
        local.put_part("d/part", lambda: iter([memoryview(b"abc")]), 3)
        local.read_into("d/part", 1, memoryview(bytearray(2)))
        for call in (
            lambda: local.put_if_absent("d/k", b"x"),
            lambda: local.get("nothing"),
            lambda: local.get("d/k", max_bytes=0),
            lambda: local.put_part("d/bad", lambda: iter([memoryview(b"abc")]), 4),
            lambda: local.put("d", b"x"),
        ):
            with pytest.raises(Exception, match="d|nothing"):
                call()
        local.list("")
        local.list_dirs("")
        local.delete(["d/k", "d/part"])

    everything()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        everything()
    assert len(os.listdir("/proc/self/fd")) == before
