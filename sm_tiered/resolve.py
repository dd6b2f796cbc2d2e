"""What could be restored: every rank's view of every tier, gathered once, and one candidate assembled from it.

All of this is collective and touches no state. `sm_tiered.restore` walks the candidates.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from sm_tiered import checksum, layout, lineage
from sm_tiered.commit import Compose, Outcome, try_commit
from sm_tiered.errors import FormatError, TieredError, TierError, TierUnavailableError
from sm_tiered.group import Group
from sm_tiered.inventory import (
    Holding,
    list_attempts,
    list_checkpoints,
    parsed_problem,
    read_attempts,
    read_holding,
    read_records,
    records_problem,
)
from sm_tiered.manifest import attempt_record_from_json, attempt_record_to_json, record_from_json
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId, Record
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.memory import MemoryTier
from sm_tiered.tiers.shares import ShareTier, one_pass

__all__ = ["Candidate", "Survey", "Tiers", "assemble", "survey", "unknown", "unreachable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """The tiers of a recipe, opened."""

    memory: MemoryTier | None
    durable: Mapping[str, Tier]
    """By name, in recipe order."""
    compose: Compose
    """Makes the files for other readers when a commit is made here."""
    optional: frozenset[str] = frozenset()
    """Those of *durable* whose silence does not end a restore while others have something."""

    def without(self, names: Iterable[str]) -> Tiers:
        """Return the others."""
        gone = frozenset(names)
        return replace(self, durable={name: tier for name, tier in self.durable.items() if name not in gone})

    @contextmanager
    def reading(self) -> Generator[None, None, None]:
        """Let go, at the end, of what was opened to be read and was not."""
        try:
            yield
        finally:
            for tier in self.durable.values():
                if isinstance(tier, ShareTier):
                    tier.let_go()


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What all ranks see together."""

    found: Mapping[CheckpointId, frozenset[str]]
    """The tiers that have something of a checkpoint, complete or not."""
    attempts: Mapping[Attempt, AttemptRecord]
    seen: frozenset[Attempt]
    """Every attempt that anything tells of."""
    damaged: frozenset[Attempt]
    """Attempts of whose record there are only damaged copies."""
    unreachable: Mapping[str, str]
    """Tiers that did not answer, with the reason."""
    skipped: Mapping[str, str]
    """Optional tiers that did not: what they hold is not known, and others may do."""
    nodes: tuple[str | None, ...]
    """For each rank, which memory directory it has: the same text means the same directory."""

    @property
    def candidates(self) -> list[CheckpointId]:
        """The candidates for latest, best first."""
        return lineage.candidates(self.found, self.attempts, self.damaged)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One checkpoint with all its records."""

    checkpoint: CheckpointId
    records: tuple[Record, ...]
    """One for each rank of the world that saved it; empty when the checkpoint is not whole."""
    durable: tuple[str, ...]
    """The durable tiers on which it is committed."""
    near: frozenset[int] = field(default_factory=frozenset[int])
    """Ranks whose record stands in this node's own memory, as it was committed."""
    near_problem: str | None = None
    """What is wrong with a record in memory that is there."""
    problem: str | None = None
    """Why it can't be restored."""
    unreachable: tuple[str, ...] = ()
    """Durable tiers that did not answer when they were asked for it."""
    skipped: Mapping[str, str] = field(default_factory=dict[str, str])
    """Optional ones that did not, with the reason."""
    watermarked: bool = False
    """Whether one of its records tells of an earlier complete checkpoint."""


def survey(group: Group, tiers: Tiers) -> Survey:
    """Look at every tier from every rank. Collective. Durable tiers are asked by rank 0 alone."""
    views = group.gather(_view(tiers, ask_durable=group.rank == 0))
    found: dict[CheckpointId, set[str]] = {}
    attempts: dict[Attempt, AttemptRecord] = {}
    seen: set[Attempt] = set()
    damaged: set[Attempt] = set()
    unreachable: dict[str, str] = {}
    for view in views:
        for tier, names in view["checkpoints"].items():
            for checkpoint in filter(None, map(layout.parse_checkpoint_dir, names)):
                found.setdefault(checkpoint, set()).add(tier)
        for text in view["attempts"]:
            record = attempt_record_from_json(text.encode())
            attempts[record.attempt] = record
        seen.update(map(layout.parse_attempt, view["seen"]))
        damaged.update(map(layout.parse_attempt, view["damaged"]))
        unreachable.update(view["unreachable"])
    return Survey(
        found={checkpoint: frozenset(names) for checkpoint, names in found.items()},
        attempts=attempts,
        seen=frozenset(seen | {checkpoint.attempt for checkpoint in found}),
        damaged=frozenset(damaged - set(attempts)),
        unreachable={name: reason for name, reason in unreachable.items() if name not in tiers.optional},
        skipped={name: reason for name, reason in unreachable.items() if name in tiers.optional},
        nodes=tuple(view["node"] for view in views),
    )


