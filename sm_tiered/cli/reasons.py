"""Which checkpoint a restore would take now, and why not a newer one: its walk, as seen from this node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from sm_tiered import layout
from sm_tiered.cli.common import is_durable
from sm_tiered.cli.survey import Survey, TierView, survey, untold, with_view
from sm_tiered.cli.views import View, read_holding
from sm_tiered.errors import FormatError, TieredError, TierError
from sm_tiered.manifest import record_from_json
from sm_tiered.records import CheckpointId, Record
from sm_tiered.settings import Settings
from sm_tiered.verify import Report, verify_checkpoint

__all__ = ["Candidate", "Copy", "Source", "Walk", "walk"]

_LOOKED_AT = 10
"""How many checkpoints a tier are looked at at once before the walk begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """One checkpoint on one tier."""

    tier: str
    problem: str | None
    """Why a restore can't take it whole from here; None: it can."""
    note: str | None = None
    """What is worth knowing besides."""
    ranks: frozenset[int] = frozenset()
    """Ranks whose record and parts are here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where ranks would read from."""

    tier: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One checkpoint that the walk comes to."""

    checkpoint: CheckpointId
    copies: tuple[Copy, ...]
    """On each tier that has something of it, in recipe order."""
    world: int | None
    sources: tuple[Source, ...] = ()
    """For each rank of the job that saved it the nearest copy; a job of another size reads what it needs of them."""
    refused: str | None = None
    """Why a restore passes it over; None: it takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """The whole of it."""

    seen: Survey
    candidates: tuple[Candidate, ...] = ()
    """In the order of the walk; where one is taken, it is the last."""
    stopped: str | None = None
    """Why the walk ends before it has taken anything or come to its end."""
    left_behind: tuple[CheckpointId, ...] = ()
    """What is no candidate for the latest, newest first."""
    errors: Mapping[str, TieredError] = field(default_factory=dict[str, TieredError])
    """Tiers that did not answer."""
    skipped: frozenset[str] = frozenset()
    """Those of them that a restore goes on without."""

    @property
    def taken(self) -> Candidate | None:
        """What a restore takes."""
        return next((candidate for candidate in self.candidates if candidate.refused is None), None)

    @property
    def nothing_saved(self) -> bool:
        """Whether every tier answered and nothing was ever saved."""
        found = any(view.found for view in self.seen.tiers)
        began = any(record.parent is not None for record in self.seen.attempts.values())
        return not (self.errors or found or began or self.seen.damaged)


def walk(settings: Settings, *, step: int | None, share: float | None) -> Walk:
    """Walk as a restore of *step*, or of the latest, does; the caller closes ``seen``.

    *share*: of the bytes of each copy that would be read, so much is verified; None: none.
    """
    seen = survey(settings, newest=None if step is not None else _LOOKED_AT, step=step)
    try:
        return _walk(seen, step=step, share=share)
    except BaseException:
        seen.close()
        raise


def _walk(seen: Survey, *, step: int | None, share: float | None) -> Walk:
    line = seen.candidates
    behind = sorted({c for tier in seen.tiers for c in tier.found}.difference(line), reverse=True)
    chosen = line if step is None else [c for c in (*line, *behind) if c.step == step]
    done: list[Candidate] = []
    stopped: str | None = None
    newest = seen.newest_attempt
    if not chosen and untold(seen, True):
        stopped = _silence(seen)
    for checkpoint in chosen:
        of_newest = checkpoint.attempt == newest
        if not untold(seen, of_newest):
            seen = with_view(seen, checkpoint)
        if untold(seen, of_newest):
            stopped = _silence(seen)
            break
        candidate = _candidate(seen, checkpoint, share)
        if candidate is None:
            continue
        done.append(candidate)
        if candidate.refused is None:
            break
    else:
        if seen.skipped and not stopped:
            names = ", ".join(seen.skipped)
            stopped = f"{names} did not answer, and nothing else can be restored: whether it holds more can't be told"
        elif seen.damaged and step is None and not stopped:
            stopped = f"the record of {max(seen.damaged)} is damaged: what it continues can't be told"
    errors = {tier.settings.name: tier.error for tier in seen.tiers if tier.error is not None}
    return Walk(
        seen=seen,
        candidates=tuple(done),
        stopped=stopped,
        left_behind=tuple(behind),
        errors=errors,
        skipped=frozenset(seen.skipped),
    )


def _silence(seen: Survey) -> str:
    return f"{', '.join(seen.silent)} did not answer, so what is newest can't be told"


