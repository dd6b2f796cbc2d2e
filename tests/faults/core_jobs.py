"""Whole jobs over forked ranks, small enough to be killed a thousand times: what the crash tests run and ask.

Every state tells which save it came from, and a history outside of the engine's reach notes what was begun, what was
acknowledged and what was restored. So a restore can be judged: it must give, bit for bit, something that was saved,
and nothing older than what was acknowledged.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import struct
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sm_tiered import drain as drain_module
from sm_tiered import drainer, layout
from sm_tiered.errors import RankFailedError
from sm_tiered.group import Group
from sm_tiered.handle import SaveHandle
from sm_tiered.locks import FileLock
from sm_tiered.recipe import Recipe
from sm_tiered.settings import S3Settings, Settings
from sm_tiered.testing.plain import PlainEngine
from sm_tiered.testing.ranks import RankResult, run_ranks
from tests.waiting import WAIT_SECS, wait_until

NAMESPACE = "run-1"
SIZE = 20_000
"""Of one rank's state, in bytes."""
_HEAD = struct.Struct("!QQQ")


def state(run: int, step: int, rank: int, size: int = SIZE) -> bytes:
    """Return the bytes that *rank* saves as *step* in *run*: no two are alike, and each tells what it is."""
    return _HEAD.pack(run, step, rank) + random.Random(f"{run}/{step}/{rank}").randbytes(size - _HEAD.size)


def origin(data: bytes, rank: int) -> tuple[int, int]:
    """Return run and step that *data*, restored by *rank*, was saved by; a single wrong byte fails."""
    run, step, saved_rank = _HEAD.unpack_from(data)
    assert saved_rank == rank, f"rank {rank} was given the part of rank {saved_rank}"
    assert data == state(run, step, rank, len(data)), f"run {run}, step {step}, rank {rank}: other bytes than saved"
    return run, step


