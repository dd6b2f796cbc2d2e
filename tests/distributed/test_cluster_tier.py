"""The cluster's memory behind a node's own: real ranks, real drainers, the stand-in daemon over HTTP."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sm_tiered.errors import TieredError
from sm_tiered.handle import SaveHandle
from sm_tiered.locks import probe
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.testing.daemon_faults import DaemonFault
from sm_tiered_dcp import TieredCheckpointer
from tests.distributed.dcp_jobs import NAMESPACE, bits, pause, raised, recipe, run, start, steps, tell
from tests.waiting import wait_until

SIZE = 300_000
"""Numbers in a rank's tensor: a share of more than a MiB."""


@pytest.fixture
def daemon() -> Iterator[StandInDaemon]:
    with StandInDaemon() as served:
        yield served


def _recipe(root: Path, memory: Path | None, url: str, **changes: Any) -> dict[str, Any]:
    """Memory and the cluster at every step, a directory at every third."""
    cluster = {"kind": "hyperpod", "url": url, "save": {"every_n_steps": 1}, "keep": {"latest": 2}}
    cluster |= {"retry": {"attempts": 2, "deadline_secs": 8}, "connect_timeout_secs": 2, "commit_deadline_secs": 40}
    cluster |= changes.pop("cluster", {})
    return recipe(root, memory, disk={"save": {"every_n_steps": 3}}, tiers={"cluster": cluster}, **changes)


def _state(rank: int, value: float) -> dict[str, Any]:
    return {"common": torch.arange(9.0) + value, "per_rank": {"own": torch.full((SIZE,), value + rank), "rank": rank}}


def _node(root: str, rank: int) -> Path:
    return Path(root) / f"node-{rank}"


def _train(rank: int, root: str, url: str, first: int, last: int) -> list[str]:
    """Save steps *first* to *last*, and wait for each; return what the waits raised."""
    told: list[str] = []
    with TieredCheckpointer.from_recipe(_recipe(Path(root), _node(root, rank), url)) as checkpointer:
        for step in range(first, last + 1):
            handle = checkpointer.maybe_save(step, _state(rank, float(step)))
            assert handle is not None
            told += [f"{step} {tier}: {text}" for tier in handle.tiers if (text := _failure(handle, tier))]
    return told


def _failure(handle: SaveHandle, tier: str) -> str:
    """Wait for *tier*; return what that raised, if it did."""
    try:
        handle.wait(tier)
    except TieredError as error:
        return str(error)
    return ""


def _load(rank: int, root: str, url: str, step: int | None = None, **changes: Any) -> tuple[int | None, str, bool]:
    """Return which step a new job restores, from where, and whether every bit of it is what was saved."""
    state = _state(rank, -1.0)
    with TieredCheckpointer.from_recipe(_recipe(Path(root), _node(root, rank), url, **changes)) as checkpointer:
        try:
            found = checkpointer.restore(state, step=step)
        except Exception as error:
            return None, type(error).__name__, str(error) != ""
        if found is None:
            return None, "nothing", True
        restored = checkpointer.restored
        assert restored is not None
        return found, restored.tier, bits(state) == bits(_state(rank, float(found)))


def _lose(root: Path, *ranks: int) -> None:
    for rank in ranks:
        shutil.rmtree(_node(str(root), rank))


def test_a_job_whose_nodes_are_lost_goes_on_from_the_cluster_s_memory(tmp_path: Path, daemon: StandInDaemon) -> None:
    assert run(2, _train, str(tmp_path), daemon.url, 1, 4) == [[], []]
    assert list(steps(tmp_path / "disk")) == [3]
    _lose(tmp_path, 1)
    both = run(2, _load, str(tmp_path), daemon.url)
    assert both == [(4, "memory+cluster", True)] * 2
    _lose(tmp_path, 0, 1)
    assert run(2, _load, str(tmp_path), daemon.url) == [(4, "cluster", True)] * 2


def test_the_service_keeps_what_the_policy_wants_and_drops_nothing_by_itself(
    tmp_path: Path, daemon: StandInDaemon
) -> None:
    run(1, _train, str(tmp_path), daemon.url, 1, 5)
    held = daemon.namespaces[NAMESPACE].blobs[0]
    wait_until(lambda: sorted(wire % 10**10 for wire in list(held)) == [4, 5], "there is more than was to be kept")
    assert not daemon.dropped


