"""Hypothesis drives whole jobs against a dictionary model.

After whatever went wrong, a restore gives exactly the newest checkpoint that the model says can be had, byte for byte,
or says, rightly, that there is none.
"""

from __future__ import annotations

import errno
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sm_tiered import layout
from sm_tiered.errors import (
    CheckpointNotFoundError,
    NothingRestorableError,
    RestoreError,
    RestoreIncompleteError,
    SaveSkippedError,
)
from sm_tiered.handle import SaveHandle
from sm_tiered.records import CheckpointId
from sm_tiered.resolve import survey
from sm_tiered.restore import walk
from sm_tiered.testing.plain import PlainEngine, PlainLoader
from tests.properties.model import DURABLE, Model, Saved
from tests.properties.thread_ranks import Cluster, Job, Lost

NODES = 2
SHARES = st.sampled_from([(0,), (0, 1), (0, 1, 0), (1,), (1, 0), (0, 0)])
"""The nodes that ranks are launched on; `(1, 0)` is `(0, 1)` with the nodes swapped."""
HARMS = ("flip", "zero", "truncate", "delete", "swap")
DYING = ("before_copy", "before_publish", "after_copy", "before_record", "before_enqueue")


def content(number: int, rank: int) -> bytes:
    """Return the bytes of one save of one rank: no two are alike; few sizes, so that files are recycled."""
    return random.Random(f"{number}/{rank}").randbytes((300, 310, 5000)[number % 3])