@dataclass(frozen=True)
class Job:
    """One namespace in one directory; the tiers are called ``memory`` and, where there is one, ``durable``."""

    root: Path
    world: int = 1
    nodes: int = 1
    keep: int = 1
    durable_keep: int = 2
    in_memory: bool = True
    """Whether there is a memory tier."""
    s3: Mapping[str, Any] | None = None
    """Fields of the S3 tier; None: the durable tier is a directory."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Top-level fields of the recipe."""

    def memory(self, node: int = 0) -> Path:
        """Where the memory tier of *node* is."""
        return self.root / f"memory-{node}"

    @property
    def durable(self) -> Path:
        """Where the durable tier is, when it is a directory."""
        return self.root / "durable"

    def recipe(self, rank: int = 0, *, memory: Path | None = None) -> dict[str, Any]:
        """Return the recipe of *rank*; ranks of different nodes have different memory paths."""
        durable = {"kind": "s3", **self.s3} if self.s3 else {"kind": "local", "path": str(self.durable), "fsync": False}
        near = {
            "kind": "memory",
            "path": str(memory or self.memory(rank % self.nodes)),
            "allow_disk": True,
            "keep": {"latest": self.keep},
        }
        return {
            "version": 1,
            "namespace": NAMESPACE,
            "group_timeout_secs": WAIT_SECS,
            "drain_timeout_secs": WAIT_SECS,
            "in_use_wait_secs": 2,
            "tiers": {
                **({"memory": near} if self.in_memory else {}),
                "durable": {**durable, "keep": {"latest": self.durable_keep}},
            },
            **self.options,
        }

    def settings(self, rank: int = 0, *, memory: Path | None = None) -> Settings:
        """Return what the recipe of *rank* stands for."""
        return Recipe.parse(self.recipe(rank, memory=memory)).settings()

    def open(self, group: Group, *, memory: Path | None = None) -> PlainEngine:
        """Open the engine of *group*'s rank. Collective."""
        return PlainEngine(self.settings(group.rank, memory=memory), group)

    def run(self, work: Callable[[Group], object], *, world: int | None = None) -> list[RankResult]:
        """Run *work* on all ranks, which live and die together."""

        def together(group: Group) -> object:
            with one_fate(group):
                return work(group)

        return run_ranks(world or self.world, together)

    def work(self, work: Callable[[PlainEngine], object], *, world: int | None = None) -> list[Any]:
        """Run *work* with an open engine on all ranks, and return what each returned; none may fail."""

        def opened(group: Group) -> object:
            engine = self.open(group)
            try:
                return work(engine)
            finally:
                engine.close()

        results = self.run(opened, world=world)
        assert [result.status for result in results] == [0] * len(results)
        return [result.value for result in results]

    def wipe(self, node: int = 0) -> None:
        """Lose what *node* had in memory."""
        shutil.rmtree(self.memory(node), ignore_errors=True)

    def wipe_steps(self, node: int = 0) -> None:
        """Lose all checkpoints that *node* has in memory, and nothing else."""
        for path in self.store_dir("memory", node).glob("step_*"):
            shutil.rmtree(path)

    def store_dir(self, tier: str = "memory", node: int = 0) -> Path:
        """Return the directory of the namespace on a tier that is a directory."""
        return (self.memory(node) if tier == "memory" else self.durable) / NAMESPACE

    def step_dirs(self, tier: str = "memory", node: int = 0) -> dict[int, Path]:
        """Return the directories of the newest attempt of each step."""
        root = self.store_dir(tier, node)
        found = sorted(c for c in map(layout.parse_checkpoint_dir, os.listdir(root)) if c)
        return {checkpoint.step: root / layout.checkpoint_dir(checkpoint) for checkpoint in found}

    def events(self) -> list[dict[str, Any]]:
        """Return every event that was told in the memory tiers, as the files hold them."""
        files = sorted(path for node in range(self.nodes) for path in (self.store_dir("memory", node)).glob("events/*"))
        return [json.loads(line) for path in files for line in path.read_text().splitlines()]

    @contextmanager
    def no_drainer(self, node: int = 0, *, at: Path | None = None) -> Generator[None, None, None]:
        """Keep any drainer of *node*, or of the memory tier *at* a path, from starting meanwhile."""
        memory = at or self.memory(node)
        locks = memory / NAMESPACE / layout.LOCKS
        for path in (memory, locks.parent, locks):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FileLock(locks / drainer.DRAINER_LOCK)
        assert lock.acquire(timeout_secs=WAIT_SECS)
        try:
            yield
        finally:
            lock.release()

    def drain(self, *, node: int = 0, prepare: Callable[[], object] = lambda: None) -> int:
        """Drain in a forked process, which calls *prepare* first, until nothing is left; return its status."""
        return drain(self.memory(node), prepare=prepare)

    def queued(self, node: int = 0) -> list[str]:
        """Return the names of the entries that are waiting, each once, though two stand there while one is renamed."""
        directory = self.store_dir("memory", node) / layout.QUEUE
        found = [path.name for state in ("promote", "commit") for path in directory.glob(f"{state}-step_*")]
        return sorted({name.partition("-")[2]: name for name in found}.values())

    def await_drained(self, node: int = 0) -> None:
        """Wait until the queue of *node* is empty."""
        wait_until(lambda: not self.queued(node), "the queue is not empty")


def s3_fields(settings: S3Settings) -> dict[str, Any]:
    """Return *settings* as the fields of a recipe, with little patience."""
    return {
        "uri": f"s3://{settings.bucket}/{settings.prefix}",
        "endpoint_url": settings.endpoint_url,
        "allow_http": True,
        "region": settings.region,
        "force_path_style": settings.force_path_style,
        "part_size": f"{settings.part_bytes}B",
        "request_timeout_secs": settings.request_timeout_secs,
        "retry": {"attempts": settings.retry_attempts, "deadline_secs": settings.retry_deadline_secs},
    }


def drain(memory: Path, *, prepare: Callable[[], object] = lambda: None) -> int:
    """Run the drainer of *memory* in a forked process until nothing is left; return its status."""

    def work() -> None:
        # At the lowest priority a test takes many times as long where others run beside it.
        drainer._NICE, drainer._IDLE_SECS, drain_module._LAST_TRY_SECS = 0, 0.0, 0.0
        prepare()
        drainer.main([str(memory), NAMESPACE])

    return in_child(work)