def _view(tiers: Tiers, *, ask_durable: bool) -> dict[str, Any]:
    checkpoints: dict[str, list[str]] = {}
    attempts: list[str] = []
    seen: list[str] = []
    damaged: list[str] = []
    unreachable: dict[str, str] = {}
    asked: dict[str, Tier] = {tiers.memory.name: tiers.memory} if tiers.memory else {}
    if ask_durable:
        asked |= tiers.durable
    for name, tier in asked.items():
        try:
            with one_pass(tier):
                checkpoints[name] = [layout.checkpoint_dir(checkpoint) for checkpoint in list_checkpoints(tier)]
                seen += [str(attempt) for attempt in list_attempts(tier)]
                good, bad = read_attempts(tier)
            attempts += [attempt_record_to_json(record).decode() for record in good.values()]
            damaged += map(str, bad)
        except TierError as error:
            unreachable[name] = str(error)
    return {
        "node": tiers.memory.node_key() if tiers.memory else None,
        "checkpoints": checkpoints,
        "attempts": attempts,
        "seen": seen,
        "damaged": damaged,
        "unreachable": unreachable,
    }


def assemble(group: Group, tiers: Tiers, seen: Survey, checkpoint: CheckpointId) -> Candidate:
    """Bring the records of *checkpoint* together from all nodes and tiers. Collective."""
    one_node = len(set(seen.nodes)) == 1
    own, trouble = _own_records(tiers, checkpoint)
    text = {str(rank): data.decode(errors="replace") for rank, data in own.items()}
    leads = seen.nodes.index(seen.nodes[group.rank]) == group.rank
    share = text if leads and not one_node else {}
    durable = _durable_records(tiers, checkpoint) if group.rank == 0 else {}
    digest = checksum.digest(repr(text).encode())
    views = group.gather({"memory": share, "digest": digest, "trouble": trouble, "durable": durable})
    shares = [view["memory"] for view in views]
    if one_node and len({view["digest"] for view in views}) > 1:
        shares = group.gather(text)  # one directory, and yet they do not see the same: all must judge alike
    in_memory = dict(own) if one_node and not any(shares) else _merged(shares)
    troubles = [view["trouble"] for view in views if view["trouble"]]
    found = _candidate(checkpoint, in_memory, views[0]["durable"], troubles)
    silent = {name: view["problem"] for name, view in views[0]["durable"].items() if view.get("unreachable")}
    return replace(
        found,
        near=found.near & frozenset(own),
        unreachable=tuple(name for name in silent if name not in tiers.optional),
        skipped={name: reason for name, reason in silent.items() if name in tiers.optional},
    )


def _own_records(tiers: Tiers, checkpoint: CheckpointId) -> tuple[dict[int, bytes], str | None]:
    """The records in this node's memory, or why they can't be read."""
    if tiers.memory is None:
        return {}, None
    try:
        return read_records(tiers.memory, checkpoint), None
    except TierError as error:
        return {}, error.message


