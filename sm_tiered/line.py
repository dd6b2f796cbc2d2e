"""The line that saves follow: which attempt they belong to, what it continues, which steps it holds."""

from __future__ import annotations

import contextlib
import secrets
import time
from dataclasses import replace

from sm_tiered import deadline, layout, lineage
from sm_tiered.commit import publish_attempt, put_once
from sm_tiered.crashpoints import crashpoint
from sm_tiered.errors import TierError
from sm_tiered.event_log import Events
from sm_tiered.events import AttemptOpened, TierUnreachable
from sm_tiered.events import Restored as RestoredEvent
from sm_tiered.generations import Generations
from sm_tiered.group import Group
from sm_tiered.manifest import attempt_record_to_json
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId
from sm_tiered.resolve import Survey, Tiers, assemble, survey
from sm_tiered.restore import Restored
from sm_tiered.settings import HyperPodSettings, S3Settings, Settings
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.base import Tier

__all__ = ["Line"]

_ATTEMPT_SECS = 5.0
"""How long an attempt waits for a durable tier to note that it begins."""


class Line:
    """One rank's side of the present attempt. Opening one is collective."""

    def __init__(
        self, settings: Settings, group: Group, tiers: Tiers, *, events: Events, generations: Generations
    ) -> None:
        self._settings, self._group, self._tiers, self._events = settings, group, tiers, events
        self._generations = generations
        self._record: AttemptRecord | None = None
        self._last_step: int | None = None
        self._looked_at: tuple[Survey, Restored | None, bool] | None = None

    @property
    def current(self) -> Attempt | None:
        """The attempt that saves go to, if one is open."""
        return self._record.attempt if self._record is not None else None

    @property
    def record(self) -> AttemptRecord | None:
        """What that attempt tells of itself."""
        return self._record

    @property
    def last_step(self) -> int | None:
        """The newest step saved in the present attempt."""
        return self._last_step

    # ---- opening an attempt

    def attempt(self, step: int | None = None) -> Attempt:
        """Return the attempt that a save of *step* goes to. Collective where one is opened.

        The first call without a restore opens one. So does, after a look at an older step, one that is not above what
        was saved: the training went back there.
        """
        if self._looked_at is not None and (self.current is None or self._goes_back(step)):
            seen, restored, chosen = self._looked_at
            self._looked_at = None
            self.begin_after(seen, restored, chosen=chosen)
        if self.current is None:
            seen = self._quick_survey()
            self._open(seen, parent=None, chosen=False)
            self._keep_newest(seen)
        assert self._record is not None
        return self._record.attempt

    def _goes_back(self, step: int | None) -> bool:
        return step is not None and self._last_step is not None and step <= self._last_step

    def begin_after(self, seen: Survey, restored: Restored | None, *, chosen: bool) -> None:
        """Open the attempt that continues from *restored*, unless the present one already does. Collective."""
        if restored is None:
            if self.current is None:
                self._open(seen, parent=None, chosen=False)
            return
        goes_on = self.current == restored.checkpoint.attempt and self._last_step == restored.step
        if not goes_on:
            self._open(seen, parent=restored.checkpoint, chosen=chosen, source=restored.tier)
            self._continue_from(seen, restored.checkpoint)
        self._events.emit(
            RestoredEvent(
                step=restored.step,
                attempt=str(restored.checkpoint.attempt),
                tier=restored.tier,
                secs=restored.secs,
                bytes=restored.bytes,
            )
        )

    def begin_when_saved(self, seen: Survey, restored: Restored | None, *, chosen: bool) -> None:
        """Leave it to a first save to open the attempt that continues from *restored*: this was a look."""
        self._looked_at = (seen, restored, chosen)

    def _open(self, seen: Survey, *, parent: CheckpointId | None, chosen: bool, source: str | None = None) -> None:
        known = [*seen.seen, *([self.current] if self.current else [])]
        proposal = lineage.next_attempt(known, utc_secs=int(time.time()), nonce=secrets.token_hex(4))
        attempt = layout.parse_attempt(self._group.gather(str(proposal))[0])
        namespace = self._settings.namespace
        record = AttemptRecord(namespace=namespace, attempt=attempt, parent=parent, chosen=chosen, source=source)
        crashpoint("attempt.before_record")
        self._write(record)
        crashpoint("attempt.after_record")
        self._record, self._last_step = record, None
        self._events.emit(
            AttemptOpened(attempt=str(attempt), parent_step=parent.step if parent else None, chosen=chosen)
        )

    def _write(self, record: AttemptRecord) -> None:
        key, data = layout.attempt_key(record.attempt), attempt_record_to_json(record)
        if self._tiers.memory is not None:
            try:
                put_once(self._tiers.memory, key, data)
            except TierError as error:
                self._events.emit(TierUnreachable(tier=self._tiers.memory.name, error=str(error)))
        if self._group.rank == 0:
            # A launch on other nodes must find this ordinal taken; and a choice must outlive this node. What can't be
            # written now comes with the first promotion.
            for name, tier in self._tiers.durable.items():
                try:
                    with contextlib.nullcontext() if record.chosen else deadline.within(_ATTEMPT_SECS):
                        put_once(tier, key, data)
                except TierError as error:
                    self._events.emit(TierUnreachable(tier=name, error=str(error)))

    def _keep_newest(self, seen: Survey) -> None:
        """What stands whole in memory outlives this attempt's first saves, though nobody restored it. Collective."""
        near, memory = replace(self._tiers, durable={}), self._tiers.memory
        for checkpoint in seen.candidates if memory else ():
            here = memory is not None and memory.name in seen.found[checkpoint]
            if here and assemble(self._group, near, seen, checkpoint).problem is None:
                self._continue_from(seen, checkpoint)
                return

    def _continue_from(self, seen: Survey, checkpoint: CheckpointId) -> None:
        order = seen.candidates
        older = order[order.index(checkpoint) + 1 :] if checkpoint in order else []
        self._generations.continue_from(older, checkpoint)

    def _quick_survey(self) -> Survey:
        """Look at the tiers without patience: a durable tier that is down must not hold up a first save."""
        quick = {
            tier.name: open_tier(
                replace(
                    tier,
                    retry_attempts=min(2, tier.retry_attempts),
                    retry_deadline_secs=min(5.0, tier.retry_deadline_secs),
                    request_timeout_secs=min(3.0, tier.request_timeout_secs),
                ),
                self._settings.namespace,
            )
            for tier in self._settings.durable
            if isinstance(tier, (S3Settings, HyperPodSettings))
        }
        try:
            seen = survey(self._group, replace(self._tiers, durable={**self._tiers.durable, **quick}))
        finally:
            for tier in quick.values():
                tier.close()
        for name, reason in {**seen.unreachable, **seen.skipped}.items():
            self._events.emit(TierUnreachable(tier=name, error=reason))
        return seen

    # ---- the steps of an attempt

    def next_checkpoint(self, step: int) -> CheckpointId:
        """Return the name of a save of *step* in the present attempt."""
        return CheckpointId(attempt=self.attempt(step), step=step)

    def note_saved(self, checkpoint: CheckpointId) -> None:
        """Say that a save of *checkpoint* has begun."""
        self._last_step, self._looked_at = checkpoint.step, None
        if self._generations.line[-1:] != [checkpoint]:
            self._generations.add(checkpoint)

    def forget(self, checkpoint: CheckpointId) -> None:
        """Say that nothing of *checkpoint* was written on any rank."""
        self._generations.line = [known for known in self._generations.line if known != checkpoint]
        steps = [known.step for known in self._generations.line if known.attempt == self.current]
        self._last_step = max(steps, default=None)

    def publish(self, tier: Tier) -> None:
        """Bring the present attempt's record to *tier*, for a save that does not go through the drainer."""
        if self._record is not None:
            publish_attempt(tier, self._record.attempt, attempt_record_to_json(self._record))
