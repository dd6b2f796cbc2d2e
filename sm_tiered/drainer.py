"""The drainer's process: ``python -m sm_tiered.drainer DIRECTORY NAMESPACE``, one for each node and namespace.

It is started by any save that finds its lock free, lives in a session of its own, and ends only when the queue is
empty under the queue's own lock, so that no entry can be left behind by a drainer that was just going. Each lane of the
queue has a thread: an upload to storage that takes minutes holds up nothing that goes to the cluster's RAM.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from types import FrameType

from sm_tiered import deadline, event_files, layout, retention
from sm_tiered.commit import publish_attempt
from sm_tiered.drain import Drain, Target
from sm_tiered.errors import KeyNotFoundError, TieredError, TierError
from sm_tiered.event_files import Publisher
from sm_tiered.event_log import Events
from sm_tiered.events import NewerAttemptSeen, plain
from sm_tiered.finish import finisher
from sm_tiered.locks import FileLock, probe
from sm_tiered.logs import Undo, install
from sm_tiered.manifest import MAX_BYTES
from sm_tiered.policies.keep import Latest
from sm_tiered.queue import Entry, Queue
from sm_tiered.recipe import Recipe
from sm_tiered.records import Attempt, CheckpointId
from sm_tiered.settings import MemorySettings
from sm_tiered.tiers import abort_stale_uploads, open_tier
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.memory import MemoryTier

__all__ = ["DRAINER_LOCK", "QUEUE_LOCK", "STALE_UPLOAD_SECS", "ensure_drainer", "main"]

DRAINER_LOCK = "drainer"
QUEUE_LOCK = "queue"
_IDLE_SECS = float(os.environ.get("SM_TIERED_DRAINER_IDLE_SECS", "10"))
"""How long it lingers with nothing to do: starting again costs a second of CPU."""
_LAST_WORDS_SECS = 10.0
"""How long it tries, before it ends, to bring what was told last to a tier."""
STALE_UPLOAD_SECS = 86400.0
"""Unfinished uploads that are older belong to nobody: a client that was killed leaves them, and they cost money."""
_NICE = 19
"""The lowest: at 10, on two cores, a training loop lost a third of its speed to the drain beside it."""
_START_SECS = 10.0
_LOOK_SECS, _BUSY_LOOK_SECS = 0.05, 0.2
"""Between two looks at the queue; a lane that is busy looks by itself."""
_MOST_LANES = 16
"""Of more, some would wait for others."""
_ASKED_SECS = 0.5


def ensure_drainer(memory: MemoryTier) -> subprocess.Popen[bytes] | None:
    """Start the drainer of *memory* unless one is alive; return the process that was started."""
    lock = FileLock(memory.lock_path(DRAINER_LOCK))
    if not lock.acquire(exclusive=True, timeout_secs=0):
        return None
    lock.release()
    log = memory.root / layout.QUEUE / "drainer.log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "sm_tiered.drainer", str(memory.root.parent), memory.namespace],
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
            cwd="/",
            # What this process can import the drainer can too, finishers among it.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
    finally:
        os.close(descriptor)
    # Whoever asks next must find the lock taken, or every rank would start one.
    end = time.monotonic() + _START_SECS
    while probe(lock.path) is None and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    return process


class _Targets:
    """Durable tiers, opened once for each recipe. Those of one lane belong to one thread."""

    def __init__(self, memory: MemoryTier, queue: Queue, events: Events) -> None:
        self._memory, self._queue, self._events = memory, queue, events
        self._recipes: dict[str, Recipe] = {}
        self._reading = threading.Lock()
        self._tiers: dict[tuple[str, str], Tier] = {}
        self._lanes: dict[tuple[str, str], int] = {}
        self._published: set[tuple[str, Attempt]] = set()
        self._swept: set[str] = set()
        self._publisher = Publisher(memory)
        self._undo_logs: list[Undo] = []

    def recipe(self, entry: Entry) -> Recipe:
        """Return the recipe of *entry*; what it asks of the log is done from then on."""
        with self._reading:
            found = self._recipes.get(entry.recipe)
            if found is None:
                found = self._recipes[entry.recipe] = Recipe.from_json(self._queue.recipe(entry.recipe))
                self._undo_logs.append(install(found.settings().log, namespace=found.namespace, rank=None))
            return found

    def lane(self, entry: Entry) -> int:
        """Return the lane of *entry*'s tier."""
        key = (entry.recipe, entry.tier)
        if key not in self._lanes:
            try:
                self._lanes[key] = self.recipe(entry).settings().tier(entry.tier).lane
            except (TieredError, ValueError):
                return 0  # `target` fails of it too, and that is told
        return self._lanes[key]

    def target(self, entry: Entry) -> Target:
        """Return the tier of *entry*, with the attempt's own record on it."""
        settings = self.recipe(entry).settings()
        chosen = next((tier for tier in settings.durable if tier.name == entry.tier), None)
        if chosen is None:
            raise TierError(f"the recipe has no durable tier {entry.tier!r}", tier=entry.tier)
        key = (entry.recipe, entry.tier)
        if key not in self._tiers:
            self._tiers[key] = open_tier(chosen, settings.namespace)
        tier = self._tiers[key]
        self._publish_attempt(tier, entry)
        prune = partial(self._prune, tier, chosen.keep, settings.namespace, settings.commit_deadline_secs)
        return Target(tier=tier, prune=prune)

    def _publish_attempt(self, tier: Tier, entry: Entry) -> None:
        attempt = entry.checkpoint.attempt
        if (tier.name, attempt) in self._published:
            return
        try:
            data = self._memory.get(layout.attempt_key(attempt), max_bytes=MAX_BYTES).data
        except KeyNotFoundError:
            return
        publish_attempt(tier, attempt, data)
        self._published.add((tier.name, attempt))
        # A launch that dies with its node soon after has told how the ones before it ended.
        with suppress(TieredError):  # the next commit tries again
            self._publisher.publish(tier)

    def _prune(
        self, tier: Tier, keep: retention.KeepPolicy, namespace: str, in_flight_secs: float, checkpoint: CheckpointId
    ) -> list[CheckpointId]:
        chosen = retention.plan(tier, keep, attempt=checkpoint.attempt, in_flight_secs=in_flight_secs)
        if chosen.newer is not None:
            self._events.emit(NewerAttemptSeen(attempt=str(chosen.newer)))
        gone = retention.apply(tier, namespace, chosen)
        if tier.name not in self._swept:
            self._swept.add(tier.name)
            abort_stale_uploads(tier, max(STALE_UPLOAD_SECS, in_flight_secs))
        self._publisher.publish(tier)
        return gone

    def publish_events(self) -> None:
        """Leave beside the checkpoints what was told since the last commit: how the training ended, most of all."""
        for tier in self._tiers.values():
            try:
                with deadline.within(_LAST_WORDS_SECS):
                    self._publisher.publish(tier)
            except TieredError as error:
                logging.getLogger("sm_tiered").warning("events are not on %s: %s", tier.name, plain(error))

    def close(self) -> None:
        for tier in self._tiers.values():
            tier.close()
        for undo in self._undo_logs:
            undo()