def in_child(work: Callable[[], object]) -> int:
    """Run *work* in a forked process and return its status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


@contextmanager
def one_fate(group: Group) -> Iterator[None]:
    """Kill this rank as soon as another one has died, as a launcher does."""
    pids = group.gather(os.getpid())
    others = [os.pidfd_open(pid) for pid in pids if pid != os.getpid()]
    over = threading.Event()

    def watch() -> None:
        poll = select.poll()
        for descriptor in others:
            poll.register(descriptor, select.POLLIN)
        while not over.is_set():
            if poll.poll(100) and not over.is_set():
                os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
        over.set()
        group.gather(None)
    except RankFailedError:
        # A rank is dead, and this one was told sooner than the launcher would have killed it.
        if select.select(others, [], [], 1.0)[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        raise


Save = tuple[int, int]
"""Run and step."""


class History:
    """What the ranks of all runs of a job noted: one appended line each, out of the engine's reach."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, what: str, save: Save | None) -> None:
        """Note that *save* was ``begun`` or ``acked``, or that a restore gave it (``restored``, None: nothing)."""
        run, step = save or (-1, -1)
        _write(self._fd, f"{what} {run} {step}\n".encode())

    def allowed(self) -> set[Save | None]:
        """Return what a restore may give now; None: that nothing was ever saved.

        What was acknowledged, or restored once, is never lost again and nothing older comes back; a save that was
        begun since may be there or not.
        """
        allowed: set[Save | None] = {None}
        for line in os.pread(self._fd, 10_000_000, 0).decode().splitlines():
            what, run, step = line.split()
            save = (int(run), int(step))
            if what == "begun":
                allowed.add(save)
            elif what == "restored":
                allowed = {save if save != (-1, -1) else None}
            else:
                newer: set[Save | None] = {other for other in allowed if other is not None and other > save}
                allowed = newer | {save}
        return allowed


_write = os.write


def killed(results: list[RankResult]) -> bool:
    """Whether SIGKILL ended the ranks; anything else than that or a good end fails."""
    statuses = {result.status for result in results}
    assert statuses <= {0, signal.SIGKILL}, f"ranks ended with {statuses}"
    return signal.SIGKILL in statuses


def script(
    history: History, run: int, *, saves: int = 2, promotes: int = 0, restores: bool = True, size: int = SIZE
) -> Callable[[PlainEngine], int]:
    """Return the work of one run: restore and judge that, then save *saves* steps, the last *promotes* to all tiers.

    The work returns the step that was restored.
    """

    def work(engine: PlainEngine) -> int:
        start = judged_restore(engine, history) if restores else 0
        for step in range(start + 1, start + saves + 1):
            noted_save(engine, history, run, step, promote=step > start + saves - promotes, size=size)
        return start

    return work


def judged_restore(engine: PlainEngine, history: History, step: int | None = None) -> int:
    """Restore, fail if that gives other bytes or another save than it may, and return the step; 0 for none."""
    allowed = history.allowed()
    found = engine.restore(step)
    save = None if found is None else origin(found[1], engine.group.rank)
    assert found is None or save is None or found[0] == save[1], f"step {found[0]}, bytes of {save}"
    assert save in allowed, f"restored {save}, allowed are {allowed}"
    if engine.group.rank == 0:
        history.note("restored", save)
    return found[0] if found else 0


def noted_save(
    engine: PlainEngine, history: History, run: int, step: int, *, promote: bool = False, size: int = SIZE
) -> SaveHandle:
    """Save into memory, or to *promote* to all tiers; wait until it is safe on the first of them, and note both."""
    rank, first = engine.group.rank, engine.settings.tiers[0].name
    if rank == 0:
        history.note("begun", (run, step))
    handle = engine.save(step, state(run, step, rank, size), tiers=None if promote else [first], urgent=promote)
    handle.wait(first)
    history.note("acked", (run, step))
    return handle


def agreed(results: list[RankResult]) -> Any:
    """Return what all ranks returned: they must be alike, and none may have failed."""
    assert [result.status for result in results] == [0] * len(results)
    assert len({str(result.value) for result in results}) == 1, f"the ranks differ: {results}"
    return results[0].value