def test_a_job_that_went_back_goes_on_from_its_new_line_after_the_loss_of_its_node(
    tmp_path: Path, daemon: StandInDaemon
) -> None:
    run(1, _train, str(tmp_path), daemon.url, 1, 5)
    assert run(1, _rolled_back, str(tmp_path), daemon.url, 4) == [6]
    _lose(tmp_path, 0)
    found = run(1, _load, str(tmp_path), daemon.url)[0]
    assert found == (5, "cluster", True)
    held = [divmod(step, 10**10) for step in sorted(daemon.namespaces[NAMESPACE].blobs[0])]
    assert held[-1][0] > held[0][0] >= 1, "two lines, the newer one above"


def _rolled_back(rank: int, root: str, url: str, to: int) -> int:
    """Go back to step *to* and save the next one; return the last step that there was before, plus one."""
    state = _state(rank, -1.0)
    with TieredCheckpointer.from_recipe(_recipe(Path(root), _node(root, rank), url)) as checkpointer:
        newest = checkpointer.latest()
        assert newest is not None
        assert checkpointer.restore(state, step=to) == to
        handle = checkpointer.maybe_save(to + 1, _state(rank, float(to + 1)))
        assert handle is not None
        handle.wait("cluster")
        return newest + 1


@pytest.mark.parametrize("world", [1, 3, 4])
def test_another_number_of_ranks_finds_what_was_saved_and_is_found(
    tmp_path: Path, daemon: StandInDaemon, world: int
) -> None:
    """In any direction: a larger world takes the slot to spare, or a namespace of its own beside the first one."""
    run(2, _save_shared, str(tmp_path), daemon.url, 3)
    shutil.rmtree(tmp_path / "shared")
    assert run(world, _load_shared, str(tmp_path), daemon.url) == [(3, True)] * world
    run(world, _save_shared, str(tmp_path), daemon.url, 4)
    shutil.rmtree(tmp_path / "shared")
    assert run(2, _load_shared, str(tmp_path), daemon.url) == [(4, True)] * 2
    assert len(daemon.namespaces) == (2 if world > 3 else 1)


def _save_shared(rank: int, root: str, url: str, step: int) -> None:
    given = _recipe(Path(root), Path(root) / "shared", url)
    with TieredCheckpointer.from_recipe(given) as checkpointer:
        state = {"w": torch.arange(float(SIZE)) * step}
        if step > 3:
            assert checkpointer.restore(state) == step - 1
        checkpointer.save(step, {"w": torch.arange(float(SIZE)) * step}, ["memory", "cluster"]).wait("cluster")


def _load_shared(rank: int, root: str, url: str) -> tuple[int | None, bool]:
    state = {"w": torch.zeros(SIZE)}
    given = _recipe(Path(root), Path(root) / "shared", url)
    with TieredCheckpointer.from_recipe(given) as checkpointer:
        found = checkpointer.restore(state)
    return found, found is not None and torch.equal(state["w"], torch.arange(float(SIZE)) * found)


def test_a_service_that_is_gone_harms_no_other_tier_and_is_told(tmp_path: Path, daemon: StandInDaemon) -> None:
    url = daemon.url
    run(1, _train, str(tmp_path), url, 1, 2)
    daemon.__exit__()
    told = run(1, _train, str(tmp_path), url, 3, 4)[0]
    assert told
    assert all("cluster" in line for line in told)
    assert list(steps(tmp_path / "disk")) == [3]
    _lose(tmp_path, 0)
    assert run(1, _load, str(tmp_path), url)[0] == (3, "disk", True)


def test_a_start_that_can_t_tell_whether_anything_was_saved_is_no_fresh_start(
    tmp_path: Path, daemon: StandInDaemon
) -> None:
    url = daemon.url
    run(1, _train, str(tmp_path), url, 1, 2)
    assert not steps(tmp_path / "disk")
    _lose(tmp_path, 0)
    daemon.__exit__()
    assert run(1, _load, str(tmp_path), url)[0] == (None, "TierUnavailableError", True)
    assert run(1, _load, str(tmp_path), url, 1)[0] == (None, "TierUnavailableError", True)
    with StandInDaemon(port=daemon.port) as empty:
        assert run(1, _load, str(tmp_path), empty.url)[0] == (None, "nothing", True)