def main(arguments: list[str] | None = None) -> int:
    """Drain until the queue is empty and nothing came for a while."""
    path, namespace = arguments if arguments is not None else sys.argv[1:]
    _step_back()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = MemorySettings(name="memory", save=None, keep=Latest(n=1), path=path, budget_bytes=None, allow_disk=True)
    memory = MemoryTier(settings, namespace)
    lock = FileLock(memory.lock_path(DRAINER_LOCK))
    # Who only asks whether there is a drainer holds the lock for a moment.
    if not lock.acquire(exclusive=True, timeout_secs=_ASKED_SECS, text=str(os.getpid())):
        return 0
    stopping: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stopping.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    _run(memory, namespace, lock, stopping)
    return 0


def _step_back() -> None:
    """Leave the CPU to the trainers."""
    os.nice(_NICE)
    # Where the kernel schedules by session (sched_autogroup), that counts only among the processes of this one, and the
    # drainer has a session of its own: without this it would get as much as all the trainers together.
    with suppress(OSError), open("/proc/self/autogroup", "w", encoding="ascii") as group:
        group.write(str(_NICE))


class _Lanes:
    """A thread for each lane in which there is something to do, and as long as there is."""

    def __init__(self, make: Callable[[int], Drain]) -> None:
        self._make = make
        self._drains: dict[int, Drain] = {}
        self._running: dict[int, Future[None]] = {}
        self._threads = ThreadPoolExecutor(_MOST_LANES, thread_name_prefix="sm_tiered-lane")
        self._ended = threading.Event()

    def work(self, lanes: Iterable[int]) -> bool:
        """See that each of *lanes* is worked on; return whether any is. What ended one is logged: it begins anew."""
        for lane, running in list(self._running.items()):
            if running.done():
                del self._running[lane]
                if (error := running.exception()) is not None:
                    logging.getLogger("sm_tiered").error("lane %d of the drain ended: %s", lane, error, exc_info=error)
        for lane in set(lanes) - self._running.keys():
            if lane not in self._drains:
                self._drains[lane] = self._make(lane)
            self._running[lane] = self._threads.submit(self._drain, self._drains[lane])
        return bool(self._running)

    def _drain(self, drain: Drain) -> None:
        while not self._ended.is_set():
            pause = drain.turn()
            if pause is None:
                return
            self._ended.wait(min(max(pause, 0.01), 1.0))

    def close(self) -> None:
        """End the work after what each lane is just at."""
        self._ended.set()
        self._threads.shutdown()


def _run(memory: MemoryTier, namespace: str, lock: FileLock, stopping: list[int]) -> None:
    queue = Queue(memory)
    events = Events(namespace=namespace, rank=None, path=event_files.of_drainer(Path(memory.root)))
    targets = _Targets(memory, queue, events)

    def make(lane: int) -> Drain:
        def entries() -> list[Entry]:
            return [entry for entry in queue.entries() if targets.lane(entry) == lane]

        return Drain(memory, queue, target=targets.target, compose=finisher, events=events, entries=entries)

    with closing(_Lanes(make)) as lanes:
        _work(memory, queue, lock, lanes, targets, stopping)
    targets.close()
    events.close()


def _work(
    memory: MemoryTier, queue: Queue, lock: FileLock, lanes: _Lanes, targets: _Targets, stopping: list[int]
) -> None:
    """Go on until there has been nothing to do for a while."""
    busy_at = time.monotonic()
    # When somebody deleted the directory, another drainer works on what stands there now.
    while lock.stands():
        if lanes.work(map(targets.lane, queue.entries())):
            busy_at = time.monotonic()
            time.sleep(_BUSY_LOOK_SECS)
            continue
        if stopping or time.monotonic() - busy_at > _IDLE_SECS:
            targets.publish_events()
            if _leave(memory, queue, lock):
                return
        time.sleep(_LOOK_SECS)


def _leave(memory: MemoryTier, queue: Queue, lock: FileLock) -> bool:
    """Give up the drainer's lock if the queue is empty while nobody can add to it."""
    guard = FileLock(memory.lock_path(QUEUE_LOCK))
    if not guard.acquire(exclusive=True, timeout_secs=1.0):
        return False
    try:
        if queue.entries():
            return False
        lock.release()
        return True
    finally:
        guard.release()


if __name__ == "__main__":
    sys.exit(main())
