"""Following the drainer, for `promote` and `drain`: progress, whom it waits for, how each promotion ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sm_tiered.cli.holdings import ranks_text
from sm_tiered.cli.meter import Meter
from sm_tiered.errors import ConfigError, DeadlineExceededError, TieredError, TierError
from sm_tiered.handover import Follower, Promotion, Standing, drainer_pid
from sm_tiered.inventory import read_records
from sm_tiered.queue import Entry
from sm_tiered.records import CheckpointId
from sm_tiered.settings import Settings
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.memory import MemoryTier

__all__ = ["Ended", "check_timeout", "follow", "missing_ranks"]

_LOOK_SECS = 0.1
MAX_TIMEOUT_SECS = 30 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How one promotion ended, as far as this command waited."""

    checkpoint: CheckpointId
    tier: str
    error: TieredError | None
    """None: committed."""


def check_timeout(value: float | None) -> float | None:
    """Return *value* when it can be a time to wait, in seconds; None: without end.

    Raises:
        ConfigError: otherwise.
    """
    if value is not None and not 0 < value <= MAX_TIMEOUT_SECS:
        hint = f"Allowed: above 0, up to {MAX_TIMEOUT_SECS:.0f} seconds."
        raise ConfigError(f"--timeout: {value:g} is no time to wait", hint=hint)
    return value


def follow(
    memory: MemoryTier,
    follower: Follower,
    settings: Settings,
    meter: Meter,
    *,
    label: str,
    timeout_secs: float | None,
) -> tuple[list[Ended], Standing]:
    """Wait until all that *follower* follows has left the queue, or *timeout_secs* have passed.

    Return how each ended, what is still waiting with a `DeadlineExceededError`, and how it stood at last.
    """
    end = None if timeout_secs is None else time.monotonic() + timeout_secs
    told: set[Promotion] = set()
    meter.begin(label)
    try:
        while True:
            standing = follower.look()
            meter.tell(standing.done, standing.total)
            late = end is not None and time.monotonic() >= end
            if late or not standing.waiting:
                return _ended(standing, settings), standing
            _tell_waits(standing.waiting, settings, meter, told)
            time.sleep(_LOOK_SECS)
    except KeyboardInterrupt:
        meter.end()
        pid = drainer_pid(memory)
        if pid is not None:
            sys.stderr.write(f"the drainer (pid {pid}) goes on; the same command follows it again\n")
        raise
    finally:
        meter.end()


def missing_ranks(settings: Settings, entry: Entry) -> list[int] | None:
    """Return the ranks whose share of *entry*'s checkpoint is not on its tier yet; None: that can't be told."""
    chosen = next((tier for tier in settings.durable if tier.name == entry.tier), None)
    if chosen is None:
        return None
    tier = open_tier(chosen, settings.namespace)
    try:
        return sorted(set(range(entry.world)) - set(read_records(tier, entry.checkpoint)))
    except TierError:
        return None
    finally:
        tier.close()


def _tell_waits(waiting: Sequence[Entry], settings: Settings, meter: Meter, told: set[Promotion]) -> None:
    """Say once of each promotion that this node has done its share, and who has not."""
    for promotion, entries in _grouped(waiting):
        if promotion in told or not all(entry.sent for entry in entries):
            continue
        told.add(promotion)
        if missing := missing_ranks(settings, entries[0]):
            meter.note(f"{_name(promotion)}: sent; {_others(missing)}")


def _ended(standing: Standing, settings: Settings) -> list[Ended]:
    ended = [Ended(checkpoint=c, tier=tier, error=error) for (c, tier), error in standing.ended.items()]
    for promotion, entries in _grouped(standing.waiting):
        sent = all(entry.sent for entry in entries)
        missing = missing_ranks(settings, entries[0]) if sent else None
        state = f"sent; {_others(missing)}" if missing else "sent, not committed yet" if sent else "not all sent yet"
        late = DeadlineExceededError(
            state, hint="The drainer goes on with it.", step=promotion[0].step, tier=promotion[1]
        )
        ended.append(Ended(checkpoint=promotion[0], tier=promotion[1], error=late))
    return sorted(ended, key=lambda each: (each.checkpoint, each.tier))


def _grouped(entries: Iterable[Entry]) -> list[tuple[Promotion, list[Entry]]]:
    found: dict[Promotion, list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.checkpoint, entry.tier), []).append(entry)
    return list(found.items())


def _name(promotion: Promotion) -> str:
    return f"step {promotion[0].step} to {promotion[1]}"


def _others(missing: Sequence[int]) -> str:
    return f"waits for {ranks_text(missing)}: the nodes that hold these must bring them (run the same command there)"
