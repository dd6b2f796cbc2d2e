"""What every tier holds, seen from this node by names, manifests and records: little is read, and no part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sm_tiered import inventory, layout, lineage
from sm_tiered.cli.common import is_durable, open_for_looking, parallel, threads_for
from sm_tiered.errors import FormatError, KeyNotFoundError, TieredError, TierError
from sm_tiered.manifest import MAX_BYTES, attempt_record_from_json, record_from_json
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId, Manifest
from sm_tiered.settings import Settings, TierSettings
from sm_tiered.tiers.base import Tier

__all__ = ["Survey", "TierView", "View", "newest_first", "read_holding", "survey"]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One checkpoint on one tier."""

    checkpoint: CheckpointId
    bytes: int
    """Of all its files there."""
    files: int
    problem: str | None
    """Why it is not complete, in a few words; None when it is."""
    saved_at: float | None = None
    world: int | None = None
    ranks: int = 0
    """How many records are there."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    pinned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TierView:
    """One tier."""

    settings: TierSettings
    tier: Tier | None
    """Open; None when it could not even be opened."""
    views: tuple[View, ...] = ()
    """Newest first."""
    attempts: Mapping[Attempt, AttemptRecord] = field(default_factory=dict[Attempt, AttemptRecord])
    seen: frozenset[Attempt] = frozenset()
    """Every attempt that has a record or a checkpoint there."""
    error: TieredError | None = None
    """Why it did not answer."""

    def view(self, checkpoint: CheckpointId) -> View | None:
        """Return what it holds of *checkpoint*."""
        return next((view for view in self.views if view.checkpoint == checkpoint), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All tiers of a recipe."""

    settings: Settings
    tiers: tuple[TierView, ...]
    """In recipe order."""
    next: CheckpointId | None
    """What a restore would take now; None: nothing, or it can't be told because a tier did not answer."""

    @property
    def attempts(self) -> dict[Attempt, AttemptRecord]:
        """The records of all attempts, from whichever tier has them."""
        return {attempt: record for view in self.tiers for attempt, record in view.attempts.items()}

    @property
    def left_behind(self) -> frozenset[CheckpointId]:
        """Checkpoints that are no candidates for latest: the user went back to a step below them."""
        found = {view.checkpoint for tier in self.tiers for view in tier.views}
        return frozenset(found.difference(lineage.candidates(found, self.attempts)))

    def close(self) -> None:
        """Close the tiers."""
        for view in self.tiers:
            if view.tier is not None:
                view.tier.close()


def survey(settings: Settings) -> Survey:
    """Look at every tier of *settings*, all at once."""
    views = parallel(lambda tier: _look(tier, settings.namespace), settings.tiers, threads=len(settings.tiers))
    return _with_next(Survey(settings=settings, tiers=tuple(views), next=None))


def _look(settings: TierSettings, namespace: str) -> TierView:
    tier: Tier | None = None
    try:
        tier = open_for_looking(settings, namespace)
        files: dict[CheckpointId, dict[str, int]] = {}
        attempts: list[Attempt] = []
        pins: set[str] = set()
        for entry in tier.list(""):
            head, _, name = entry.key.partition("/")
            checkpoint = layout.parse_checkpoint_dir(head)
            if checkpoint is not None and name:
                files.setdefault(checkpoint, {})[name] = entry.size
            elif head == layout.ATTEMPTS and (attempt := layout.parse_attempt_key(entry.key)) is not None:
                attempts.append(attempt)
            elif head == "pins":
                pins.add(name.removesuffix(".json"))
        threads = threads_for(settings)
        order = sorted(files, reverse=True)
        views = parallel(lambda each: _view(tier, settings, each, files[each]), order, threads=threads)
        records = parallel(lambda attempt: _attempt_record(tier, attempt), attempts, threads=threads)
    except TieredError as error:
        return TierView(settings=settings, tier=tier, error=error)
    found = [view for view in views if view is not None]
    return TierView(
        settings=settings,
        tier=tier,
        views=tuple(replace(view, pinned=layout.checkpoint_dir(view.checkpoint) in pins) for view in found),
        attempts={record.attempt: record for record in records if record is not None},
        seen=frozenset(attempts) | {view.checkpoint.attempt for view in found},
    )


def _attempt_record(tier: Tier, attempt: Attempt) -> AttemptRecord | None:
    try:
        record = attempt_record_from_json(tier.get(layout.attempt_key(attempt), max_bytes=MAX_BYTES).data)
    except (FormatError, KeyNotFoundError):
        return None
    return record if record.attempt == attempt else None


def _view(tier: Tier, settings: TierSettings, checkpoint: CheckpointId, files: Mapping[str, int]) -> View | None:
    """Return the view of *checkpoint*, or None when nothing but its tombstone is left."""
    if not is_durable(settings):
        return _in_memory(tier, checkpoint, files)
    view = _committed(tier, checkpoint, files)
    if view is not None and view.problem is not None:
        # A listing is no snapshot: ask once more before something is said to be missing.
        prefix = f"{layout.checkpoint_dir(checkpoint)}/"
        view = _committed(tier, checkpoint, {e.key.removeprefix(prefix): e.size for e in tier.list(prefix)})
    return view


