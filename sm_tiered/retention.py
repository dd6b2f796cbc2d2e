"""Retention on a durable tier: what the keep policy does not want goes, and never what a restore could need.

How a checkpoint is given up, and how that is taken back, is in `sm_tiered.graves`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum

from sm_tiered import layout
from sm_tiered.crashpoints import crashpoint
from sm_tiered.errors import CorruptPartError, FormatError
from sm_tiered.graves import Grave, delete_files, entomb, revive, whole_below
from sm_tiered.inventory import list_attempts, list_checkpoints, read_attempts, read_manifest
from sm_tiered.pins import is_pinned, pinned
from sm_tiered.policies.context import CommittedCheckpoint
from sm_tiered.policies.keep import KeepPolicy, ask_keep
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId, Manifest
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.shares import ShareTier, one_pass

__all__ = ["TOMBSTONE_SECS", "Kept", "Plan", "apply", "plan", "would_keep"]

TOMBSTONE_SECS = 86400.0
"""How long a tombstone stays: longer than any committer may still try."""


class Kept(Enum):
    """Why a checkpoint stays."""

    NEWEST = "newest"
    POLICY = "keep policy"
    PINNED = "pinned"
    PARENT = "restored from"
    """An attempt went on from it."""
    IN_FLIGHT = "in flight"
    """Not committed, and not long enough so to be given up."""
    UNREADABLE = "unreadable"
    """Its manifest is damaged or of a newer release: not ours to judge, so not ours to delete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What retention is about to do; checkpoints oldest first."""

    delete: tuple[CheckpointId, ...] = ()
    bury: tuple[CheckpointId, ...] = ()
    """Tombstones that are old enough to go themselves."""
    forget: tuple[Attempt, ...] = ()
    """Attempts that hold nothing here and chose nothing: every launch begins one, and every restore reads them all."""
    newer: Attempt | None = None
    """An attempt that began after the one that asks: then nothing is deleted."""
    revive: Mapping[CheckpointId, bytes] = field(default_factory=dict[CheckpointId, bytes])
    """Manifests to put back: what was about to be deleted, is whole, and was pinned or gone on from meanwhile."""
    kept: Mapping[CheckpointId, frozenset[Kept]] = field(default_factory=dict[CheckpointId, frozenset[Kept]])
    """All that stays, and why."""
    committed: frozenset[CheckpointId] = frozenset()
    unfinished: frozenset[CheckpointId] = frozenset()
    """Deletions that were cut short."""
    untrue: frozenset[CheckpointId] = frozenset()
    """Those of which a share is missing and whose manifest says otherwise: it is taken back."""
    attempt: Attempt | None = None
    """The one that asks: once there is a newer one, `apply` deletes nothing more. None: it does not look."""
    waits: bool = False
    """Nothing is deleted before *attempt* has a checkpoint of its own here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What stands on the tier."""

    listed: tuple[CheckpointId, ...]
    """Oldest first."""
    manifests: Mapping[CheckpointId, Manifest | None]
    """None: there is none, or none that can be read."""
    attempts: Mapping[Attempt, AttemptRecord]
    pins: frozenset[CheckpointId]
    untrue: frozenset[CheckpointId]
    """Those whose manifest stands beside a share that is missing."""

    @property
    def committed(self) -> list[CheckpointId]:
        return [c for c in self.listed if (m := self.manifests[c]) is not None and not m.tombstone]

    @property
    def tombs(self) -> list[CheckpointId]:
        return [c for c in self.listed if (m := self.manifests[c]) is not None and m.tombstone]


def plan(
    tier: Tier,
    keep: KeepPolicy,
    *,
    attempt: Attempt,
    in_flight_secs: float,
    in_flight: Collection[CheckpointId] = (),
) -> Plan:
    """Return what may be deleted by a drainer of *attempt*: nothing unless that is the newest attempt on the tier.

    Never deleted are pinned checkpoints, the parent of any attempt (on a `ShareTier`: of *attempt*), the newest
    committed one, what is known to be *in_flight*, and what was never committed and was written to less than
    *in_flight_secs* before the newest, by the tier's own clock.
    """
    with one_pass(tier):
        return _plan(tier, keep, attempt, in_flight_secs, in_flight)


def _plan(
    tier: Tier, keep: KeepPolicy, attempt: Attempt, in_flight_secs: float, in_flight: Collection[CheckpointId]
) -> Plan:
    listed = list_checkpoints(tier)
    attempts, damaged = read_attempts(tier)
    newest_attempt = max([*list_attempts(tier), *(c.attempt for c in listed), attempt])
    if newest_attempt != attempt:
        return Plan(newer=newest_attempt)
    manifests, untrue = _manifests(tier, listed, keep)
    found = _Found(listed=tuple(listed), manifests=manifests, attempts=attempts, pins=pinned(tier), untrue=untrue)
    committed = found.committed
    if not any(c.attempt == attempt for c in committed):
        return Plan(attempt=attempt, waits=True, committed=frozenset(committed))
    if damaged:
        raise FormatError(
            f"the record of {min(damaged)} is damaged: what it continues must not be deleted, and can't be told",
            hint="Look with `sm-tiered verify`; with that record removed, retention goes on.",
        )
    protected = found.pins | _protected_parents(tier, attempts, attempt)
    wanted = _wanted(committed, manifests, keep) | protected
    clock = _modified_at(tier, max(c for c in committed if c.attempt == attempt))
    stale = [c for c in _stale(tier, found, attempt, in_flight_secs) if c not in in_flight]
    unfinished = [c for c in found.tombs if len(tier.list(f"{layout.checkpoint_dir(c)}/")) > 1]
    back = {c: data for c in unfinished if c in protected and (data := _whole(tier, manifests[c])) is not None}
    delete = tuple(c for c in sorted([*committed, *stale]) if c not in wanted)
    holding = {checkpoint.attempt for checkpoint in listed}
    return Plan(
        delete=delete + tuple(c for c in unfinished if c not in back),
        bury=tuple(c for c in found.tombs if c not in unfinished and clock - _modified_at(tier, c) > TOMBSTONE_SECS),
        forget=tuple(sorted(a for a, r in attempts.items() if a < attempt and not r.chosen and a not in holding)),
        revive=back,
        kept={c: _reasons(tier, c, found) for c in listed if c not in delete and c not in found.tombs},
        committed=frozenset(committed),
        unfinished=frozenset(unfinished) - back.keys(),
        untrue=untrue,
        attempt=attempt,
    )


def apply(
    tier: Tier, namespace: str, chosen: Plan, *, told: Callable[[CheckpointId], None] | None = None
) -> list[CheckpointId]:
    """Carry *chosen* out, telling *told* of each deletion; return the checkpoints that were deleted.

    What was pinned since the plan was made stays, and a newer attempt ends it: that may have begun from what is next.
    """
    if isinstance(tier, ShareTier):
        return _drop(tier, chosen, told)
    for checkpoint, manifest in chosen.revive.items():
        revive(tier, checkpoint, manifest)
    done: list[CheckpointId] = []
    for checkpoint in chosen.delete:
        grave = entomb(tier, namespace, checkpoint)
        if grave is None:
            continue
        crashpoint("retention.after_tombstone")
        overtaken = _overtaken(tier, chosen)
        if grave.before is None or not (overtaken or is_pinned(tier, checkpoint)):
            _finish(tier, grave)
            done.append(checkpoint)
            if told is not None:
                told(checkpoint)
        else:
            revive(tier, checkpoint, grave.before)
        if overtaken:
            return done
    for checkpoint in chosen.bury:
        tier.delete([layout.in_dir(checkpoint, layout.MANIFEST)])
    tier.delete(layout.attempt_key(attempt) for attempt in chosen.forget)
    return done


def _drop(tier: ShareTier, chosen: Plan, told: Callable[[CheckpointId], None] | None) -> list[CheckpointId]:
    """One share less and a checkpoint is none: no tombstone has to say so first."""
    done: list[CheckpointId] = []
    for checkpoint in sorted(chosen.untrue.difference(chosen.delete)):
        with suppress(CorruptPartError):  # damage is not ours to judge, and its manifest stays with it
            tier.confirm(checkpoint)
    for checkpoint in chosen.delete:
        if _overtaken(tier, chosen):
            return done
        tier.drop(checkpoint)
        crashpoint("retention.after_delete")
        done.append(checkpoint)
        if told is not None:
            told(checkpoint)
    tier.delete(layout.attempt_key(attempt) for attempt in chosen.forget)
    return done


def would_keep(tier: Tier, keep: KeepPolicy, newcomer: CommittedCheckpoint) -> bool:
    """Return whether *keep* would let *newcomer* stay among what is committed on *tier* now."""
    with one_pass(tier):
        found, _ = _manifests(tier, list_checkpoints(tier), keep)
    manifests = {c: m for c, m in found.items() if m is not None and not m.tombstone}
    facts = {c: CommittedCheckpoint(checkpoint=c, saved_at=m.saved_at, metrics=m.metrics) for c, m in manifests.items()}
    facts[newcomer.checkpoint] = newcomer
    ordered = sorted(facts)
    return ask_keep(keep, [facts[c] for c in ordered])[ordered.index(newcomer.checkpoint)]


def _finish(tier: Tier, grave: Grave) -> None:
    delete_files(tier, grave.tombstone)
    crashpoint("retention.after_delete")


def _overtaken(tier: Tier, chosen: Plan) -> bool:
    asking = chosen.attempt
    return asking is not None and any(attempt > asking for attempt in list_attempts(tier))


def _manifests(
    tier: Tier, listed: Iterable[CheckpointId], keep: KeepPolicy
) -> tuple[dict[CheckpointId, Manifest | None], frozenset[CheckpointId]]:
    """Read the manifests; return them, and whose is untrue. On a `ShareTier` what *keep* wants is asked for anew.

    What is no longer whole must not count among what is kept. What goes anyway need be neither whole nor undamaged, as
    long as its manifest can be read.
    """
    found, asked, untrue = {c: _manifest(tier, c) for c in listed}, set[CheckpointId](), set[CheckpointId]()
    while isinstance(tier, ShareTier):
        committed = [c for c, m in found.items() if m is not None and not m.tombstone]
        anew = sorted(_wanted(committed, found, keep) - asked)
        if not anew:
            break
        for checkpoint in anew:
            try:
                if not tier.confirm(checkpoint, tell=False):
                    untrue.add(checkpoint)
                    found[checkpoint] = None
            except (FormatError, CorruptPartError):
                found[checkpoint] = None
        asked.update(anew)
    return found, frozenset(untrue)


def _manifest(tier: Tier, checkpoint: CheckpointId) -> Manifest | None:
    try:
        return read_manifest(tier, checkpoint)
    except (FormatError, CorruptPartError):
        # Damaged or newer than this release: not ours to judge, so not ours to delete.
        return None


def _wanted(
    committed: Iterable[CheckpointId], manifests: Mapping[CheckpointId, Manifest | None], keep: KeepPolicy
) -> set[CheckpointId]:
    ordered = sorted(committed)
    facts = [
        CommittedCheckpoint(checkpoint=c, saved_at=m.saved_at, metrics=m.metrics)
        for c in ordered
        if (m := manifests[c]) is not None
    ]
    return {c for c, wanted in zip(ordered, ask_keep(keep, facts), strict=True) if wanted}


def _protected_parents(tier: Tier, attempts: Mapping[Attempt, AttemptRecord], asking: Attempt) -> set[CheckpointId]:
    """What attempts went on from. Where room is for a fixed number, only what the newest did: its line is the one."""
    if isinstance(tier, ShareTier):
        attempts = {attempt: record for attempt, record in attempts.items() if attempt == asking}
    return _parents(attempts)


def _parents(attempts: Mapping[Attempt, AttemptRecord]) -> set[CheckpointId]:
    return {record.parent for record in attempts.values() if record.parent is not None}


def _whole(tier: Tier, tombstone: Manifest | None) -> bytes | None:
    return None if tombstone is None else whole_below(tier, tombstone)


def _reasons(tier: Tier, checkpoint: CheckpointId, found: _Found) -> frozenset[Kept]:
    """Why *checkpoint*, which is not to be deleted, stays."""
    why: set[Kept] = set()
    if found.manifests[checkpoint] is None:
        return frozenset({Kept.UNREADABLE if _is_unreadable(tier, checkpoint, found) else Kept.IN_FLIGHT})
    if checkpoint in found.pins:
        why.add(Kept.PINNED)
    if checkpoint in _parents(found.attempts):
        why.add(Kept.PARENT)
    if checkpoint == max(found.committed):
        why.add(Kept.NEWEST)
    return frozenset(why or {Kept.POLICY})


def _stale(tier: Tier, found: _Found, attempt: Attempt, in_flight_secs: float) -> list[CheckpointId]:
    """Checkpoints that were never committed and never will be."""
    newest = max(c for c in found.committed if c.attempt == attempt)
    clock = _modified_at(tier, newest)
    stale: list[CheckpointId] = []
    for checkpoint in found.listed:
        if found.manifests[checkpoint] is not None or checkpoint >= newest or _is_unreadable(tier, checkpoint, found):
            continue
        if clock - _modified_at(tier, checkpoint) > in_flight_secs:
            stale.append(checkpoint)
    return stale


def _modified_at(tier: Tier, checkpoint: CheckpointId) -> float:
    """When its newest object was written, by the tier's own clock."""
    return max((entry.modified_at for entry in tier.list(f"{layout.checkpoint_dir(checkpoint)}/")), default=0.0)


def _is_unreadable(tier: Tier, checkpoint: CheckpointId, found: _Found) -> bool:
    """Whether the manifest that was not read stands all the same."""
    key = layout.in_dir(checkpoint, layout.MANIFEST)
    return checkpoint not in found.untrue and any(entry.key == key for entry in tier.list(key))