def test_a_service_that_falls_silent_while_it_is_read_is_gone_on_without_by_all_ranks(
    tmp_path: Path, daemon: StandInDaemon
) -> None:
    """It lists step 4 and breaks off in the middle of one rank's share: step 3 is taken, from the directory."""
    run(2, _train, str(tmp_path), daemon.url, 1, 4)
    _lose(tmp_path, 0, 1)
    daemon.restart(DaemonFault(kind="reset", method="GET", path=r"/1/\d+$", at=SIZE))
    assert run(2, _load, str(tmp_path), daemon.url) == [(3, "disk", True)] * 2
    assert daemon.fired


def test_a_recipe_may_insist_on_the_service(tmp_path: Path, daemon: StandInDaemon) -> None:
    url = daemon.url
    run(1, _train, str(tmp_path), url, 1, 3)
    daemon.__exit__()
    run_one = run(1, _load_insisting, str(tmp_path), url)[0]
    assert run_one[0] == "TierUnavailableError"
    assert "cluster" in run_one[1]


def _load_insisting(rank: int, root: str, url: str) -> tuple[str, str]:
    given = _recipe(Path(root), _node(root, rank), url, cluster={"unreachable": "raise"})
    with TieredCheckpointer.from_recipe(given) as checkpointer:
        return raised(lambda: checkpointer.restore(_state(rank, -1.0)))


def test_without_memory_a_save_goes_straight_to_the_cluster(tmp_path: Path, daemon: StandInDaemon) -> None:
    run(2, _save_alone, str(tmp_path), daemon.url)
    assert run(2, _load_alone, str(tmp_path), daemon.url) == [(2, "cluster", True)] * 2


def _save_alone(rank: int, root: str, url: str) -> None:
    with TieredCheckpointer.from_recipe(_recipe(Path(root), None, url)) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, _state(rank, float(step)), ["cluster"]).wait("cluster")


def _load_alone(rank: int, root: str, url: str) -> tuple[int | None, str, bool]:
    state = _state(rank, -1.0)
    with TieredCheckpointer.from_recipe(_recipe(Path(root), None, url)) as checkpointer:
        found = checkpointer.restore(state)
        assert checkpointer.restored is not None
        return found, checkpointer.restored.tier, bits(state) == bits(_state(rank, float(found or 0)))


def test_a_drainer_that_is_killed_while_it_sends_leaves_nothing_half_and_the_next_one_sends_it(
    tmp_path: Path, daemon: StandInDaemon
) -> None:
    daemon.restart(DaemonFault(kind="hang", method="POST", path=r"/0/\d*1$"))
    job = start(1, _save_and_wait, str(tmp_path), daemon.url)
    assert job.heard(0) == "saved"
    root = _node(str(tmp_path), 0) / NAMESPACE
    wait_until(lambda: daemon.fired, "nothing is sent")
    pid = _drainer(root)
    os.kill(pid, signal.SIGKILL)
    daemon.restart()
    assert not [step for blobs in _blobs(daemon) for step in blobs if step % 10**10]
    job.go()
    assert job.wait()[0].value == ""
    _lose(tmp_path, 0)
    assert run(1, _load, str(tmp_path), daemon.url)[0] == (2, "cluster", True)


def _blobs(daemon: StandInDaemon) -> list[Any]:
    return [blobs for namespace in daemon.namespaces.values() for blobs in namespace.blobs.values()]


def _drainer(root: Path) -> int:
    found: list[int] = []

    def look() -> bool:
        holder = probe(root / ".locks" / "drainer")
        found[:] = [holder.pid] if holder is not None and holder.pid is not None else []
        return bool(found)

    wait_until(look, "there is no drainer")
    return found[0]


def _save_and_wait(rank: int, root: str, url: str) -> str:
    with TieredCheckpointer.from_recipe(_recipe(Path(root), _node(root, rank), url)) as checkpointer:
        checkpointer.save(1, _state(rank, 1.0), ["memory", "cluster"])
        tell("saved")
        pause()
        return _failure(checkpointer.save(2, _state(rank, 2.0), ["memory", "cluster"]), "cluster")
