"""A run's story as values: launches, legs, saves and where each of them came to. `sm_tiered.story_telling` makes it.

A **launch** is the life of one job's processes. A **leg** is the training of a launch between two restores, or from its
start to its end: what one leg trains continues from one checkpoint. Times are UTC seconds since the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SAFE", "Leg", "Note", "OnTier", "Restore", "Save", "Story"]

SAFE = frozenset({"acknowledged", "committed", "streamed"})
"""States in which a tier has the whole save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnTier:
    """What became of one save on one tier."""

    tier: str
    state: str
    """``acknowledged`` (memory), ``committed``, ``streamed`` by the trainer, ``skipped``, ``failed`` or ``open``."""
    began_at: float
    """When its bytes were copied, or its upload began."""
    ended_at: float | None
    """None: while it is open."""
    bytes: int | None = None
    reason: str = ""
    """Why it was skipped or failed; text from outside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """One step that was to be saved."""

    leg: int
    step: int
    at: float
    """When training went on: what is saved is the work until then."""
    blocked_secs: float
    """How long training waited; 0 where that was not told."""
    bytes: int | None
    """Of the rank that tells."""
    requested: bool
    """Whether somebody asked for it from outside."""
    tiers: tuple[OnTier, ...]

    def on(self, tier: str | None) -> OnTier | None:
        """Return what became of it on *tier*; None: it was not meant for it."""
        return next((found for found in self.tiers if found.tier == tier), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """What a leg continues from."""

    step: int
    tier: str
    """Those that were read from, joined with ``+``."""
    secs: float
    bytes: int | None
    chosen: bool
    """Whether the user named the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something that went wrong, or a reader may want to know."""

    at: float
    kind: str
    """The event's name."""
    text: str
    """From outside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """Training that continues from one checkpoint, or from the beginning."""

    index: int
    launch: int
    """Counted from 0."""
    attempt: str
    """The last one that it opened; empty: none was told of."""
    began_at: float
    ready_at: float
    """When the restore was over and training began; as `began_at` where nothing was to be restored."""
    ended_at: float
    """The last that was heard of it."""
    end: str
    """``finished``, ``closed``, ``failed`` (an exception), ``restored`` (it went on from another step in the same
    launch), or ``silent``: nothing was told, so it was killed, or goes on."""
    restored: Restore | None
    nothing_saved: bool
    """Whether a restore found that nothing was ever saved."""
    preempted: bool
    reached_step: int | None
    """The newest step that was told of; None: none was."""
    marks: tuple[tuple[float, int], ...]
    """Time and step, where the training told how far it is; both ascend."""
    saves: tuple[Save, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """All that the events of one namespace tell."""

    memory: str | None
    """The name of the memory tier; None: there is none, or it can't be told."""
    tiers: tuple[str, ...]
    """Fast → durable: as the recipe has them, or the memory tier and then the others by name."""
    legs: tuple[Leg, ...] = ()
    """In the order of launches."""
    notes: tuple[Note, ...] = ()
    unreadable: int = 0
    """Events that lack what they should have."""
    unmatched: int = 0
    """What drainers told of saves that nothing else is known of."""

    @property
    def saves(self) -> list[Save]:
        """Every save, leg by leg."""
        return [save for leg in self.legs for save in leg.saves]

    @property
    def launches(self) -> int:
        """How many there were."""
        return 1 + max((leg.launch for leg in self.legs), default=-1)

    def follows(self, leg: Leg) -> Leg | None:
        """Return the leg after *leg*, or None when it is the last."""
        return self.legs[leg.index + 1] if leg.index + 1 < len(self.legs) else None
