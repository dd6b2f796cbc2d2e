"""What every tier holds, seen from this node by names, manifests and records: little is read, and no part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sm_tiered import inventory, layout, lineage
from sm_tiered.cli.common import is_durable, open_for_looking, parallel, threads_for
from sm_tiered.cli.views import View, checked_view, make_view, make_views, read_holding
from sm_tiered.errors import CorruptPartError, FormatError, KeyNotFoundError, TieredError, TierError
from sm_tiered.manifest import MAX_BYTES, attempt_record_from_json
from sm_tiered.pins import pinned
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId
from sm_tiered.settings import HyperPodSettings, S3Settings, Settings, TierSettings
from sm_tiered.tiers.base import Tier

__all__ = ["Survey", "TierView", "View", "newest_first", "read_holding", "survey", "untold", "with_view"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierView:
    """One tier."""

    settings: TierSettings
    tier: Tier | None
    """Open; None when it could not even be opened."""
    views: tuple[View, ...] = ()
    """Newest first: all, or those that were asked for."""
    found: tuple[CheckpointId, ...] = ()
    """Every checkpoint that has a directory there, newest first; of some nothing but a tombstone may be left."""
    attempts: Mapping[Attempt, AttemptRecord] = field(default_factory=dict[Attempt, AttemptRecord])
    damaged: frozenset[Attempt] = frozenset()
    """Attempts whose record there can't be read."""
    seen: frozenset[Attempt] = frozenset()
    """Every attempt that has a record or a checkpoint there."""
    pins: frozenset[CheckpointId] = frozenset()
    error: TieredError | None = None
    """Why it did not answer."""

    def view(self, checkpoint: CheckpointId) -> View | None:
        """Return what it holds of *checkpoint*, if that was looked at."""
        return next((view for view in self.views if view.checkpoint == checkpoint), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All tiers of a recipe."""

    settings: Settings
    tiers: tuple[TierView, ...]
    """In recipe order."""
    next: CheckpointId | None
    """What a restore would take now; None: nothing, or it can't be told because a tier did not answer.

    A tier that a restore goes on without is no reason for None, unless nothing else is found.
    """
    newest: int | None = None
    """How many checkpoints a tier were looked at; None: all."""

    @property
    def attempts(self) -> dict[Attempt, AttemptRecord]:
        """The records of all attempts, from whichever tier has them."""
        return {attempt: record for view in self.tiers for attempt, record in view.attempts.items()}

    @property
    def damaged(self) -> frozenset[Attempt]:
        """Attempts of whose record there are only damaged copies."""
        return frozenset(attempt for view in self.tiers for attempt in view.damaged) - self.attempts.keys()

    @property
    def newest_attempt(self) -> Attempt | None:
        """The newest attempt that any tier tells of."""
        return max((attempt for view in self.tiers for attempt in view.seen), default=None)

    @property
    def candidates(self) -> list[CheckpointId]:
        """What restore would try, in its order: every checkpoint that has a directory on any tier."""
        found = {checkpoint for tier in self.tiers for checkpoint in tier.found}
        return lineage.candidates(found, self.attempts, self.damaged)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Tiers that did not answer and that a restore goes on without."""
        return tuple(name for name in self._without_answer if name in self.settings.optional)

    @property
    def silent(self) -> tuple[str, ...]:
        """Tiers that did not answer and whose silence ends a restore."""
        return tuple(name for name in self._without_answer if name not in self.settings.optional)

    @property
    def _without_answer(self) -> list[str]:
        return [tier.settings.name for tier in self.tiers if tier.error is not None]

    @property
    def left_behind(self) -> frozenset[CheckpointId]:
        """Of what was looked at, what is no candidate for latest: the user went back to a step below."""
        found = {view.checkpoint for tier in self.tiers for view in tier.views}
        return frozenset(found.difference(lineage.candidates(found, self.attempts)))

    def close(self) -> None:
        """Close the tiers."""
        for view in self.tiers:
            if view.tier is not None:
                view.tier.close()


def survey(settings: Settings, *, newest: int | None = None, step: int | None = None) -> Survey:
    """Look at every tier of *settings*.

    *newest*: look at so many checkpoints a tier, the newest, and at those that decide what is next; then names are
    listed by directory, on S3 in one delimited listing, and of a checkpoint there only the manifest is read. *step*:
    look at the checkpoints of that step alone.
    """

    def look(tiers: Sequence[TierSettings]) -> list[TierView]:
        return [_look(tier, settings.namespace, newest=newest, step=step) for tier in tiers]

    # Directories one after the other: thousands of short system calls in two threads are slower than in one.
    remote = [[tier] for tier in settings.tiers if isinstance(tier, (S3Settings, HyperPodSettings))]
    here = [tier for tier in settings.tiers if not isinstance(tier, (S3Settings, HyperPodSettings))]
    groups = parallel(look, [*remote, here], threads=len(remote) + 1)
    views = {view.settings.name: view for group in groups for view in group}
    ordered = tuple(views[tier.name] for tier in settings.tiers)
    return _with_next(Survey(settings=settings, tiers=ordered, next=None, newest=newest))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """What the names on a tier tell."""

    checkpoints: tuple[CheckpointId, ...]
    """Newest first."""
    attempts: tuple[Attempt, ...]
    pins: frozenset[CheckpointId]
    files: Mapping[CheckpointId, Mapping[str, int]] | None = None
    """Their sizes; None: not listed."""


def _look(settings: TierSettings, namespace: str, *, newest: int | None, step: int | None) -> TierView:
    tier: Tier | None = None
    try:
        tier = open_for_looking(settings, namespace)
        names = _every_name(tier) if newest is None and step is None else _directories(tier)
        views = _views(tier, settings, names, newest=newest, step=step)
        records, damaged = _attempt_records(tier, names.attempts, threads=threads_for(settings))
    except TieredError as error:
        return TierView(settings=settings, tier=tier, error=error)
    return TierView(
        settings=settings,
        tier=tier,
        views=tuple(_with_pin(view, names.pins) for view in views),
        found=names.checkpoints,
        attempts=records,
        damaged=damaged,
        seen=frozenset(names.attempts) | {checkpoint.attempt for checkpoint in names.checkpoints},
        pins=names.pins,
    )


def _every_name(tier: Tier) -> _Names:
    files: dict[CheckpointId, dict[str, int]] = {}
    attempts: list[Attempt] = []
    pins: set[CheckpointId] = set()
    known: dict[str, CheckpointId | None] = {}
    for entry in tier.list(""):
        head, _, name = entry.key.partition("/")
        if head not in known:
            known[head] = layout.parse_checkpoint_dir(head)
        checkpoint = known[head]
        if checkpoint is not None and name:
            files.setdefault(checkpoint, {})[name] = entry.size
        elif head == layout.ATTEMPTS and (attempt := layout.parse_attempt_key(entry.key)) is not None:
            attempts.append(attempt)
        elif head == layout.PINS and (pin := layout.parse_pin_key(entry.key)) is not None:
            pins.add(pin)
    order = tuple(sorted(files, reverse=True))
    return _Names(checkpoints=order, attempts=tuple(attempts), pins=frozenset(pins), files=files)


def _directories(tier: Tier) -> _Names:
    names = tier.list_dirs("")
    checkpoints = sorted((c for c in map(layout.parse_checkpoint_dir, names) if c is not None), reverse=True)
    attempts = inventory.list_attempts(tier) if layout.ATTEMPTS in names else []
    pins = pinned(tier) if layout.PINS in names else frozenset[CheckpointId]()
    return _Names(checkpoints=tuple(checkpoints), attempts=tuple(attempts), pins=pins)


def _views(tier: Tier, settings: TierSettings, names: _Names, *, newest: int | None, step: int | None) -> list[View]:
    files = names.files
    if files is None:
        wanted = [c for c in names.checkpoints if step is None or c.step == step]
        return make_views(tier, settings, wanted, newest=newest)

    def made(checkpoint: CheckpointId) -> View | None:
        return make_view(tier, settings, checkpoint, files[checkpoint])

    views = parallel(made, names.checkpoints, threads=threads_for(settings))
    return [view for view in views if view is not None]


def _attempt_records(
    tier: Tier, attempts: Sequence[Attempt], *, threads: int
) -> tuple[dict[Attempt, AttemptRecord], frozenset[Attempt]]:
    """The records of *attempts*, and the attempts whose record is damaged; one that is gone by now is neither."""

    def read(attempt: Attempt) -> AttemptRecord | None:
        try:
            return attempt_record_from_json(tier.get(layout.attempt_key(attempt), max_bytes=MAX_BYTES).data)
        except (FormatError, CorruptPartError):
            damaged.add(attempt)
        except KeyNotFoundError:
            pass
        return None

    damaged: set[Attempt] = set()
    records: dict[Attempt, AttemptRecord] = {}
    for attempt, record in zip(attempts, parallel(read, attempts, threads=threads), strict=True):
        if record is not None and record.attempt == attempt:
            records[attempt] = record
        elif record is not None:
            damaged.add(attempt)
    return records, frozenset(damaged)


def _with_pin(view: View, pins: frozenset[CheckpointId]) -> View:
    return replace(view, pinned=True) if view.checkpoint in pins else view


# ---- what is next


def _with_next(seen: Survey) -> Survey:
    """Walk the candidates as restore does, short of reading parts."""
    newest = seen.newest_attempt
    for checkpoint in seen.candidates:
        if untold(seen, checkpoint.attempt == newest):
            return seen
        seen = with_view(seen, checkpoint)
        if untold(seen, checkpoint.attempt == newest):
            return seen
        held = [tier.view(checkpoint) for tier in seen.tiers if tier.error is None]
        if any(view is not None and view.restorable for view in held):
            return replace(seen, next=checkpoint)
    return seen


def untold(seen: Survey, of_newest_attempt: bool) -> bool:
    """Whether restore would refuse to choose, because a tier did not answer."""
    if not seen.silent:
        return False
    return seen.settings.unreachable != "use_memory" or not of_newest_attempt


def with_view(seen: Survey, checkpoint: CheckpointId) -> Survey:
    """Return *seen* with *checkpoint* looked at on every tier that has it, and checked against its records."""
    return replace(seen, tiers=tuple(_with_view(tier, checkpoint) for tier in seen.tiers))


def _with_view(shown: TierView, checkpoint: CheckpointId) -> TierView:
    tier, settings = shown.tier, shown.settings
    if tier is None or shown.error is not None or checkpoint not in shown.found:
        return shown
    view = shown.view(checkpoint)
    try:
        if view is None:
            made = make_view(tier, settings, checkpoint)
            if made is None:
                return shown
            view = _with_pin(made, shown.pins)
        if is_durable(settings):
            view = checked_view(tier, settings, view)
    except TierError as error:
        return replace(shown, error=error)
    others = [other for other in shown.views if other.checkpoint != checkpoint]
    return replace(shown, views=tuple(sorted([*others, view], key=lambda each: each.checkpoint, reverse=True)))


def newest_first(views: Sequence[View], attempts: Mapping[Attempt, AttemptRecord]) -> list[View]:
    """Return *views* in the order in which restore would try them; what is no candidate comes last."""
    candidates = lineage.candidates((view.checkpoint for view in views), attempts)
    order = {checkpoint: place for place, checkpoint in enumerate(candidates)}
    return sorted(views, key=lambda view: order.get(view.checkpoint, len(order)))