class TieredMachine(RuleBasedStateMachine):
    """At most one job at a time, on one or two nodes."""

    def __init__(self) -> None:
        super().__init__()
        room = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.root = Path(tempfile.mkdtemp(prefix="sm_tiered-machine-", dir=room))
        self.job: Job | None = None
        self.handles: list[tuple[Saved, list[SaveHandle]]] = []
        self.patches = ExitStack()
        self.saves = 0
        self.step = 0

    @initialize(
        keep=st.integers(1, 3),
        durable_keep=st.integers(1, 3),
        placement=SHARES,
        promoted=st.lists(st.booleans(), max_size=4),
    )
    def begin(self, keep: int, durable_keep: int, placement: tuple[int, ...], promoted: list[bool]) -> None:
        """Launch for the first time and save a few steps: what goes wrong needs something to go wrong with."""
        self.cluster = Cluster(self.root, nodes=NODES, keep=keep, durable_keep={"latest": durable_keep})
        self.model = Model(self.cluster)
        self.patches.enter_context(self.cluster.clock())
        self.launch(placement, restores=True)
        self.train(promoted)

    def teardown(self) -> None:
        try:
            self._end()
        finally:
            self.patches.close()
            shutil.rmtree(self.root, ignore_errors=True)

    # ---- jobs

    @property
    def _job(self) -> Job:
        assert self.job is not None
        return self.job

    def _end(self, *, settle: bool = True) -> None:
        if self.job is not None:
            if settle:
                self.job.settle()
            self.job.end()
            self.job = None
            self.handles.clear()

    @rule(placement=SHARES, restores=st.sampled_from([True, True, True, False]))
    def launch(self, placement: tuple[int, ...], restores: bool) -> None:
        """Kill what runs, and start again, perhaps with another world on other nodes."""
        self._end()
        self.job = self.cluster.launch(placement)
        if restores:
            self._restore()

    @rule(placement=SHARES)
    @precondition(lambda self: self.job is not None)
    def crash_and_resume(self, placement: tuple[int, ...]) -> None:
        """The commonest case of `launch`, once more: the same ranks come back."""
        self.launch(self._job.placement or placement, restores=True)

    # ---- saves

    @rule(gap=st.integers(1, 3), promote=st.booleans(), urgent=st.booleans())
    @precondition(lambda self: self.job is not None)
    def save(self, gap: int, promote: bool, urgent: bool) -> None:
        saved, handles = self._save(gap, promote=promote, urgent=promote and urgent)
        self.handles.append((saved, handles))
        self._settled(saved, handles)

    @rule(promoted=st.lists(st.booleans(), min_size=1, max_size=3))
    @precondition(lambda self: self.job is not None)
    def train(self, promoted: list[bool]) -> None:
        """Some saves, all drained."""
        for promote in promoted:
            self.save(1, promote, urgent=False)
            self.drain([0, 1], rounds=6, pause_secs=2.5, fresh=False)

    @rule()
    @precondition(lambda self: self.job is not None)
    def save_and_drain(self) -> None:
        """Nothing stands in the way of this one: it must become durable."""
        saved, handles = self._save(1, promote=True, urgent=True)
        self._settled(saved, handles)
        self.cluster.drain(range(NODES), rounds=12)
        self.model.look()
        assert saved.manifest is not None, [handle.exception("durable") for handle in handles]

    @rule(victims=st.integers(1, 7))
    @precondition(lambda self: self.job is not None)
    def save_with_ranks_that_fail(self, victims: int) -> None:
        """Some ranks can't copy their share; the step is lost for all, and the job goes on."""
        failing = [engine for engine in self._job.engines if victims >> engine.group.rank & 1]
        stages = [engine.saver._stager.stage for engine in failing]

        def fail(*given: object) -> None:
            raise OSError(errno.ENOSPC, "no room")

        for engine in failing:
            engine.saver._stager.stage = fail  # type: ignore[assignment]
        _, handles = self._save(1, promote=False, urgent=False)
        for engine, stage in zip(failing, stages, strict=True):
            engine.saver._stager.stage = stage
        self._job.settle()
        self.model.look()
        if failing:
            assert all(handle.done("memory") and handle.exception("memory") is not None for handle in handles)

    @rule(gap=st.integers(1, 3), promote=st.booleans(), how=st.sampled_from(DYING), victims=st.integers(1, 7))
    @precondition(lambda self: self.job is not None)
    def save_and_crash(self, gap: int, promote: bool, how: str, victims: int) -> None:
        """Some ranks die in the middle of a save, the others after they have done their share."""
        dying = [rank for rank in range(self._job.world) if victims >> rank & 1] or [0]
        for rank in dying:
            self._doom(self._job.engines[rank], how)
        try:
            saved, handles = self._save(gap, promote=promote, urgent=promote)
        except Lost:
            handles, saved = [], self.model.timeline[-1]
        self._job.settle([rank for rank in range(self._job.world) if rank not in dying or how == "before_enqueue"])
        self.model.look()
        if handles and how == "before_enqueue" and all(handle.exception("memory") is None for handle in handles):
            self.model.acknowledge(saved)
        placement = self._job.placement
        self._end(settle=False)
        self.launch(placement, restores=True)

    def _doom(self, engine: PlainEngine, how: str) -> None:
        """Let *engine*'s rank die at that place of its next save."""
        stager, stage = engine.saver._stager, engine.saver._stager.stage

        def die(*given: object, **named: object) -> None:
            raise Lost

        if how == "before_copy":
            stager.stage = die  # type: ignore[assignment]
        elif how == "before_publish":
            assert engine.store.arena is not None
            engine.store.arena.publish = die
        elif how == "after_copy":
            stager.stage = lambda *given: die(stage(*given))  # type: ignore[assignment, return-value]
        elif how == "before_record":
            engine.saver._worker.submit = lambda job: None
        else:
            engine.saver._promotions.enqueue = lambda checkpoint, tiers, *, ranks=None: None

    @rule(tiers=st.sampled_from([["memory"], ["memory", "durable"]]))
    @precondition(lambda self: self.job is not None and self._repeatable() is not None)
    def save_again(self, tiers: list[str]) -> None:
        """A step is written once in an attempt: the second save of it changes nothing."""
        saved = self._repeatable()
        assert saved is not None
        self._job.each(lambda engine: engine.save(saved.id.step, content(99, engine.group.rank), tiers))
        self._job.settle()
        self.model.look()

    def _repeatable(self) -> Saved | None:
        attempt = self._job.engines[0].store.line.current
        last = self.model.timeline[-1] if self.model.timeline else None
        same = last is not None and last.acked and (last.id.attempt, last.id.step) == (attempt, self.step)
        return last if same else None

    def _save(self, gap: int, *, promote: bool, urgent: bool) -> tuple[Saved, list[SaveHandle]]:
        self.step, self.saves = self.step + gap, self.saves + 1
        job, step, number = self._job, self.step, self.saves
        tiers = ["memory", "durable"] if promote else ["memory"]
        data = {rank: content(number, rank) for rank in range(job.world)}
        handles: list[SaveHandle] = []
        try:
            handles = job.each(lambda engine: self._share(engine, step, data, tiers, urgent))
        finally:
            attempt = job.engines[0].store.line.current
            assert attempt is not None
            saved = Saved(CheckpointId(attempt=attempt, step=step), job.placement, data)
            self.model.begin(saved)
        return saved, handles

    def _share(
        self, engine: PlainEngine, step: int, data: Mapping[int, bytes], tiers: list[str], urgent: bool
    ) -> SaveHandle:
        mine = data[engine.group.rank]
        engine._size = len(mine)  # as integrations do, which know beforehand how long a part will be
        return engine.save(step, mine, tiers, urgent=urgent)

    def _settled(self, saved: Saved, handles: Sequence[SaveHandle]) -> None:
        self._job.settle()
        self.model.look()
        assert all(handle.done("memory") for handle in handles)
        errors = [handle.exception("memory") for handle in handles]
        if errors[0] is None:
            assert errors == [None] * len(errors)
            self.model.acknowledge(saved)
            return
        assert all(isinstance(error, SaveSkippedError) for error in errors), errors
        held = [entry for node in range(NODES) for entry in self.cluster.waiting(node) if not entry.sent]
        assert held, f"a save was skipped, and the drain needs no generation: {self._arenas()}"

    def _arenas(self) -> list[str]:
        """Every arena file, for the day when one is taken that nobody needs."""
        found: list[str] = []
        for engine in self._job.engines:
            assert engine.store.arena is not None
            found += [f"rank {engine.group.rank} goes on from {engine.store.generations}"]
            for slot in engine.store.arena._slots:
                file = slot.file
                found += [f"{file.path}: {slot.size} bytes, {slot.state}, {slot.checkpoint}, warming {slot.warming}"]
                found[-1] += f", {file.ask()}"
        return found

    # ---- drains

    @rule(
        nodes=st.sampled_from([[0], [1], [0, 1], [1, 0]]),
        rounds=st.integers(1, 4),
        pause_secs=st.sampled_from([2.5, 2.5, 30.0, 4000.0]),
        fresh=st.booleans(),
    )
    def drain(self, nodes: list[int], rounds: int, pause_secs: float, fresh: bool) -> None:
        """The drainers of some nodes work for some time."""
        self.cluster.drain(nodes, rounds=rounds, pause_secs=pause_secs, fresh=fresh)
        self.model.look()
        for saved, handles in self.handles:
            for handle in handles:
                if "durable" in handle.tiers and handle.done("durable") and handle.exception("durable") is None:
                    # It may be a tombstone by now.
                    manifest = self.cluster.durable / saved.dir / layout.MANIFEST
                    stands = manifest.exists() or self.model.was_harmed(saved)
                    assert stands, f"{saved.id} is acknowledged as durable and was not committed"

    @rule()
    @precondition(lambda self: self.job is not None)
    def prune(self) -> None:
        """Retention runs once more than it would."""
        store = self._job.engines[0].store
        if store.line.current is not None:
            store.prune(store.tiers.durable["durable"], CheckpointId(attempt=store.line.current, step=0))

    # ---- harm

    @rule(age=st.integers(0, 3), pick=st.integers(0, 100), how=st.sampled_from(HARMS))
    @precondition(lambda self: any(self.model.files()))
    def corrupt(self, age: int, pick: int, how: str) -> None:
        """A part, a record or a manifest on some tier is no longer what it was, more often that of a newer step."""
        files = list(self.model.files())
        directories = sorted({directory for _, directory, _ in files}, key=layout.parse_checkpoint_dir)  # type: ignore[arg-type]
        chosen = directories[-1 - age % len(directories)]
        among = [file for file in files if file[1] == chosen]
        node, directory, name = among[pick % len(among)]
        if self.job is not None and node != DURABLE and how in ("truncate", "delete", "swap"):
            how = "flip"  # the file is mapped: no job survives that somebody cuts it
        path = self.model.place(node) / directory / name
        HARM[how](path, [other for other in path.parent.parent.glob(f"step_*/{name}") if other != path])
        self.model.harm(node, directory, name)

    @rule(node=st.integers(0, NODES - 1), evict=st.booleans())
    def lose_node(self, node: int, evict: bool) -> None:
        """A node's memory is gone, and with it the job; *evict*: only the checkpoints are."""
        self._end()
        if not evict:
            self.cluster.lose(node)
            self.model.lose(node)
            return
        for found, directory, name in list(self.model.files()):
            if found == node:
                self.model.harm(node, directory, name)
        for path in self.model.place(node).glob("step_*"):
            shutil.rmtree(path)

    # ---- restores

    @rule()
    @precondition(lambda self: self.job is not None)
    def restore_again(self) -> None:
        self._job.settle()
        self._restore()

    @rule(pick=st.integers(0, 100), then_crash=st.booleans())
    @precondition(lambda self: self.job is not None and self.model.all)
    def roll_back(self, pick: int, then_crash: bool) -> None:
        """The user chooses a step, of this timeline or of one that was left behind, and perhaps dies before a save."""
        self._job.settle()
        self._restore(self.model.all[-1 - pick % len(self.model.all)].id.step)
        if self.job is None:
            return
        with pytest.raises(CheckpointNotFoundError):
            self._job.each(lambda engine: engine.restore(10**9))
        if then_crash:
            self._end()

    def _restore(self, step: int | None = None) -> None:
        expected, error = self._compared(lambda engine: engine.restore(step), step)
        if expected is None:
            if isinstance(error, RestoreIncompleteError):
                self._end()
            return
        restored = self._job.engines[0].store.restored
        assert restored is not None
        assert restored.checkpoint == expected.id
        self.model.restored(expected, chosen=step is not None)
        self.step = expected.id.step

    @invariant()
    def a_look_finds_what_the_model_says(self) -> None:
        """After every rule: what a restore would give now, without going on from it."""
        if self.job is not None:
            self.job.settle()
            self._compared(_look, None)

    def _compared(
        self, restore: Callable[[PlainEngine], tuple[int, bytes] | None], step: int | None
    ) -> tuple[Saved | None, RestoreError | None]:
        """Let all ranks *restore*, and return what that had to give and why it gave nothing; fail if it was wrong."""
        job, model = self._job, self.model
        model.look()
        model.check_owed(job.placement)
        expected = model.newest(model.timeline if step is None else model.with_step(step), job.placement)
        evidence = model.evidence(job.placement)
        found: list[tuple[int, bytes] | None] = []
        error: RestoreError | None = None
        try:
            found = job.each(restore)
        except (NothingRestorableError, CheckpointNotFoundError, RestoreIncompleteError) as raised:
            error = raised
        model.look()
        if error is not None:
            assert expected is None, f"{expected.id} can be restored, and was not: {error}"
            assert step is not None or evidence is not False, f"nothing was ever saved, and the answer was {error}"
            assert step is not None or not isinstance(error, CheckpointNotFoundError)
        elif expected is None:
            assert found == [None] * job.world, "nothing can be restored, and something was"
            assert evidence is not True, "something was saved, and the answer was that nothing ever was"
        else:
            for rank, got in enumerate(found):
                assert got is not None, (
                    f"{expected.id} can be restored, and rank {rank} was told that nothing was saved"
                )
                assert got[0] == expected.id.step, f"rank {rank} restored step {got[0]} instead of {expected.id}"
                whole = model.bytes_of(expected, rank, job.world)
                assert got[1] == whole, f"rank {rank}: other bytes than those of {expected.id}"
        return expected, error


