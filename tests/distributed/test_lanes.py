"""Lanes: what storage takes its time over holds up nothing that goes to the cluster's memory, nor the reverse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sm_tiered.handle import SaveHandle
from sm_tiered.settings import S3Settings
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.testing.daemon_faults import DaemonFault
from sm_tiered.testing.proxy import FaultProxy, Rule
from sm_tiered_dcp import TieredCheckpointer
from tests.distributed.dcp_jobs import pause, raised, recipe, run, s3_tier, start, tell
from tests.waiting import wait_until

WORLD = 2
REFUSED = 2
UPLOADS_HANG = Rule(kind="half_open", match=("PUT ", ".distcp"))


@pytest.fixture
def daemon() -> Iterator[StandInDaemon]:
    with StandInDaemon() as served:
        yield served


@pytest.fixture
def s3(s3_settings: S3Settings) -> Iterator[tuple[FaultProxy, dict[str, Any]]]:
    """S3 behind a proxy, and the tier that goes through it."""
    assert s3_settings.endpoint_url is not None
    with FaultProxy(s3_settings.endpoint_url) as proxy:
        tier = {**s3_tier(s3_settings), "endpoint_url": proxy.url, "request_timeout_secs": 2, "keep": {"latest": 9}}
        yield proxy, tier


def _recipe(memory: Path, url: str, storage: dict[str, Any], *, last: str = "storage") -> dict[str, Any]:
    cluster = {"kind": "hyperpod", "url": url, "save": {"every_n_steps": 1}, "keep": {"latest": 9}}
    cluster |= {"request_timeout_secs": 3, "commit_deadline_secs": 300, "retry": {"attempts": 99, "deadline_secs": 300}}
    tiers = {"cluster": cluster, "storage": {**storage, "save": {"every_n_steps": 1}}}
    tiers[last] = tiers.pop(last)
    return recipe(memory, memory, memory={"keep": {"latest": 1}}, disk=None, tiers=tiers)


def _state(rank: int, value: float) -> dict[str, Any]:
    return {"common": torch.full((9,), value), "per_rank": {"own": torch.full((1000,), value + rank)}}


def _save_all(
    rank: int, root: str, url: str, storage: dict[str, Any], quick: list[str], slow: str
) -> dict[str, list[int]]:
    """Save as many steps as there are *quick* tiers, each time waiting for memory and that one.

    Once *slow* goes on, return which steps were left out where.
    """
    with TieredCheckpointer.from_recipe(_recipe(Path(root) / f"node-{rank}", url, storage)) as checkpointer:
        handles: list[SaveHandle] = []
        for step, tier in enumerate(quick, start=1):
            handle = checkpointer.maybe_save(step, _state(rank, float(step)))
            assert handle is not None
            handle.wait("memory")
            if (step, tier) == (REFUSED, "cluster"):
                assert raised(lambda handle=handle: handle.wait("cluster"))[0] == "TierRefusedError"
            else:
                handle.wait(tier)
            handles.append(handle)
        assert not handles[0].done(slow)
        tell("saved")
        pause()
        handles[0].wait(slow)
    return {name: [handle.step for handle in handles if handle.skipped(name)] for name in handles[0].tiers}


def _run(*arguments: Any, let_go: Callable[[], object]) -> list[Any]:
    job = start(WORLD, _save_all, *arguments)
    assert [job.heard(rank) for rank in range(WORLD)] == ["saved"] * WORLD
    let_go()
    job.go()
    ends = job.wait()
    assert [end.status for end in ends] == [0] * WORLD, ends
    return [end.value for end in ends]


def test_saves_to_the_cluster_go_on_while_s3_hangs(
    tmp_path: Path, daemon: StandInDaemon, s3: tuple[FaultProxy, dict[str, Any]]
) -> None:
    """One that the service refuses ends for all ranks, and S3 is as busy as before."""
    proxy, tier = s3
    proxy.restart(UPLOADS_HANG)
    daemon.restart(DaemonFault(kind="status", status=400, method="POST", path=rf"/\d*{REFUSED}$"))
    left_out = _run(str(tmp_path), daemon.url, tier, ["cluster"] * 4, "storage", let_go=proxy.restart)
    assert left_out == [{"memory": [], "cluster": [], "storage": [2, 3, 4]}] * WORLD


def test_saves_to_storage_go_on_while_the_service_hangs(tmp_path: Path, daemon: StandInDaemon) -> None:
    disk = {"kind": "local", "path": str(tmp_path / "disk"), "fsync": False, "keep": {"latest": 9}}
    daemon.restart(DaemonFault(kind="hang", method="POST", path=r"/\d*1$"))
    left_out = _run(str(tmp_path), daemon.url, disk, ["storage"] * 3, "cluster", let_go=daemon.restart)
    assert left_out == [{"memory": [], "cluster": [2, 3], "storage": []}] * WORLD


def test_while_both_hang_saves_go_on_in_memory(
    tmp_path: Path, daemon: StandInDaemon, s3: tuple[FaultProxy, dict[str, Any]]
) -> None:
    proxy, tier = s3
    proxy.restart(UPLOADS_HANG)
    daemon.restart(DaemonFault(kind="hang", method="POST", path=r"/\d*2$"))

    def let_go() -> None:
        proxy.restart()
        daemon.restart()

    left_out = _run(str(tmp_path), daemon.url, tier, ["cluster", *["memory"] * 4], "storage", let_go=let_go)
    assert left_out == [{"memory": [], "cluster": [3, 4, 5], "storage": [2, 3, 4, 5]}] * WORLD


def test_an_upload_that_failed_is_told_however_often_the_cluster_refuses(
    tmp_path: Path, daemon: StandInDaemon, s3: tuple[FaultProxy, dict[str, Any]]
) -> None:
    """All that has failed is told at once: a lane whose failure waits for its turn would stay busy."""
    proxy, tier = s3
    proxy.restart(Rule(kind="status", status=403, code="AccessDenied", match=("PUT ", ".distcp"), times=1))
    daemon.restart(DaemonFault(kind="status", status=400, method="POST", path=r"/0/\d*[1-9]$"))
    assert run(1, _save_while_refused, str(tmp_path), daemon.url, tier) == [["TierRefusedError", "", ""]]


def _save_while_refused(rank: int, root: str, url: str, storage: dict[str, Any]) -> list[str]:
    told: list[str] = []
    with TieredCheckpointer.from_recipe(_recipe(Path(root) / "node", url, storage, last="cluster")) as checkpointer:
        for step in (1, 2, 3):
            handle = checkpointer.maybe_save(step, _state(rank, float(step)))
            assert handle is not None
            assert raised(lambda handle=handle: handle.wait("cluster"))[0] == "TierRefusedError"
            wait_until(lambda handle=handle: handle.done("storage"), "storage does not end")
            told.append(type(error).__name__ if (error := handle.exception("storage")) is not None else "")
    return told
