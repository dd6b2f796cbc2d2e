"""The engine that all integrations use: tiers opened, attempts, restore. Saving is in `sm_tiered.saving`.

One store serves one recipe in a process. Opening it, `restore`, and a due save are collective; nothing else is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sm_tiered import event_files, layout, retention
from sm_tiered.drainer import ensure_drainer
from sm_tiered.errors import ConfigError, TierError
from sm_tiered.event_log import Events
from sm_tiered.events import (
    DrainerStarted,
    MemoryTight,
    NewerAttemptSeen,
    NothingSaved,
    Pruned,
    RestoreStarted,
)
from sm_tiered.finish import Finisher
from sm_tiered.generations import Generations
from sm_tiered.group import Group, all_or_none
from sm_tiered.handout import remove_leftovers
from sm_tiered.history import History, count_failures, extremes_of
from sm_tiered.launch import agree_on_launch, probe_local_tiers, wait_for_others
from sm_tiered.line import Line
from sm_tiered.newest import newest_complete, unused_step
from sm_tiered.queue import Queue
from sm_tiered.records import CheckpointId
from sm_tiered.resolve import Survey, Tiers, survey
from sm_tiered.restore import Restored, walk
from sm_tiered.settings import MemorySettings, Settings
from sm_tiered.sources import Place, Room
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.arena import Arena
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.budget import check_budget
from sm_tiered.tiers.memory import MemoryTier
from sm_tiered.voted_load import Loader

__all__ = ["Store"]

OnMap = Callable[[memoryview], Callable[[], None]]


class Store:
    """Tiers, arena and attempts of one recipe for one rank."""

    def __init__(
        self, settings: Settings, group: Group, *, finisher: Finisher | None = None, on_map: OnMap | None = None
    ) -> None:
        self.settings, self.group, self.finisher = settings, group, finisher or Finisher()
        self._launch = agree_on_launch(settings, group)
        self._closers: list[Callable[[], None]] = []
        self._pid = os.getpid()
        try:
            self._open(settings, on_map)
        except BaseException:
            self._let_go()
            raise

    def _open(self, settings: Settings, on_map: OnMap | None) -> None:
        group = self.group
        memory = self._open_memory(settings.memory) if settings.memory else None
        durable: dict[str, Tier] = {}
        self.all_or_none(
            lambda: durable.update({tier.name: open_tier(tier, settings.namespace) for tier in settings.durable})
        )
        self.tiers = Tiers(memory=memory, durable=durable, compose=self.finisher.compose, optional=settings.optional)
        path = event_files.begin_launch(Path(memory.root), launch=self._launch, rank=group.rank) if memory else None
        self.events = Events(namespace=settings.namespace, rank=group.rank, path=path)
        self.arena = Arena(memory, rank=group.rank, on_map=on_map) if memory else None
        if self.arena is not None:
            self._closers.append(self.arena.close)
        self.queue = Queue(memory) if memory else None
        self.generations = Generations(keep=settings.memory.generations if settings.memory else 1)
        self.restored: Restored | None = None
        """What the last restore took."""
        self._seen: Survey | None = None
        """What the tiers held when it began."""
        self.line = Line(settings, group, self.tiers, events=self.events, generations=self.generations)
        self._drainers: list[Any] = []
        self.ranks_here: tuple[int, ...] = (group.rank,)
        """The ranks that share this node's memory, ascending."""
        self.over_budget = False
        """Whether the state has outgrown the recipe's budget for memory, on all ranks alike."""
        probe_local_tiers(group, self.tiers.durable, self._launch)
        self.taken_over = self._orphans()
        """Ranks that are no more, whose files in this node's memory this rank looks after."""
        if memory is not None and group.rank == self.ranks_here[0]:
            remove_leftovers(Path(memory.root))
        self.all_or_none(self._adopt)

    # ---- opening

    def _open_memory(self, settings: MemorySettings) -> MemoryTier:
        memory: MemoryTier | None = None

        def open_it() -> None:
            nonlocal memory
            memory = MemoryTier(settings, self.settings.namespace)
            # Lock first, look then: of two launches that begin at once, one sees the other.
            self._closers.append(memory.trainer_lock(self._launch, self.group.rank).release)
            wait_for_others(memory, self._launch, self.settings.in_use_wait_secs)

        self.all_or_none(open_it)
        assert memory is not None
        return memory

    def all_or_none(self, action: Callable[[], None]) -> None:
        """See `sm_tiered.group.all_or_none`. Collective."""
        all_or_none(self.group, action)

    def _orphans(self) -> frozenset[int]:
        """Ranks that left files on this node and do not live here now; this rank takes over its share of them."""
        memory = self.tiers.memory
        keys = self.group.gather(memory.node_key() if memory else None)
        if memory is None:
            return frozenset()
        here = [rank for rank, key in enumerate(keys) if key == memory.node_key()]
        self.ranks_here = tuple(here)
        names = (entry.key for entry in [*memory.list(f"{layout.ARENA}/"), *memory.list("step_")])
        left = {rank for rank in map(layout.rank_of_key, names) if rank is not None}
        return frozenset(r for r in left if r not in here and r % len(here) == here.index(self.group.rank))

    def _adopt(self) -> None:
        if self.arena is not None:
            self.arena.adopt(also=self.taken_over)

    # ---- restoring

    def restore(
        self, loader: Loader, *, step: int | None = None, opens: bool = True, room: Room | None = None
    ) -> Restored | None:
        """Restore the newest checkpoint, or *step*, through *loader*; None when nothing was ever saved. Collective.

        *opens*: whether training goes on from there. Without it only a first save does: who merely looks at an old step
        must not make it the one that a restarted job resumes from. *room*: where parts of a durable tier go that the
        loader keeps; else they pass through the arena.

        Raises: see `sm_tiered.restore.walk`.
        """
        self.check_process()
        self.events.emit(RestoreStarted(step=step))
        with self.tiers.reading():
            seen = survey(self.group, self.tiers)
            restored = walk(
                self.group,
                self.tiers,
                seen,
                loader,
                step=step,
                events=self.events,
                room=room or self.room,
                use_memory=self.settings.unreachable == "use_memory",
            )
        self.restored, self._seen = restored, seen
        begin = self.line.begin_after if opens else self.line.begin_when_saved
        begin(seen, restored, chosen=step is not None)
        if restored is None:
            self.events.emit(NothingSaved())
        return restored

    def history(self, *, metrics: bool) -> History:
        """Return what the last restore saw of the past, with the *metrics* of what goes on from there, if wanted.

        Reading these asks for a small file of each checkpoint, by this rank alone. Not collective.
        """
        if self._seen is None:
            return History()
        record = self.line.record
        attempts = {**self._seen.attempts, **({record.attempt: record} if record is not None else {})}
        memory = self.tiers.memory.name if self.tiers.memory is not None else None
        restored = self.restored.checkpoint if self.restored is not None else None
        return History(
            began_at=float(min((a.utc_secs for a in self._seen.seen if not a.is_imported), default=0)) or None,
            failures=count_failures(attempts.values(), memory=memory, durable=self.tiers.durable),
            extremes=extremes_of(self.tiers, self._seen, restored, events=self.events) if metrics else {},
        )

    def check_room(self, sizes: Sequence[int]) -> None:
        """See that all generations of parts of *sizes* bytes fit on this node, if every rank here needs as much.

        Raises:
            ConfigError: the recipe's budget forbids them.
            TierFullError: they don't fit; the hint says what to change.
        """
        memory, arena = self.settings.memory, self.arena
        if memory is None or arena is None or self.tiers.memory is None:
            return
        slots, ranks = self.settings.arena_slots, len(self.ranks_here)
        need, already = sum(sizes) * slots * ranks, arena.allocated_bytes * ranks
        root = self.tiers.memory.root
        tight = check_budget(root, need, memory.budget_bytes, checkpoints=slots, already_bytes=already)
        if tight is not None:
            self.events.emit(MemoryTight(warning=tight))

    def make_room(self, sizes: Sequence[int]) -> None:
        """See on all ranks that parts of *sizes* bytes fit, and prepare their pages. Collective.

        Raises: see `check_room`. After a ConfigError memory takes no saves until a later call finds that they fit.
        """
        try:
            self.all_or_none(lambda: self.check_room(sizes))
        except ConfigError:
            self.over_budget = True
            raise
        self.over_budget = False
        if self.settings.memory is None or self.arena is None:
            return
        slots = self.settings.arena_slots
        for size in sizes:
            # Parts of about one size share a pool of files.
            self.arena.prepare(size, slots * sum(abs(size - other) * 16 <= size for other in sizes))

    def room(self, size: int) -> Place | None:
        """Arena bytes for a restore; what is published stays where it is."""
        if self.arena is None or self.settings.memory is None:
            return None
        arena = self.arena
        try:
            slot = arena.take(size, (), self.settings.arena_slots)
        except TierError:
            return None
        if slot is None:
            return None
        slot.cache.clear()  # what is fetched overwrites the headers that an integration believes to be there
        return Place(buffer=slot.buffer[:size], free=lambda: arena.release(slot))

    def latest(self) -> int | None:
        """Return the newest step that this process sees complete on any tier, or None. Not collective.

        Raises:
            TierUnavailableError: a durable tier did not answer, or an optional one where no other has anything.
        """
        return newest_complete(self.tiers)

    def unused_step(self) -> int:
        """Return a step above all that any rank sees on any tier, complete or not. Collective.

        Raises:
            TierUnavailableError: a durable tier did not answer.
        """
        return unused_step(self.group, self.tiers)

    # ---- saving

    @property
    def no_room_reason(self) -> str:
        """Why the ranks agreed that memory takes no save."""
        if self.tiers.memory is None:
            return "no memory tier"
        return "the state is over memory's budget" if self.over_budget else "memory has no free generation"

    def held(self) -> set[CheckpointId]:
        """Return the checkpoints in memory whose bytes the drainer still needs."""
        entries = self.queue.entries() if self.queue else []
        ours = {self.group.rank, *self.taken_over}
        return {entry.checkpoint for entry in entries if entry.rank in ours and not entry.sent}

    def prune(self, tier: Tier, checkpoint: CheckpointId) -> None:
        """Apply the keep policy of *tier* after a commit that the drainer did not make."""
        settings = next(chosen for chosen in self.settings.durable if chosen.name == tier.name)
        planned = retention.plan(
            tier, settings.keep, attempt=checkpoint.attempt, in_flight_secs=self.settings.commit_deadline_secs
        )
        if planned.newer is not None:
            self.events.emit(NewerAttemptSeen(attempt=str(planned.newer)))
        gone = retention.apply(tier, self.settings.namespace, planned)
        if gone:
            self.events.emit(Pruned(tier=tier.name, steps=tuple(c.step for c in gone)))

    def start_drainer(self) -> None:
        """See to it that this node's drainer is alive."""
        if self.tiers.memory is None:
            return
        self._drainers = [process for process in self._drainers if process.poll() is None]
        started = ensure_drainer(self.tiers.memory)
        if started is not None:
            self._drainers.append(started)
            self.events.emit(DrainerStarted(pid=started.pid))

    def check_process(self) -> None:
        """Raise ConfigError in a forked child: locks, mappings and sockets belong to the process that opened them."""
        if os.getpid() != self._pid:
            raise ConfigError(
                f"opened in process {self._pid}, used in process {os.getpid()}",
                hint="Open it after the fork, in the process that uses it.",
            )

    def _let_go(self) -> None:
        """Close the arena, then give up the trainer's lock: whoever comes next may map the files."""
        while self._closers:
            self._closers.pop()()

    def close(self) -> None:
        """Let go of files, locks and connections. Not collective; can be called many times."""
        if os.getpid() != self._pid:
            return
        self._let_go()
        self.arena = None
        for tier in self.tiers.durable.values():
            tier.close()
        for process in self._drainers:
            process.poll()
        self.events.close()