def _look(engine: PlainEngine) -> tuple[int, bytes] | None:
    """Walk the candidates as a restore does."""
    store, loader = engine.store, PlainLoader(engine.group)
    seen = survey(store.group, store.tiers)
    found = walk(
        store.group, store.tiers, seen, loader, step=None, events=store.events, room=store.room, use_memory=False
    )
    return None if found is None else (found.step, b"".join(data for _, data in sorted(loader.parts.items())))


def _flip(path: Path, others: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) // 2] ^= 0x90
        _overwrite(path, data)


def _zero(path: Path, others: list[Path]) -> None:
    _overwrite(path, bytes(path.stat().st_size))


def _swap(path: Path, others: list[Path]) -> None:
    if others:
        path.write_bytes(sorted(others)[0].read_bytes())


def _truncate(path: Path, others: list[Path]) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _overwrite(path: Path, data: bytes | bytearray) -> None:
    """In place: the file may be mapped."""
    with path.open("r+b") as file:
        file.write(data)


HARM: dict[str, Callable[[Path, list[Path]], None]] = {
    "flip": _flip,
    "zero": _zero,
    "swap": _swap,
    "truncate": _truncate,
    "delete": lambda path, others: path.unlink(),
}

QUICK = settings(
    max_examples=25,
    stateful_step_count=25,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_a_restore_gives_the_newest_checkpoint_that_the_model_says_can_be_had() -> None:
    run_state_machine_as_test(TieredMachine, settings=QUICK)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_same_for_twenty_thousand_steps() -> None:
    """With other examples each time; what fails is printed with the blob that makes it again."""
    run_state_machine_as_test(
        TieredMachine, settings=settings(QUICK, max_examples=400, stateful_step_count=50, derandomize=False)
    )
