"""One checkpoint on one tier, by its names, manifest and records: little is read, and no part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sm_tiered import inventory, layout
from sm_tiered.cli.common import is_durable, parallel, threads_for
from sm_tiered.errors import FormatError
from sm_tiered.manifest import record_from_json
from sm_tiered.records import CheckpointId, Manifest
from sm_tiered.settings import S3Settings, TierSettings
from sm_tiered.tiers.base import Tier

__all__ = ["NOT_COMMITTED", "View", "checked_view", "make_view", "make_views", "read_holding"]


NOT_COMMITTED = "not committed"


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One checkpoint on one tier."""

    checkpoint: CheckpointId
    bytes: int
    """Of all its files there; of those that the manifest names where *by_manifest*."""
    files: int
    problem: str | None
    """Why it is not complete, in a few words; None when it is."""
    saved_at: float | None = None
    world: int | None = None
    ranks: int = 0
    """How many records are there."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    pinned: bool = False
    by_manifest: bool = False
    """Whether the manifest alone was read, and nobody looked whether the files that it names are there."""
    late: bool = False
    """Whether all records are there and only the manifest is missing: a restore commits such a one, and takes it."""

    @property
    def restorable(self) -> bool:
        """Whether a restore could take it from here, as far as names, manifest and records tell."""
        return self.problem is None or self.late


def make_views(
    tier: Tier, settings: TierSettings, checkpoints: Sequence[CheckpointId], *, newest: int | None
) -> list[View]:
    """Return the views of *checkpoints*, in their order, those that are not deleted; at most *newest* (None: all)."""
    threads = threads_for(settings)
    found: list[View] = []
    place = 0
    while place < len(checkpoints) and (newest is None or len(found) < newest):
        # Tombstones give no row: behind the first batch a few more are asked for at once than may be needed.
        count = len(checkpoints) if newest is None else max(newest - len(found), threads if place else 1)
        batch = checkpoints[place : place + count]
        place += len(batch)
        made = parallel(lambda each: make_view(tier, settings, each), batch, threads=threads)
        found += [view for view in made if view is not None]
    return found[:newest]


def make_view(
    tier: Tier, settings: TierSettings, checkpoint: CheckpointId, files: Mapping[str, int] | None = None
) -> View | None:
    """Return the view of *checkpoint*, or None when nothing but its tombstone is left.

    *files*: their sizes, where somebody has listed them. Else they are listed here, but on S3, where that is a request
    for each checkpoint: there the manifest has to do.
    """
    if not is_durable(settings):
        return _in_memory(tier, checkpoint, _files(tier, checkpoint) if files is None else files)
    if files is None and isinstance(settings, S3Settings):
        return _by_manifest(tier, checkpoint)
    view = _committed(tier, checkpoint, _files(tier, checkpoint) if files is None else files)
    if view is not None and view.problem is not None and files is not None:
        # A listing is no snapshot: ask once more before something is said to be missing.
        view = _committed(tier, checkpoint, _files(tier, checkpoint))
    return view


def checked_view(tier: Tier, settings: TierSettings, view: View) -> View:
    """Return *view*, of a durable tier, checked against the records, and against the files where nobody did."""
    if view.problem is not None:
        return replace(view, late=_is_late(tier, view.checkpoint)) if view.problem == NOT_COMMITTED else view
    holding = read_holding(tier, settings, view.checkpoint)
    if not view.by_manifest or holding.manifest is None:
        return replace(view, problem=holding.problem)
    files = _files(tier, view.checkpoint)
    problem = holding.problem or _missing(holding.manifest, files)
    ranks = _records(files)
    return replace(view, problem=problem, bytes=sum(files.values()), files=len(files), ranks=ranks, by_manifest=False)


def _is_late(tier: Tier, checkpoint: CheckpointId) -> bool:
    records = inventory.read_records(tier, checkpoint)
    try:
        return bool(records) and inventory.records_problem(checkpoint, records, None) is None
    except FormatError:
        return False


def _files(tier: Tier, checkpoint: CheckpointId) -> dict[str, int]:
    prefix = f"{layout.checkpoint_dir(checkpoint)}/"
    return {entry.key.removeprefix(prefix): entry.size for entry in tier.list(prefix)}


def _records(names: Iterable[str]) -> int:
    return sum(layout.parse_record_name(name) is not None for name in names)


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


def _by_manifest(tier: Tier, checkpoint: CheckpointId) -> View | None:
    try:
        manifest = inventory.read_manifest(tier, checkpoint)
    except FormatError as error:
        return View(checkpoint=checkpoint, bytes=0, files=1, problem=_damaged(error), by_manifest=True)
    if manifest is None:
        return _committed(tier, checkpoint, _files(tier, checkpoint))
    if manifest.tombstone:
        return None
    view = View(
        checkpoint=checkpoint,
        bytes=sum(manifest.parts.values()),
        files=len(manifest.parts) + len(manifest.records) + 1,
        problem=None,
        ranks=len(manifest.records),
        by_manifest=True,
    )
    return _told_by(view, manifest)


def _committed(tier: Tier, checkpoint: CheckpointId, files: Mapping[str, int]) -> View | None:
    view = View(checkpoint=checkpoint, bytes=sum(files.values()), files=len(files), problem=None, ranks=_records(files))
    if not files:
        return None
    if layout.MANIFEST not in files:
        return replace(view, problem=NOT_COMMITTED)
    try:
        manifest = inventory.read_manifest(tier, checkpoint)
    except FormatError as error:
        return replace(view, problem=_damaged(error))
    if manifest is None:
        return None
    if manifest.tombstone:
        return replace(view, problem="being deleted") if len(files) > 1 else None
    return replace(_told_by(view, manifest), problem=_missing(manifest, files))


def _told_by(view: View, manifest: Manifest) -> View:
    return replace(view, saved_at=manifest.saved_at, world=manifest.world, metrics=manifest.metrics)


def _damaged(error: FormatError) -> str:
    return f"the manifest is damaged: {error.message}"


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
        problem = NOT_COMMITTED if manifest is None else "being deleted"
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