def _durable_records(tiers: Tiers, checkpoint: CheckpointId) -> dict[str, Any]:
    """By tier: the committed records, or why it is not committed there."""
    found: dict[str, Any] = {}
    for name, tier in tiers.durable.items():
        try:
            held: Holding = read_holding(tier, checkpoint, durable=True)
            left = read_records(tier, checkpoint) if held.manifest is None and not held.damaged else {}
            if _commit_late(tiers, tier, checkpoint, left):
                held = read_holding(tier, checkpoint, durable=True)
        except (TieredError, OSError) as error:  # a finisher may meet any of them
            # Something stands there that could not be read: that is not "nothing was ever saved".
            silent = isinstance(error, TierUnavailableError)
            found[name] = {"problem": str(error), "unreachable": silent, "watermarked": True}
            continue
        records = {str(rank): data.decode(errors="replace") for rank, data in held.records.items()}
        committed = held.damaged or (held.manifest is not None and not held.manifest.tombstone)
        found[name] = {
            "problem": held.problem,
            "records": {} if held.problem else records,
            "watermarked": committed or any(record_from_json(data).watermark is not None for data in left.values()),
        }
    return found


def _commit_late(tiers: Tiers, tier: Tier, checkpoint: CheckpointId, records: Mapping[int, bytes]) -> bool:
    """Commit what an earlier launch left with all its *records* and no manifest; return whether it is committed now."""
    if not records or records_problem(checkpoint, records, None) is not None:
        return False
    return try_commit(tier, checkpoint, world=len(records), compose=tiers.compose) is Outcome.COMMITTED


def _merged(shares: Sequence[Mapping[str, str]]) -> dict[int, bytes]:
    return {int(rank): text.encode() for share in shares for rank, text in share.items()}


def _candidate(
    checkpoint: CheckpointId, in_memory: Mapping[int, bytes], durable: Mapping[str, Any], troubles: Sequence[str]
) -> Candidate:
    committed = {name: view for name, view in durable.items() if view["problem"] is None}
    good, bad = _parse_each(in_memory, checkpoint)
    bad = bad or (troubles[0] if troubles else None)
    missing = parsed_problem(checkpoint, good)
    problems = [f"memory: {bad or missing}"] if bad or in_memory or not durable else []
    problems += [f"{name}: {view['problem']}" for name, view in durable.items() if view["problem"] is not None]
    watermarked = bad is not None or any(record.watermark is not None for record in good.values())
    watermarked |= any(view.get("watermarked", False) for view in durable.values())
    records = good
    for view in committed.values():
        # What was committed is what counts: a record in memory that differs is damaged.
        data = _merged([view["records"]])
        other = [rank for rank in good if in_memory[rank] != data.get(rank)]
        bad = bad or (f"the record of rank {other[0]} is not the one that was committed" if other else None)
        good = {rank: record for rank, record in good.items() if rank not in other}
        records = {rank: good[rank] if rank in good else record_from_json(text) for rank, text in data.items()}
    if not committed and missing is not None:
        return Candidate(
            checkpoint=checkpoint, records=(), durable=(), problem="; ".join(problems), watermarked=watermarked
        )
    return Candidate(
        checkpoint=checkpoint,
        records=tuple(record for _, record in sorted(records.items())),
        durable=tuple(committed),
        near=frozenset(good),
        near_problem=bad,
        watermarked=watermarked,
    )


def _parse_each(records: Mapping[int, bytes], checkpoint: CheckpointId) -> tuple[dict[int, Record], str | None]:
    """The records that are records of *checkpoint*, and what is wrong with one that is not."""
    good: dict[int, Record] = {}
    problem: str | None = None
    for rank, data in records.items():
        try:
            record = record_from_json(data)
        except FormatError as error:
            problem = f"the record of rank {rank} is damaged: {error.message}"
            continue
        if record.rank == rank and record.checkpoint == checkpoint:
            good[rank] = record
        else:
            problem = f"the record of rank {rank} is that of {record.checkpoint}, rank {record.rank}"
    return good, problem


def unreachable(name: str, reason: str) -> TierUnavailableError:
    """Return the error that says that tier *name* did not answer, so that what is newest is not known."""
    return TierUnavailableError(
        f"can't tell what is newest: tier {name} did not answer ({reason})",
        hint="Try again, or set `unreachable: use_memory` to go on from a complete memory step of the newest attempt.",
        tier=name,
    )


def unknown(name: str, reason: str) -> TierUnavailableError:
    """Return the error that says that nothing can be restored but, perhaps, from the optional tier *name*."""
    return TierUnavailableError(
        f"can't tell what there is: tier {name} did not answer ({reason}), and nothing else can be restored",
        hint="Try again. Where nothing can be there, take the tier out of the recipe for this start.",
        tier=name,
    )
