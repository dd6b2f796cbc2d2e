"""The loop's own interface, in one process: policies, handles, roll-backs, ends, and what is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from sm_tiered.errors import (
    CheckpointNotFoundError,
    ConfigError,
    DeadlineExceededError,
    PolicyError,
    StructureError,
    TieredError,
    UnsafeValueError,
)
from sm_tiered_dcp import TieredCheckpointer, TieredStorageWriter, TrainState
from tests.distributed.dcp_jobs import bits, recipe, run, step_dir, steps

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def state(value: float = -1.0) -> dict[str, Any]:
    return {"w": torch.full((50,), value), "values": {"epoch": value}}


def committed(folder: Path) -> list[int]:
    """The steps that are committed on the disk tier."""
    manifests = [json.loads(path.read_text()) for path in (folder / "disk").glob("*/step_*/manifest.json")]
    return sorted(manifest["step"] for manifest in manifests if manifest["kind"] == "manifest")


@pytest.fixture
def which(tmp_path: Path, memory_dir: Path) -> dict[str, Any]:
    return recipe(tmp_path, memory_dir)


@pytest.fixture
def checkpointer(which: dict[str, Any]) -> Iterator[TieredCheckpointer]:
    with TieredCheckpointer.from_recipe(which) as opened:
        yield opened


# ---- policies


def test_each_tier_is_saved_when_its_own_policy_says_so(tmp_path: Path, memory_dir: Path) -> None:
    policy = {"any": [{"at_steps": [0, 5]}, {"all": [{"every_n_steps": 3}, {"every_n_steps": 4}]}]}
    which = recipe(tmp_path, memory_dir, memory={"save": {"every_n_steps": 2}}, disk={"save": policy})
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        saved: dict[int, tuple[str, ...]] = {}
        for step in range(13):
            handle = checkpointer.maybe_save(step, state(float(step)))
            if handle is not None:
                saved[step] = handle.tiers
                assert handle.step == step
                for tier in handle.tiers:
                    handle.wait(tier)
        both = ("memory", "disk")
        only = ("memory",)
        assert saved == {0: both, 2: only, 4: only, 5: both, 6: only, 8: only, 10: only, 12: both}
    assert committed(tmp_path) == [0, 5, 12]
    assert set(steps(memory_dir)) >= {10, 12}


def test_the_end_is_saved_once_at_a_normal_exit_and_never_after_an_exception(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, disk={"save": {"any": [{"every_n_steps": 4}, "on_end"]}})
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        for step in range(1, 7):
            checkpointer.maybe_save(step, state(float(step)))
    assert committed(tmp_path) == [4, 6]
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        target = state()
        assert checkpointer.restore(target) == 6
        checkpointer.maybe_save(8, target)
    assert committed(tmp_path) == [4, 6, 8], "step 8 was saved by its period, so the end added nothing"

    def diverge() -> None:
        with TieredCheckpointer.from_recipe(which) as checkpointer:
            checkpointer.maybe_save(9, state(9.0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        diverge()
    assert committed(tmp_path) == [4, 6, 8]


def test_where_nothing_is_left_to_do_the_end_that_was_not_saved_is_brought_to_safety(
    tmp_path: Path, memory_dir: Path
) -> None:
    which = recipe(tmp_path, memory_dir, disk={"save": "on_end"})
    checkpointer = TieredCheckpointer.from_recipe(which)
    for step in (1, 2, 3):
        handle = checkpointer.maybe_save(step, state(float(step)))
        assert handle is not None
        handle.wait("memory")
    checkpointer.abandon()
    assert not committed(tmp_path)
    for _ in range(2):
        with TieredCheckpointer.from_recipe(which) as checkpointer:
            target = state()
            assert checkpointer.restore(target) == 3
            assert bits(target) == bits(state(3.0))
        assert committed(tmp_path) == [3]


def test_without_on_end_a_normal_exit_saves_nothing_more(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory={"save": {"every_n_steps": 2}}, disk={"save": {"every_n_steps": 2}})
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.maybe_save(step, state(float(step)))
    assert committed(tmp_path) == [2], "and the exit waits for the drain"
    assert set(steps(memory_dir)) == {2}


def test_metrics_decide_what_is_kept(tmp_path: Path, memory_dir: Path) -> None:
    keep = {"any": [{"best": {"metric": "loss", "mode": "min", "n": 1}}, {"latest": 1}]}
    which = recipe(tmp_path, memory_dir, disk={"keep": keep, "save": {"every_n_steps": 1}})
    losses: list[Any] = [0.9, torch.tensor(0.2), float("nan"), 0.5, float("-inf"), 0.7]
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        for step, loss in enumerate(losses, start=1):
            handle = checkpointer.maybe_save(step, state(float(step)), metrics={"loss": loss, "accuracy": 1})
            assert handle is not None
            handle.wait("disk")
        with pytest.raises(PolicyError, match=r"metric 'loss' not in metrics; have \['los'\]"):
            checkpointer.maybe_save(7, state(), metrics={"los": 0.1})
        with pytest.raises(PolicyError, match="metric 'loss' must be a number, got str 'low'"):
            checkpointer.save(7, state(), metrics={"loss": "low"})  # type: ignore[dict-item]
        assert checkpointer.latest() == 6
        end = time.monotonic() + 20  # the commit is told before retention
        while committed(tmp_path) != [2, 6] and time.monotonic() < end:
            time.sleep(0.02)
    assert committed(tmp_path) == [2, 6], "the best and the newest"
    manifest = json.loads((step_dir(tmp_path / "disk", 2) / "manifest.json").read_text())
    assert manifest["metrics"] == {"loss": pytest.approx(0.2), "accuracy": 1.0}


# ---- save


def test_a_save_can_name_its_tiers(tmp_path: Path, memory_dir: Path, checkpointer: TieredCheckpointer) -> None:
    assert checkpointer.save(1, state(1.0), ["memory"]).tiers == ("memory",)
    handle = checkpointer.save(2, state(2.0), ["disk"])
    handle.wait("disk")
    assert committed(tmp_path) == [2]
    for tiers in (["dsik"], ["memory", "s3"], "disk"):
        with pytest.raises(ConfigError) as caught:
            checkpointer.save(3, state(), tiers)
        assert "['memory', 'disk']" in str(caught.value)
        assert (repr(tiers) if isinstance(tiers, str) else repr(tiers[-1])) in str(caught.value)
    assert set(steps(memory_dir)) == {1, 2}


def test_a_step_is_written_once_and_a_second_save_adds_what_the_first_lacked(
    tmp_path: Path, memory_dir: Path, checkpointer: TieredCheckpointer
) -> None:
    first = checkpointer.save(1, state(1.0), ["memory"])
    again = checkpointer.save(1, state(99.0), ["disk"], metrics={"loss": 0.5})
    assert again is first
    assert again.tiers == ("memory", "disk")
    again.wait("disk")
    third = checkpointer.save(1, state(99.0))
    assert third is first
    assert len(list(memory_dir.glob("*/step_*"))) == 1
    for wipe in (False, True):
        if wipe:
            shutil.rmtree(step_dir(memory_dir, 1))
        target = state()
        assert checkpointer.restore(target) == 1
        assert target["values"] == {"epoch": 1.0}
    manifest = json.loads((step_dir(tmp_path / "disk", 1) / "manifest.json").read_text())
    assert manifest["metrics"] == {"loss": 0.5}


def test_a_lower_step_needs_a_restore_first(checkpointer: TieredCheckpointer, memory_dir: Path) -> None:
    for step in (10, 11, 12):
        checkpointer.save(step, state(float(step)), ["memory"])
    with pytest.raises(StructureError, match=r"step 11 is below step 12.*restore\(state, step=…\)"):
        checkpointer.save(11, state(99.0))
    assert checkpointer.latest() == 12
    target = state()
    assert checkpointer.restore(target, 11) == 11
    checkpointer.save(11, state(11.5), ["memory"]).wait("memory")
    assert checkpointer.latest() == 11
    assert checkpointer.restore(target) == 11
    assert target["values"] == {"epoch": 11.5}


def test_a_roll_back_leaves_the_later_steps_behind_for_good(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory={"keep": {"latest": 6}})
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        for step in (1, 2, 3, 4):
            checkpointer.save(step, state(float(step))).wait("memory")
        target = state()
        assert checkpointer.restore(target, step=2) == 2
        assert target["values"] == {"epoch": 2.0}
    # The job dies before its first save on the new line.
    for _ in range(2):
        with TieredCheckpointer.from_recipe(which) as checkpointer:
            assert checkpointer.latest() == 2
            target = state()
            assert checkpointer.restore(target) == 2
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        assert checkpointer.restore(state()) == 2
        checkpointer.save(3, state(3.5)).wait("memory")
        assert checkpointer.latest() == 3
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        target = state()
        assert checkpointer.restore(target) == 3
        assert target["values"] == {"epoch": 3.5}
        assert checkpointer.restore(target, step=4) == 4, "what was left behind can still be named"
        assert target["values"] == {"epoch": 4.0}


def test_a_save_before_the_restore_begins_a_line_above_the_old_one(which: dict[str, Any]) -> None:
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(50, state(50.0)).wait("disk")
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        handle = checkpointer.maybe_save(1, state(1.0))
        assert handle is not None
        handle.wait("memory")
        target = state()
        assert checkpointer.restore(target) == 1
        assert target["values"] == {"epoch": 1.0}
        assert checkpointer.restore(target, step=50) == 50


# ---- restore


class Asked:
    """A Stateful object that tells what was called on it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.value = torch.ones(3)

    def state_dict(self) -> dict[str, Any]:
        self.calls.append("state_dict")
        return {"value": self.value}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        self.calls.append("load_state_dict")


