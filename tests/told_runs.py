"""Runs made up to be told: events as the files have them, and what really happened, kept by other means."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from sm_tiered.event_reading import Told

BEGAN = 1_790_000_000.0
NAMESPACE = "run-1"


@dataclass
class Truth:
    """What really happened, second by second."""

    kept: float = 0.0
    lost: float = 0.0
    blocked: float = 0.0
    restoring: float = 0.0
    down: float = 0.0
    closing: float = 0.0
    failures: list[tuple[str, int, int | None]] = field(default_factory=list)
    """Kind, step reached, step that was restored."""
    lost_steps: int = 0


@dataclass
class Teller:
    """A run that is told while it is made up. One training step takes `step_secs`."""

    step_secs: float = 1.0
    progress: bool = True
    """Whether the training tells how far it is."""
    tiers: tuple[str, str] = ("memory", "disk")
    now: float = BEGAN
    step: int = 0
    launch: str = ""
    events: list[Told] = field(default_factory=list)
    truth: Truth = field(default_factory=Truth)
    spent: dict[int, float] = field(default_factory=dict)
    """Training time of each step of the present line."""
    acked: set[int] = field(default_factory=set)
    durable: set[int] = field(default_factory=set)
    draining: list[tuple[float, int, float]] = field(default_factory=list)
    """When it is over, the step, how long it took."""
    ordinal: int = 0

    def tell(self, kind: str, *, at: float | None = None, rank: int | None = 0, **facts: object) -> None:
        self.events.append(
            Told(
                time=self.now if at is None else at,
                kind=kind,
                rank=rank,
                launch="" if rank is None else self.launch,
                namespace=NAMESPACE,
                facts=facts,
            )
        )

    def start(self, *, node_lost: bool = False, restore_secs: float = 3.0) -> int:
        """Launch and restore what survived; return the step."""
        self.ordinal += 1
        self.launch = f"{self.ordinal:08x}"
        if node_lost:
            self.acked.clear()
            self.draining.clear()
        self._drain()
        self.tell("RestoreStarted", step=None)
        self.now += restore_secs
        self.truth.restoring += restore_secs
        candidates = self.acked | self.durable
        attempt = f"a{self.ordinal:06d}-{int(self.now)}-{self.ordinal:08x}"
        found = max(candidates, default=None)
        self.tell("AttemptOpened", attempt=attempt, parent_step=found, chosen=False)
        if found is None:
            self.tell("NothingSaved")
        else:
            tier = self.tiers[0] if found in self.acked else self.tiers[1]
            self.tell("Restored", step=found, attempt=attempt, tier=tier, secs=restore_secs, bytes=1000)
        back = found or 0
        gone = [step for step in self.spent if step > back]
        self.truth.lost += sum(self.spent.pop(step) for step in gone)
        self.truth.lost_steps += max(0, self.step - back)
        self.step = back
        self.acked = {step for step in self.acked if step <= back}
        self.durable = {step for step in self.durable if step <= back}
        if found is not None:
            self.acked.add(found)
        return back

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.now += self.step_secs
            self.step += 1
            self.spent[self.step] = self.step_secs
            self._drain()
            if self.progress:
                self.tell("Progress", step=self.step)

    def save(
        self, *, blocked: float = 0.25, ack: float | None = 0.1, drain: float | None = None, size: int = 2**30
    ) -> None:
        """Save the present step: acknowledged after *ack*, None: never; committed after *drain*, None: not asked."""
        memory, durable = self.tiers
        self.now += blocked
        self.truth.blocked += blocked
        names = [memory, durable] if drain is not None else [memory]
        self.tell("SaveStaged", step=self.step, tiers=names, blocked_secs=blocked, bytes=size)
        if ack is not None:
            self.tell("SaveAcknowledged", at=self.now + ack, step=self.step, secs=ack)
            self.acked.add(self.step)
        if drain is not None:
            begun = self.now + (ack or 0.0)
            self.tell("PromoteStarted", at=begun, rank=None, step=self.step, tier=durable)
            self.draining.append((begun + drain, self.step, drain))

    def _drain(self) -> None:
        for over, step, secs in [entry for entry in self.draining if entry[0] <= self.now]:
            self.tell("Committed", at=over, rank=None, step=step, tier=self.tiers[1], secs=secs, bytes=2**30)
            self.durable.add(step)
        self.draining = [entry for entry in self.draining if entry[0] > self.now]

    def skip(self, reason: str = "the drain is busy: a later step takes its place") -> None:
        self.tell("SaveSkipped", step=self.step, reason=f"{self.tiers[1]}: {reason}")

    def kill(self, *, down: float = 30.0, node: bool = False) -> None:
        """Die here; what comes next starts *down* later."""
        self.truth.failures.append(("node" if node else "process", self.step, None))
        self._down(down)

    def end(self, how: str = "finished", *, closing: float = 2.0, down: float = 0.0) -> None:
        self.now += closing
        self.truth.closing += closing
        self._drain()
        self.tell("TrainingEnded", step=self.step, how=how)
        self._down(down)

    def _down(self, secs: float) -> None:
        heard = max(told.time for told in self.events if told.launch == self.launch)
        self.now = max(self.now, heard) + secs
        self.truth.down += self.now - heard

    def done(self) -> list[Told]:
        """Return all events, in the order of time."""
        self.truth.kept = sum(self.spent.values())
        return sorted(self.events, key=lambda told: told.time)


def long_run(saves: int, *, seed: int = 1, every: int = 10, failures: int = 6) -> Teller:
    """A run with so many saves, a drain for every tenth, some left out, and failures of both kinds."""
    chance, run = random.Random(seed), Teller(step_secs=1.2)
    run.progress = False
    run.start()
    fatal = set(chance.sample(range(10, saves - 5), failures))
    for number in range(saves):
        run.train(every)
        if number % 10 == 9 and not run.draining:
            run.save(blocked=chance.uniform(0.15, 0.4), ack=chance.uniform(0.1, 0.4), drain=chance.uniform(20, 70))
        elif number % 10 == 9:
            run.skip()
            run.save(blocked=chance.uniform(0.15, 0.4), ack=0.2)
        else:
            run.save(blocked=chance.uniform(0.15, 0.4), ack=chance.uniform(0.1, 0.4))
        if number in fatal:
            run.train(chance.randrange(1, every))
            run.tell("Progress", step=run.step)
            node = chance.random() < 0.4
            run.kill(node=node, down=chance.uniform(40, 300))
            run.start(node_lost=node, restore_secs=20.0 if node else 2.0)
    run.train(every)
    run.save(drain=1.0)
    run.end()
    return run


def as_lines(events: list[Told]) -> Mapping[str, bytes]:
    """Return *events* as the files that a memory tier would have, by name."""
    files: dict[str, list[bytes]] = {}
    starts: dict[str, int] = {}
    for told in events:
        starts.setdefault(told.launch, int(told.time))
        name = (
            f"drainer-{starts['']:010d}-ffffffff.jsonl"
            if told.rank is None
            else (f"rank-{told.rank:05d}-{starts[told.launch]:010d}-{told.launch}.jsonl")
        )
        head = {"time": told.time, "event": told.kind, "namespace": told.namespace, "rank": told.rank}
        files.setdefault(name, []).append(json.dumps({**head, **told.facts}).encode() + b"\n")
    return {name: b"".join(lines) for name, lines in files.items()}
