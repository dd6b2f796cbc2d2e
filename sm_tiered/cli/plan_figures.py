"""What a planned run means: intervals, lost work, requests, memory, storage."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sm_tiered.cli.planning import Assumptions, Planned, Run
from sm_tiered.policies.optimum import optimal_interval_secs
from sm_tiered.settings import HyperPodSettings, MemorySettings, S3Settings, TierSettings
from sm_tiered.tiers.budget import cgroup_room

__all__ = [
    "GETS_PER_SEC",
    "PUTS_PER_SEC",
    "Between",
    "Lost",
    "Memory",
    "Requests",
    "Storage",
    "Stretch",
    "lost_work",
    "memory_need",
    "requests_of",
    "storage_of",
    "stretches",
    "usable_after_secs",
]

PUTS_PER_SEC, GETS_PER_SEC = 3_500, 5_500
"""What one prefix of a bucket takes: PUT, COPY, POST and DELETE together; GET, HEAD and LIST together."""
_SMALL_BYTES = 1024 * 1024
"""Up to here a part is one PutObject (`sm_tiered.tiers.s3`)."""
_RANGE_BYTES = 32 * 1024 * 1024
"""Of one GET of a restore (`sm_tiered.tiers.s3_read`)."""
_BATCH = 1000
"""Keys of one DeleteObjects."""


# ---- when


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Steps at one distance from each other."""

    first: int
    last: int
    count: int
    every: int | None
    """None: it is one step."""


def stretches(steps: Sequence[int]) -> list[Stretch]:
    """Return ascending *steps* as few stretches; one needs three steps."""
    found: list[Stretch] = []
    place = 0
    while place < len(steps):
        end = place + 1
        while end + 1 < len(steps) and steps[end + 1] - steps[end] == steps[place + 1] - steps[place]:
            end += 1
        count = end - place + 1
        if count >= 3 and end < len(steps):
            every = steps[place + 1] - steps[place]
            found.append(Stretch(first=steps[place], last=steps[end], count=count, every=every))
            place = end + 1
        else:
            found.append(Stretch(first=steps[place], last=steps[place], count=1, every=None))
            place += 1
    return found


# ---- what a failure costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Between:
    """Mean times between failures of the whole job, in seconds."""

    process: float
    node: float
    cluster: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """Work that a failure at any time of the run loses, in seconds."""

    mean_secs: float
    worst_secs: float
    mtbf_secs: float
    tiers: tuple[str, ...]
    """Where it is restored from."""
    optimal_secs: float
    """The interval that loses least to saves and to these failures together (Daly 2006)."""

    @property
    def share(self) -> float:
        """The part of all time that is lost so."""
        return self.mean_secs / self.mtbf_secs


def lost_work(run: Run, tiers: Sequence[str], *, mtbf_secs: float, blocked_secs: float) -> Lost:
    """Return what is lost where only *tiers* are left, for failures that strike at any time alike."""
    usable = sorted((each.usable_at, each.at) for tier in tiers for each in run.planned[tier])
    total = worst = since = newest = 0.0
    for until, at in [*usable, (run.secs, 0.0)]:
        until = min(until, run.secs)
        if until > since:
            total += ((until - newest) ** 2 - (since - newest) ** 2) / 2
            worst, since = max(worst, until - newest), until
        newest = max(newest, at)
    return Lost(
        mean_secs=total / run.secs,
        worst_secs=worst,
        mtbf_secs=mtbf_secs,
        tiers=tuple(tiers),
        optimal_secs=optimal_interval_secs(blocked_secs, mtbf_secs),
    )


# ---- what it needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory tier of one node, in bytes."""

    generations: int
    """``keep.latest``, one being written, one held by the drain in each lane."""
    need_bytes: int
    path: str
    size_bytes: int
    free_bytes: int
    """Of the file system at *path*, or of what it is going to be made in, here."""
    budget_bytes: int | None
    cgroup_bytes: int | None
    """What the memory cgroup leaves, here; None: no limit."""

    @property
    def fits(self) -> bool:
        """Whether it fits into all of them."""
        return self.need_bytes <= min(
            room for room in (self.size_bytes, self.budget_bytes, self.cgroup_bytes) if room is not None
        )


def memory_need(settings: MemorySettings, given: Assumptions, *, generations: int) -> Memory:
    """Return what the memory tier needs to hold *generations*, and what there is here."""
    path = Path(settings.path)
    facts = os.statvfs(next(place for place in (path, *path.parents) if place.exists()))
    return Memory(
        generations=generations,
        need_bytes=generations * given.node_bytes,
        path=settings.path,
        size_bytes=facts.f_blocks * facts.f_frsize,
        free_bytes=facts.f_bavail * facts.f_frsize,
        budget_bytes=settings.budget_bytes,
        cgroup_bytes=cgroup_room(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """S3's requests for one checkpoint, and how many a second that makes."""

    puts: int
    """PUT, POST and DELETE: parts, records, index, metadata, manifest, retention."""
    gets: int
    """GET, HEAD and LIST."""
    puts_per_sec: float
    gets_per_sec: float
    """Both while a checkpoint drains."""
    restore_gets: int
    """Of a restore of the whole checkpoint."""


def requests_of(settings: S3Settings, given: Assumptions, *, kept: int) -> Requests:
    """Return the requests of one checkpoint on *settings*, where *kept* of them stand."""
    from sm_tiered.tiers.s3_upload import part_bytes_for

    rank_bytes = -(-given.state_bytes // given.ranks)
    if rank_bytes <= _SMALL_BYTES:
        body, looked = 1, 0
    else:
        # Begin, parts, complete; then its size is asked for.
        body, looked = 2 + -(-rank_bytes // part_bytes_for(rank_bytes, settings.part_bytes)), 1
    files = 3 * given.ranks + 3
    puts = given.ranks * (body + 2) + 3 + (1 + -(-files // _BATCH))
    # The committer lists and reads the records; retention lists, and reads every manifest.
    polls = given.nodes * (1 + int(given.drain_secs / 2))
    gets = given.ranks * (looked + 1) + polls + 5 + kept
    return Requests(
        puts=puts,
        gets=gets,
        puts_per_sec=puts / given.drain_secs,
        gets_per_sec=gets / given.drain_secs,
        restore_gets=given.ranks * (-(-rank_bytes // _RANGE_BYTES) + 2) + 3,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """What a durable tier holds."""

    kept: int
    """Checkpoints at the end."""
    most: int
    """The highest number at a time, with the one that came before others were deleted."""
    bytes: int
    most_bytes: int
    written_bytes: int
    month_price: float | None
    """For what is there at the end, a month; None: not on S3."""
    slots: int | None = None
    """How many steps of a rank the cluster's memory is asked to make room for; None: it is another tier."""


def storage_of(settings: TierSettings, run: Run, given: Assumptions, *, price: float) -> Storage:
    """Return what *settings*'s tier holds; *price* is that of a GiB for a month."""
    stored = run.stored[settings.name]
    here = len(stored.kept) * given.state_bytes
    return Storage(
        kept=len(stored.kept),
        most=stored.most,
        bytes=here,
        most_bytes=stored.most * given.state_bytes,
        written_bytes=len(run.planned[settings.name]) * given.state_bytes,
        month_price=here / 2**30 * price if isinstance(settings, S3Settings) else None,
        slots=settings.slots if isinstance(settings, HyperPodSettings) else None,
    )


def usable_after_secs(planned: Iterable[Planned]) -> float | None:
    """Return how long after its copy a checkpoint could be used, on average; None where there is none."""
    lags = [each.usable_at - each.at for each in planned]
    return sum(lags) / len(lags) if lags else None