def training(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer, {"train": TrainState(model, optimizer), "log": {"losses": []}}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, log: list[float], count: int) -> None:
    for _ in range(count):
        loss = model(torch.linspace(0, 1, 12).view(3, 4)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log.append(loss.item())


def test_when_nothing_was_ever_saved_nothing_is_called_and_nothing_changes(checkpointer: TieredCheckpointer) -> None:
    model, optimizer, held = training(1)
    before, asked = bits(model.state_dict()), Asked()
    held["asked"] = asked
    assert checkpointer.latest() is None
    assert checkpointer.restore(held) is None
    assert checkpointer.restored is None
    assert asked.calls == []
    assert not optimizer.state, "asking a fresh optimizer for its state would have made a step"
    assert bits(model.state_dict()) == before
    with pytest.raises(CheckpointNotFoundError, match="step 3 is on no tier"):
        checkpointer.restore(held, step=3)
    assert asked.calls == []
    assert not optimizer.state


def test_a_fresh_optimizer_gets_the_state_it_never_had(which: dict[str, Any]) -> None:
    whole = training(1)
    train(*whole[:2], whole[2]["log"]["losses"], 6)
    model, optimizer, held = training(1)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        train(model, optimizer, held["log"]["losses"], 3)
        checkpointer.save(3, held).wait("memory")
        train(model, optimizer, held["log"]["losses"], 1)
        other_model, other, state_of_other = training(2)
        assert checkpointer.restore(state_of_other) == 3
        assert {float(entry["step"]) for entry in other.state.values()} == {3.0}
        train(other_model, other, state_of_other["log"]["losses"], 3)
    assert bits(other_model.state_dict()) == bits(whole[0].state_dict())
    assert bits(other.state_dict()) == bits(whole[1].state_dict())
    assert state_of_other["log"] == whole[2]["log"]


def test_a_state_from_before_the_first_step_restores_to_an_optimizer_without_state(which: dict[str, Any]) -> None:
    model, optimizer, held = training(1)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(0, held).wait("memory")
        assert not optimizer.state
        train(model, optimizer, [], 2)
        assert checkpointer.restore(held) == 0
        assert not optimizer.state


def test_the_newest_is_seen_on_any_tier(which: dict[str, Any], memory_dir: Path, tmp_path: Path) -> None:
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        assert checkpointer.latest() is None
        checkpointer.save(1, state(1.0)).wait("disk")
        checkpointer.save(2, state(2.0), ["memory"]).wait("memory")
        assert checkpointer.latest() == 2
    shutil.rmtree(memory_dir / which["namespace"])
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        assert checkpointer.latest() == 1
        target = state()
        assert checkpointer.restore(target) == 1
        assert checkpointer.restored is not None
        assert (checkpointer.restored.step, checkpointer.restored.tier) == (1, "disk")
        assert checkpointer.restored.bytes > 0
        assert checkpointer.restored.secs > 0


# ---- handles and ends


def test_a_handle_tells_of_each_tier(checkpointer: TieredCheckpointer, tmp_path: Path) -> None:
    handle = checkpointer.save(4, state(4.0))
    assert handle.step == 4
    assert handle.tiers == ("memory", "disk")
    assert 0 < handle.blocked_secs < 30
    with pytest.raises(DeadlineExceededError, match=r"not complete after 0\.0 s .step 4, tier disk.*wait again"):
        handle.wait("disk", timeout=0.0)
    assert handle.exception("disk") is None
    handle.wait("memory", timeout=20)
    handle.wait("disk", timeout=30)
    assert handle.done("memory")
    assert handle.done("disk")
    assert handle.exception("memory") is None
    assert handle.exception("disk") is None
    assert repr(handle) == "SaveHandle(step=4, {'memory': 'complete', 'disk': 'complete'})"
    for ask in (handle.done, handle.exception, handle.wait):
        with pytest.raises(ConfigError, match=r"tier 'dsik' is not among those of this save: \['memory', 'disk'\]"):
            ask("dsik")


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_save_that_fails_behind_the_loop_is_told_once_and_stops_it_only_if_asked(
    on_error: str, tmp_path: Path, memory_dir: Path
) -> None:
    which = recipe(tmp_path, memory_dir, on_error=on_error, unreachable="use_memory")
    checkpointer = TieredCheckpointer.from_recipe(which)
    root = tmp_path / "disk" / which["namespace"]
    shutil.rmtree(root)
    root.write_text("no directory")
    handle = checkpointer.save(1, state(1.0))
    with pytest.raises(TieredError) as caught:
        handle.wait("disk")
    assert (caught.value.step, caught.value.tier) == (1, "disk")
    if on_error == "raise":
        with pytest.raises(type(caught.value)) as delivered:
            checkpointer.save(2, state(2.0), ["memory"])
        assert (delivered.value.step, delivered.value.tier) == (1, "disk")
    checkpointer.save(3, state(3.0), ["memory"]).wait("memory")
    assert checkpointer.restore(state()) == 3
    checkpointer.close()
    events = [json.loads(line) for path in memory_dir.rglob("events/rank-*.jsonl") for line in path.open()]
    failed = [event for event in events if event["event"] == "SaveFailed"]
    assert [(event["step"], event["tier"]) for event in failed] == [(1, "disk")]


def test_a_checkpointer_is_closed_once_and_says_so_afterwards(which: dict[str, Any], memory_dir: Path) -> None:
    checkpointer = TieredCheckpointer.from_recipe(which)
    checkpointer.save(1, state(1.0))
    checkpointer.close()
    checkpointer.close()
    for call in (
        lambda: checkpointer.save(2, state()),
        lambda: checkpointer.maybe_save(2, state()),
        lambda: checkpointer.prepare(state()),
        lambda: checkpointer.restore(state()),
        lambda: checkpointer.latest(),
        lambda: checkpointer.wait(),
        lambda: checkpointer.finish(),
        lambda: checkpointer.preempted,
    ):
        with pytest.raises(ConfigError, match=r"this TieredCheckpointer is closed\. Open another one"):
            call()
    writer = TieredStorageWriter(which, step=2)
    writer.close()
    writer.close()
    with pytest.raises(ConfigError, match="this TieredStorageWriter is closed"):
        writer.stage(state())
    assert set(steps(memory_dir)) == {1}


def test_users_of_one_recipe_share_one_engine_until_the_last_has_closed(which: dict[str, Any]) -> None:
    first, second = TieredCheckpointer.from_recipe(which), TieredCheckpointer.from_recipe(dict(which))
    assert first._engine is second._engine
    first.save(1, state(1.0)).wait("memory")
    first.close()
    first.close()
    second.save(2, state(2.0)).wait("memory")
    assert second.latest() == 2
    second.close()


# ---- processes


def _in_child(action: Any) -> str:
    """Return what *action* raises in a forked child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
            text = "nothing was raised"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


class _Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        return index


def _forks(rank: int, which: dict[str, Any]) -> None:
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, state(1.0)).wait("disk")
        for action in (
            lambda: checkpointer.save(2, state(2.0)),
            lambda: checkpointer.restore(state()),
            lambda: checkpointer.prepare(state()),
        ):
            text = _in_child(action)
            assert text.startswith(f"ConfigError: opened in process {os.getpid()}, used in process "), text
            assert "Open it after the fork" in text
        assert _in_child(checkpointer.close) == "nothing was raised"
        assert checkpointer.latest() == 1
        step = 1
        loader = torch.utils.data.DataLoader(
            _Numbers(), batch_size=3, num_workers=2, multiprocessing_context="fork", persistent_workers=True
        )
        for _ in range(3):
            for batch in loader:
                step += 1
                saved = {"w": torch.full((50,), float(step)), "batch": batch}
                handle = checkpointer.save(step, saved)
                saved["w"].fill_(-1)
                handle.wait("memory")
                target = {"w": torch.zeros(50), "batch": torch.zeros(3, dtype=torch.int64)}
                assert checkpointer.restore(target) == step
                assert target["w"].eq(step).all()
        assert step == 13
    random.seed()


def test_a_fork_is_refused_and_workers_that_fork_do_no_harm(which: dict[str, Any]) -> None:
    run(0, _forks, which)


# ---- what can't be stored


def test_a_value_that_only_a_pickle_could_store_is_refused_with_its_place(
    checkpointer: TieredCheckpointer, memory_dir: Path
) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"a": {"b": [1, {"c": _in_child}]}}, "a.b.1.c: function"),
        ({"a": (1, [2, {"k": Asked}])}, "a[1][1]['k']: type"),
        ({"per_rank": {"x": {1, Asked, 3}}}, "per_rank.00000.x key"),
        ({"a": random.Random()}, "a: random.Random"),
    ]
    for more, place in bad:
        with pytest.raises(UnsafeValueError) as caught:
            checkpointer.save(1, {**state(), **more})
        assert place in str(caught.value)
        assert "allow_pickle: true" in str(caught.value)
    with pytest.raises(UnsafeValueError, match=r"a\.hook: function can't be stored, not even by a pickle.*Remove it"):
        checkpointer.save(1, {**state(), "a": {"hook": lambda: 1}})
    assert not steps(memory_dir)


# ---- the budget of the memory tier


def _room_for(count: int) -> dict[str, Any]:
    return {"budget": f"{count}KiB", "keep": {"latest": 1}}


def test_a_budget_that_is_too_small_is_told_before_anything_is_saved(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory=_room_for(64))
    big = {"w": torch.zeros(10_000)}
    with (
        TieredCheckpointer.from_recipe(which) as checkpointer,
        pytest.raises(ConfigError, match=r"tiers.memory.budget is 64.0 KiB") as caught,
    ):
        checkpointer.save(1, big)
    assert "Raise the budget to" in str(caught.value)
    assert not steps(memory_dir)
    writer = TieredStorageWriter(which, step=1)
    with pytest.raises(CheckpointException, match="budget"):
        dcp.save(big, storage_writer=writer, no_dist=False)
    writer.close()
    assert not steps(memory_dir)
    assert committed(tmp_path) == []


def test_a_state_that_outgrows_the_budget_is_streamed_until_it_fits_again(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory=_room_for(64), disk={"save": {"every_n_steps": 1}})
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        for step, count in ((1, 100), (2, 20_000), (3, 20_000), (4, 100)):
            handle = checkpointer.save(step, {"w": torch.full((count,), float(step))})
            handle.wait("disk")
            assert handle.exception("disk") is None
            over = step in (2, 3)
            assert handle.skipped("memory") == over
            assert ("budget" in str(handle.exception("memory"))) == over
        found = {"w": torch.zeros(20_000)}
        assert checkpointer.restore(found, step=3) == 3
        assert torch.equal(found["w"], torch.full((20_000,), 3.0))