def _in_memory(tier: Tier, checkpoint: CheckpointId, files: Mapping[str, int]) -> View:
    holding = inventory.read_holding(tier, checkpoint, durable=False)
    view = View(
        checkpoint=checkpoint,
        bytes=sum(files.values()),
        files=len(files),
        problem=holding.problem,
        ranks=len(holding.records),
    )
    for _, data in sorted(holding.records.items()):
        try:
            record = record_from_json(data)
        except FormatError:
            continue
        return replace(view, saved_at=record.saved_at, world=record.world, metrics=record.metrics)
    return view


def _committed(tier: Tier, checkpoint: CheckpointId, files: Mapping[str, int]) -> View | None:
    ranks = sum(layout.parse_record_name(name) is not None for name in files)
    view = View(checkpoint=checkpoint, bytes=sum(files.values()), files=len(files), problem=None, ranks=ranks)
    if not files:
        return None
    if layout.MANIFEST not in files:
        return replace(view, problem="not committed")
    try:
        manifest = inventory.read_manifest(tier, checkpoint)
    except FormatError as error:
        return replace(view, problem=f"the manifest is damaged: {error.message}")
    if manifest is None:
        return None
    if manifest.tombstone:
        return replace(view, problem="being deleted") if len(files) > 1 else None
    return replace(
        view,
        problem=_missing(manifest, files),
        saved_at=manifest.saved_at,
        world=manifest.world,
        metrics=manifest.metrics,
    )


def _missing(manifest: Manifest, files: Mapping[str, int]) -> str | None:
    """Return which of the files that the manifest names is missing or cut."""
    for name, size in manifest.parts.items():
        if files.get(name) != size:
            return f"{name} is missing" if name not in files else f"{name} has {files[name]} bytes, recorded {size}"
    for rank in manifest.records:
        if layout.record_name(rank) not in files:
            return f"the record of rank {rank} is missing"
    return None


def read_holding(tier: Tier, settings: TierSettings, checkpoint: CheckpointId) -> inventory.Holding:
    """Return *checkpoint* with its records, asking for several at once where that is faster."""
    if not is_durable(settings):
        return inventory.read_holding(tier, checkpoint, durable=False)
    try:
        manifest = inventory.read_manifest(tier, checkpoint)
    except FormatError as error:
        return inventory.Holding(checkpoint=checkpoint, records={}, manifest=None, problem=error.message)
    if manifest is None or manifest.tombstone:
        problem = "not committed" if manifest is None else "being deleted"
        records = inventory.read_records(tier, checkpoint) if manifest is None else {}
        return inventory.Holding(checkpoint=checkpoint, records=records, manifest=manifest, problem=problem)
    found: dict[int, bytes] = {}
    for each in parallel(
        lambda rank: inventory.read_records(tier, checkpoint, range(rank, rank + 1)),
        range(manifest.world),
        threads=threads_for(settings),
    ):
        found.update(each)
    try:
        problem = inventory.records_problem(checkpoint, found, manifest)
    except FormatError as error:
        problem = error.message
    return inventory.Holding(checkpoint=checkpoint, records=found, manifest=manifest, problem=problem)


def _with_next(seen: Survey) -> Survey:
    """Walk the candidates as restore does, short of reading parts."""
    newest = max((attempt for view in seen.tiers for attempt in view.seen), default=None)
    found = {view.checkpoint for tier in seen.tiers for view in tier.views}
    for checkpoint in lineage.candidates(found, seen.attempts):
        if _untold(seen, checkpoint.attempt == newest):
            return seen
        seen = replace(seen, tiers=tuple(_confirmed(tier, checkpoint) for tier in seen.tiers))
        if _untold(seen, checkpoint.attempt == newest):
            return seen
        held = [tier.view(checkpoint) for tier in seen.tiers if tier.error is None]
        if any(view is not None and view.problem is None for view in held):
            return replace(seen, next=checkpoint)
    return seen


def _untold(seen: Survey, of_newest_attempt: bool) -> bool:
    """Whether restore would refuse to choose, because a tier did not answer."""
    if all(tier.error is None for tier in seen.tiers):
        return False
    return seen.settings.unreachable != "use_memory" or not of_newest_attempt


def _confirmed(tier: TierView, checkpoint: CheckpointId) -> TierView:
    """Return *tier* with its view of *checkpoint* checked against the records, which the first look did without."""
    view = tier.view(checkpoint)
    if view is None or view.problem is not None or tier.tier is None or not is_durable(tier.settings):
        return tier
    try:
        problem = read_holding(tier.tier, tier.settings, checkpoint).problem
    except TierError as error:
        return replace(tier, error=error)
    checked = replace(view, problem=problem)
    return replace(tier, views=tuple(checked if each is view else each for each in tier.views))


def newest_first(views: Sequence[View], attempts: Mapping[Attempt, AttemptRecord]) -> list[View]:
    """Return *views* in the order in which restore would try them; what is no candidate comes last."""
    candidates = lineage.candidates((view.checkpoint for view in views), attempts)
    order = {checkpoint: place for place, checkpoint in enumerate(candidates)}
    return sorted(views, key=lambda view: order.get(view.checkpoint, len(order)))
