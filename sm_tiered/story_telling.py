"""Events → the story of a run: a pure function.

Of each launch the lowest rank that is heard tells the story: all ranks tell alike what matters. Launches are ordered
by the ordinals of their attempts first and by time second, for clocks of different nodes may disagree. What a drainer
tells names no attempt: it belongs to the newest save of that step that had begun by then.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress

from sm_tiered import layout
from sm_tiered.errors import FormatError
from sm_tiered.event_reading import Told
from sm_tiered.story import Note, Story
from sm_tiered.story_facts import Facts
from sm_tiered.story_legs import DraftSave, LaunchReader

__all__ = ["tell"]

_NOTES_KEPT = 1000


def tell(events: Iterable[Told], *, tiers: Sequence[str] = (), memory: str | None = None) -> Story:
    """Return the story that *events* of one namespace tell.

    *tiers* and *memory*: names, as the recipe has them; without them they are taken from what was told.
    """
    everything = list(events)
    memory = memory or (None if tiers else _memory_of(everything))
    readers = [_read(launch, memory) for launch in _launches(everything)]
    drainers = _Drainers(readers)
    drainers.read([told for told in everything if told.rank is None])
    for told, _ in sorted((pair for reader in readers for pair in reader.later), key=lambda pair: pair[0].time):
        drainers.seen_durable(told)
    legs = [(number, leg) for number, reader in enumerate(readers) for leg in reader.legs]
    notes = sorted((note for reader in readers for note in reader.notes), key=lambda note: note.at)
    made = tuple(leg.made(index, launch) for index, (launch, leg) in enumerate(legs))
    seen = {on.tier for leg in made for save in leg.saves for on in save.tiers}
    first = [memory] if memory is not None and memory not in tiers else []
    return Story(
        memory=memory,
        tiers=tuple(dict.fromkeys([*first, *tiers, *sorted(seen)])),
        legs=made,
        notes=tuple((notes + drainers.notes)[-_NOTES_KEPT:]),
        unreadable=drainers.unreadable + sum(reader.unreadable for reader in readers),
        unmatched=drainers.unmatched,
    )


def _memory_of(events: Sequence[Told]) -> str | None:
    """The tier that saves go to and no drainer: that of memory."""
    staged, durable = set[str](), set[str]()
    for told in events:
        facts = Facts(told.facts)
        if told.kind == "SaveStaged":
            staged.update(facts.tiers())
        elif told.kind in ("PromoteStarted", "Committed", "SaveStreamed", "SaveDurable", "DurableSkipped"):
            with suppress(FormatError):
                durable.add(facts.tier())
    if "memory" in staged - durable:
        return "memory"
    left = staged - durable
    return left.pop() if len(left) == 1 else None


# ---- launches


def _launches(events: Sequence[Told]) -> list[list[Told]]:
    """What the lowest rank of each launch told, launch after launch."""
    found: dict[str, list[Told]] = {}
    for told in events:
        if told.rank is not None:
            found.setdefault(told.launch, []).append(told)
    launches: list[list[Told]] = []
    for name, heard in found.items():
        lead = min(told.rank for told in heard if told.rank is not None)
        mine = [told for told in heard if told.rank == lead]
        launches += [mine] if name else _split(mine)
    return _ordered(launches)


def _split(events: Sequence[Told]) -> list[list[Told]]:
    """A file that all launches shared: each restore is taken for the start of one."""
    launches: list[list[Told]] = []
    for told in events:
        if not launches or told.kind == "RestoreStarted":
            launches.append([])
        launches[-1].append(told)
    return launches


def _ordered(launches: list[list[Told]]) -> list[list[Told]]:
    launches.sort(key=lambda launch: launch[0].time)
    ordinal, keys = -1, list[tuple[int, float]]()
    for launch in launches:
        found = _ordinal(launch)
        # One that opened no attempt stays behind the one before it.
        ordinal = found if found is not None else ordinal
        keys.append((ordinal, launch[0].time))
    return [launch for _, launch in sorted(zip(keys, launches, strict=True), key=lambda pair: pair[0])]


def _ordinal(launch: Sequence[Told]) -> int | None:
    for told in launch:
        if told.kind == "AttemptOpened":
            with suppress(FormatError):
                return layout.parse_attempt(Facts(told.facts).text("attempt")).ordinal
    return None


def _read(launch: Sequence[Told], memory: str | None) -> LaunchReader:
    reader = LaunchReader(memory)
    reader.read(launch)
    return reader


# ---- drainers


class _Drainers:
    """Adds what drainers told to the saves that it is about."""

    def __init__(self, readers: Sequence[LaunchReader]) -> None:
        self.notes: list[Note] = []
        self.unreadable = self.unmatched = 0
        self._saves: dict[int, list[DraftSave]] = {}
        for reader in readers:
            for leg in reader.legs:
                for save in leg.saves.values():
                    self._saves.setdefault(save.step, []).append(save)
        for saves in self._saves.values():
            saves.sort(key=lambda save: save.at)

    def read(self, events: Sequence[Told]) -> None:
        """Read what drainers told, in the order of time."""
        handlers = {"PromoteStarted": self._started, "Committed": self._committed, "PromoteFailed": self._failed}
        for told in events:
            handler = handlers.get(told.kind)
            if handler is None:
                continue
            try:
                handler(told, Facts(told.facts))
            except FormatError:
                self.unreadable += 1

    def seen_durable(self, told: Told) -> None:
        """A trainer saw that a save is durable: that counts where no drainer told of it."""
        try:
            facts = Facts(told.facts)
            step, tier = facts.step(), facts.tier()
        except FormatError:
            self.unreadable += 1
            return
        save = self._newest(step, told.time)
        if save is not None:
            draft = save.on(tier, save.at)
            if draft.state not in ("committed", "streamed"):
                draft.settle("committed", told.time)

    def _newest(self, step: int, at: float) -> DraftSave | None:
        """The newest save of *step* that had begun by *at*."""
        saves = self._saves.get(step, [])
        return saves[place - 1] if (place := bisect_right(saves, at, key=lambda save: save.at)) else None

    def _started(self, told: Told, facts: Facts) -> None:
        step, tier = facts.step(), facts.tier()
        save = self._newest(step, told.time)
        if save is None:
            self.unmatched += 1
            return
        draft = save.on(tier, told.time)
        if draft.state in ("committed", "streamed"):
            return
        if not draft.begins:
            draft.began_at = told.time
        draft.begins.append(told.time)
        draft.state, draft.ended_at, draft.reason = "open", None, ""

    def _begun(self, step: int, tier: str, began_at: float, at: float) -> DraftSave | None:
        """The save of *step* whose upload to *tier* began nearest to *began_at*."""
        begun = [(abs(begin - began_at), save) for save in self._saves.get(step, []) for begin in _begins(save, tier)]
        return min(begun, key=lambda pair: pair[0])[1] if begun else self._newest(step, at)

    def _committed(self, told: Told, facts: Facts) -> None:
        step, tier, secs = facts.step(), facts.tier(), facts.secs("secs")
        save = self._begun(step, tier, told.time - secs, told.time)
        if save is None:
            self.unmatched += 1
            return
        draft = save.on(tier, max(save.at, told.time - secs))
        if draft.state == "committed":
            return
        if not draft.begins:
            draft.began_at = max(save.at, told.time - secs)
        draft.bytes = facts.bytes()
        draft.settle("committed", told.time)

    def _failed(self, told: Told, facts: Facts) -> None:
        step, tier, error = facts.step(), facts.tier(), facts.text("error")
        save = self._newest(step, told.time)
        if save is None:
            self.unmatched += 1
            return
        draft = save.on(tier, told.time)
        if draft.state in ("committed", "streamed"):
            # What could not be pruned is committed all the same.
            self.notes.append(Note(at=told.time, kind=told.kind, text=error))
        else:
            draft.settle("failed", told.time, error)


def _begins(save: DraftSave, tier: str) -> list[float]:
    draft = save.tiers.get(tier)
    return draft.begins if draft is not None else []