def _candidate(seen: Survey, checkpoint: CheckpointId, share: float | None) -> Candidate | None:
    """Return what the walk says of *checkpoint*; None where nothing but tombstones is left of it."""
    held = [(tier, view) for tier in seen.tiers if tier.error is None and (view := tier.view(checkpoint)) is not None]
    if not held:
        return None
    committed: dict[int, bytes] = {}
    world: int | None = None
    copies: list[Copy] = []
    # Durable tiers first: what was committed is what counts, and a record in memory that differs is damaged.
    for tier, view in sorted(held, key=lambda pair: not is_durable(pair[0].settings)):
        copy, records = _copy(tier, view, committed)
        world = len(records) or world
        committed = committed or (records if is_durable(tier.settings) else {})
        copies.append(_read(tier, view, copy, share))
    order = [tier.settings.name for tier in seen.tiers]
    copies.sort(key=lambda copy: order.index(copy.tier))
    found = Candidate(checkpoint=checkpoint, copies=tuple(copies), world=world)
    if world is None:
        return replace(found, refused=_problems(copies))
    sources, missing = _sources(copies, world)
    if missing:
        return replace(found, refused=f"of {_ranks(missing)} nothing can be read: {_problems(copies)}")
    return replace(found, sources=sources)


def _copy(tier: TierView, view: View, committed: Mapping[int, bytes]) -> tuple[Copy, dict[int, bytes]]:
    """Return the copy, and its records by rank where that is all of them.

    *committed*: those of a durable tier, which others must be like.
    """
    assert tier.tier is not None
    name = tier.settings.name
    try:
        holding = read_holding(tier.tier, tier.settings, view.checkpoint)
        prefix = f"{layout.checkpoint_dir(view.checkpoint)}/"
        sizes = {entry.key.removeprefix(prefix): entry.size for entry in tier.tier.list(prefix)}
    except TierError as error:
        return Copy(tier=name, problem=error.message), {}
    records = dict(holding.records)
    whole = holding.problem is None or view.late
    if not whole and is_durable(tier.settings):
        return Copy(tier=name, problem=view.problem or holding.problem), {}
    ranks = {rank for rank, record in _parsed(records).items() if _has_parts(record, sizes)}
    other = {rank for rank in records if committed and records[rank] != committed.get(rank)}
    problem = None if view.late else holding.problem
    if other:
        problem = f"the record of {_ranks(other)} is not the one that was committed"
    elif problem is None and (cut := set(records) - ranks):
        problem = f"parts of {_ranks(cut)} are missing or cut"
    note = "only the manifest is missing: a restore commits it" if view.late else None
    copy = Copy(tier=name, problem=problem, note=note, ranks=frozenset(ranks - other))
    return copy, records if whole and not other else {}


def _parsed(records: Mapping[int, bytes]) -> dict[int, Record]:
    found: dict[int, Record] = {}
    for rank, data in records.items():
        try:
            record = record_from_json(data)
        except FormatError:
            continue
        if record.rank == rank and record.failed is None:
            found[rank] = record
    return found


def _has_parts(record: Record, sizes: Mapping[str, int]) -> bool:
    return all(sizes.get(part.name) == part.size for part in record.parts if not part.replica)


def _read(tier: TierView, view: View, copy: Copy, share: float | None) -> Copy:
    """Return *copy* without the ranks of which a byte is not what was saved."""
    if share is None or tier.tier is None or not copy.ranks or view.late:
        return copy
    report = verify_checkpoint(tier.tier, view.checkpoint, durable=is_durable(tier.settings), share=share)
    bad = {problem.rank for problem in report.problems if problem.rank is not None}
    if not report.problems:
        return replace(copy, note=f"{report.chunks} chunks read, all right")
    return replace(copy, problem=_damage(report), ranks=copy.ranks - bad)


def _damage(report: Report) -> str:
    first = report.problems[0]
    more = f" (and {len(report.problems) - 1} more)" if len(report.problems) > 1 else ""
    return f"damaged: {first.part} {first.what}{more}"


def _sources(copies: Iterable[Copy], world: int) -> tuple[tuple[Source, ...], frozenset[int]]:
    """For each rank the first tier, in recipe order, that has what is its own; and the ranks that have none."""
    left = set(range(world))
    found: list[Source] = []
    for copy in copies:
        here = left & copy.ranks
        if here:
            found.append(Source(tier=copy.tier, ranks=tuple(sorted(here))))
            left -= here
    return tuple(found), frozenset(left)


def _problems(copies: Iterable[Copy]) -> str:
    return "; ".join(f"{copy.tier}: {copy.problem}" for copy in copies if copy.problem is not None)


def _ranks(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    shown = ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"
