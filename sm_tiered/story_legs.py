"""One launch's events → its legs, while they are read. What drainers tell is added by `sm_tiered.story_telling`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sm_tiered.errors import FormatError
from sm_tiered.event_reading import Told
from sm_tiered.story import Leg, Note, OnTier, Restore, Save
from sm_tiered.story_facts import Facts

__all__ = ["DraftLeg", "DraftSave", "DraftTier", "LaunchReader"]

_TIER = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)


@dataclass(slots=True, kw_only=True)
class DraftTier:
    """An `OnTier` in the making."""

    state: str
    began_at: float
    ended_at: float | None = None
    bytes: int | None = None
    reason: str = ""
    begins: list[float] = field(default_factory=list[float])
    """When drainers began; more than one where one of them died."""

    def settle(self, state: str, at: float, reason: str = "") -> None:
        """Say how it ended."""
        self.state, self.ended_at, self.reason = state, max(at, self.began_at), reason


@dataclass(slots=True, kw_only=True)
class DraftSave:
    """A `Save` in the making."""

    step: int
    at: float
    blocked_secs: float = 0.0
    bytes: int | None = None
    requested: bool = False
    tiers: dict[str, DraftTier] = field(default_factory=dict[str, DraftTier])

    def on(self, tier: str, at: float) -> DraftTier:
        """Return what is known of it on *tier*; what is not yet known of begins at *at*."""
        return self.tiers.setdefault(tier, DraftTier(state="open", began_at=at))

    def made(self, leg: int) -> Save:
        """Return the value."""
        tiers = tuple(
            OnTier(
                tier=name,
                state=draft.state,
                began_at=draft.began_at,
                ended_at=draft.ended_at,
                bytes=draft.bytes,
                reason=draft.reason,
            )
            for name, draft in self.tiers.items()
        )
        return Save(
            leg=leg,
            step=self.step,
            at=self.at,
            blocked_secs=self.blocked_secs,
            bytes=self.bytes,
            requested=self.requested,
            tiers=tiers,
        )


@dataclass(slots=True, kw_only=True)
class DraftLeg:
    """A `Leg` in the making."""

    began_at: float
    ready_at: float
    ended_at: float
    end: str = "silent"
    attempt: str = ""
    restored: Restore | None = None
    nothing_saved: bool = False
    preempted: bool = False
    marks: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    saves: dict[int, DraftSave] = field(default_factory=dict[int, DraftSave])

    @property
    def trained(self) -> bool:
        """Whether anything was told that comes after its restore."""
        return bool(self.marks or self.saves)

    def mark(self, at: float, step: int) -> None:
        """Note that the training has come to *step*."""
        if not self.marks or step > self.marks[-1][1]:
            self.marks.append((at, step))

    def save(self, step: int, at: float) -> DraftSave:
        """Return the save of *step*, a new one if none is known."""
        return self.saves.setdefault(step, DraftSave(step=step, at=at))

    def made(self, index: int, launch: int) -> Leg:
        """Return the value."""
        saves = sorted((save for save in self.saves.values()), key=lambda save: (save.at, save.step))
        return Leg(
            index=index,
            launch=launch,
            attempt=self.attempt,
            began_at=self.began_at,
            ready_at=self.ready_at,
            ended_at=self.ended_at,
            end=self.end,
            restored=self.restored,
            nothing_saved=self.nothing_saved,
            preempted=self.preempted,
            reached_step=self.marks[-1][1] if self.marks else None,
            marks=tuple(self.marks),
            saves=tuple(save.made(index) for save in saves),
        )


class LaunchReader:
    """Reads what one launch told, in the order of time."""

    def __init__(self, memory: str | None) -> None:
        self.legs: list[DraftLeg] = []
        self.notes: list[Note] = []
        self.later: list[tuple[Told, DraftLeg]] = []
        """What is only worth something where no drainer tells it."""
        self.unreadable = 0
        self._memory = memory
        self._looking: float | None = None
        """Since when a restore goes on."""
        self._opened: tuple[str, bool] | None = None
        self._requested: set[int] = set()
        self._handlers: dict[str, Callable[[Told, Facts, DraftLeg], None]] = {
            "RestoreStarted": self._restore_started,
            "Restored": self._restored,
            "NothingSaved": self._nothing_saved,
            "AttemptOpened": self._attempt_opened,
            "SaveStaged": self._staged,
            "SaveAcknowledged": self._acknowledged,
            "SaveSkipped": self._skipped,
            "DurableSkipped": self._skipped,
            "SaveFailed": self._failed,
            "SaveStreamed": self._streamed,
            "SaveDurable": self._durable,
            "SaveRequested": self._request,
            "Progress": self._progress,
            "Preempted": self._preempted,
            "TrainingEnded": self._ended,
        }

    def read(self, events: Sequence[Told]) -> None:
        """Read all of a launch."""
        for told in events:
            if not self.legs:
                self.legs.append(DraftLeg(began_at=told.time, ready_at=told.time, ended_at=told.time))
            leg = self.legs[-1]
            leg.ended_at = max(leg.ended_at, told.time)
            handler = self._handlers.get(told.kind)
            try:
                if handler is not None:
                    handler(told, Facts(told.facts), leg)
                else:
                    self._note(told)
            except FormatError:
                self.unreadable += 1
        if self._looking is not None and self.legs and not self.legs[-1].trained:
            # It ended while it restored.
            self.legs[-1].ready_at = self.legs[-1].ended_at

    def _note(self, told: Told) -> None:
        fields = ("warning", "reason", "error", "attempt")
        text = next((told.facts[name] for name in fields if isinstance(told.facts.get(name), str)), None)
        if text is not None:
            self.notes.append(Note(at=told.time, kind=told.kind, text=str(text)[:500]))

    # ---- restores

    def _restore_started(self, told: Told, facts: Facts, leg: DraftLeg) -> None:
        self._looking = told.time

    def _leg_for_restore(self, told: Told, leg: DraftLeg) -> DraftLeg:
        """The leg that a restore begins: this one, or where it has trained, a new one."""
        began = self._looking if self._looking is not None else told.time
        if leg.trained:
            leg.end, leg.ended_at = "restored", max(began, leg.marks[-1][0] if leg.marks else began)
            leg = DraftLeg(began_at=leg.ended_at, ready_at=told.time, ended_at=told.time)
            self.legs.append(leg)
        leg.ready_at = max(leg.began_at, told.time)
        if self._opened is not None:
            leg.attempt = self._opened[0]
        return leg

    def _restored(self, told: Told, facts: Facts, leg: DraftLeg) -> None:
        chosen = self._opened is not None and self._opened[1]
        restored = Restore(
            step=facts.step(), tier=facts.tier(), secs=facts.secs("secs"), bytes=facts.bytes(), chosen=chosen
        )
        leg = self._leg_for_restore(told, leg)
        leg.restored = restored
        leg.mark(told.time, restored.step)
        self._looking = self._opened = None

    def _nothing_saved(self, told: Told, facts: Facts, leg: DraftLeg) -> None:
        self._leg_for_restore(told, leg).nothing_saved = True
        self._looking = self._opened = None

    def _attempt_opened(self, told: Told, facts: Facts, leg: DraftLeg) -> None:
        if self._looking is None:
            leg.attempt = facts.text("attempt")
        else:
            # It is told before the restore that it belongs to.
            self._opened = (facts.text("attempt"), facts.flag("chosen"))

    # ---- saves

    def _staged(self, told: Told, facts: Facts, leg: DraftLeg) -> None:
        self._looking = None
        save = leg.save(facts.step(), told.time)
        save.blocked_secs, save.bytes, save.at = facts.secs("blocked_secs"), facts.bytes(), told.time
        save.requested = save.step in self._requested
        if leg.marks and leg.marks[-1][1] == save.step:
            leg.marks.pop()  # what is saved is the work until training went on
        leg.mark(told.time, save.step)
        for tier in facts.tiers():
            save.on(tier, told.time)

    def _acknowledged(self, told: Told, facts: Facts, leg: DraftLeg) -> None:
        save = leg.save(facts.step(), told.time)
        leg.mark(told.time, save.step)
        if self._memory is not None:
            save.on(self._memory, save.at).settle("acknowledged", told.time)

    def _skipped(self, told: Told, facts: Facts, leg: DraftLeg) -> None:
        step, reason = facts.step(), facts.text("reason")
        head, _, rest = reason.partition(": ")
        if told.facts.get("tier") is not None:
            tier = facts.tier()
        else:  # of releases that had it in the text
            tier = head if rest and _TIER.fullmatch(head) else self._memory
        if tier is None:
            self._note(told)
            return
        draft = leg.save(step, told.time).on(tier, told.time)
        if draft.state in ("open", "skipped"):
            draft.settle("skipped", told.time, rest if rest and head == tier else reason)

    def _failed(self, told: Told, facts: Facts, leg: DraftLeg) -> None:
        step, tier, error = facts.step(), facts.tier(), facts.text("error")
        draft = leg.save(step, told.time).on(tier, told.time)
        if draft.state == "acknowledged":
            self.notes.append(Note(at=told.time, kind=told.kind, text=error))
        else:
            draft.settle("failed", told.time, error)

    def _streamed(self, told: Told, facts: Facts, leg: DraftLeg) -> None:
        step, tier, secs, reason = facts.step(), facts.tier(), facts.secs("secs"), facts.text("reason")
        draft = leg.save(step, told.time).on(tier, told.time)
        draft.began_at = told.time - secs
        draft.settle("streamed", told.time, reason)

    def _durable(self, told: Told, facts: Facts, leg: DraftLeg) -> None:
        self.later.append((told, leg))

    def _request(self, told: Told, facts: Facts, leg: DraftLeg) -> None:
        self._requested.add(facts.step())

    # ---- the training

    def _progress(self, told: Told, facts: Facts, leg: DraftLeg) -> None:
        leg.mark(told.time, facts.step())

    def _preempted(self, told: Told, facts: Facts, leg: DraftLeg) -> None:
        leg.preempted = True
        leg.mark(told.time, facts.step())

    def _ended(self, told: Told, facts: Facts, leg: DraftLeg) -> None:
        how, step = facts.text("how"), facts.step_or_none()
        if how not in ("finished", "closed", "failed"):
            raise FormatError("how is none that is known")
        leg.end = how
        if step is not None:
            leg.mark(told.time, step)
