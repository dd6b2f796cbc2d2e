"""What `timeline` and `report` begin with: a recipe, or files of events, read and told as a story."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sm_tiered import layout
from sm_tiered.cli.common import open_for_looking, open_recipe, parallel, threads_for
from sm_tiered.cli.output import clean
from sm_tiered.errors import ConfigError, FormatError, TieredError
from sm_tiered.event_reading import Piece, Reading, merge, of_paths, of_tier
from sm_tiered.exposure import Exposure, exposure
from sm_tiered.goodput import Goodput, goodput
from sm_tiered.settings import Settings, TierSettings
from sm_tiered.story import Story
from sm_tiered.story_telling import tell

__all__ = ["Run", "read_run", "remarks"]

_EVENTS_FILE = re.compile(r".*\.jsonl(\.\d+)?", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that is known of a namespace's run."""

    namespace: str
    settings: Settings | None
    """None: files of events were given, and no recipe."""
    reading: Reading
    story: Story
    seen: Exposure
    ledger: Goodput
    errors: dict[str, TieredError] = field(default_factory=dict[str, TieredError])
    """By tier: what did not answer."""


def read_run(sources: Sequence[str]) -> Run:
    """Return the run that *sources* tell of: one recipe, or files and directories of events.

    Raises:
        ConfigError: they can't be read, or hold events of several namespaces.
        TieredError: there are no events.
    """
    if any(Path(source).is_dir() or _EVENTS_FILE.fullmatch(source) for source in sources):
        reading = _merged(*of_paths(map(Path, sources)))
        return _run(reading, None, {})
    if len(sources) != 1:
        hint = "Give one recipe, or files and directories of events."
        raise ConfigError(f"{len(sources)} recipes were given", hint=hint)
    settings = open_recipe(sources[0])
    found = parallel(lambda tier: _look(tier, settings.namespace), settings.tiers, threads=len(settings.tiers))
    errors = {
        tier.name: part for tier, part in zip(settings.tiers, found, strict=True) if isinstance(part, TieredError)
    }
    parts = [part for part in found if not isinstance(part, TieredError)]
    pieces = [piece for part in parts for piece in part[0]]
    return _run(_merged(pieces, tuple(line for part in parts for line in part[1])), settings, errors)


def remarks(run: Run) -> list[str]:
    """Return what a reader should know of what was read, one sentence each."""
    found = [f"{name} did not answer: {error.message}" for name, error in run.errors.items()]
    if run.reading.bad_lines:
        found.append(f"left out, for they are no events: {_count(run.reading.bad_lines, 'line')}")
    if run.story.unreadable:
        found.append(f"left out, for they lack what they should have: {_count(run.story.unreadable, 'event')}")
    if run.story.unmatched:
        found.append(f"drainers tell {_count(run.story.unmatched, 'thing')} of saves that nothing else is known of")
    if missing := _silent_attempts(run.story):
        found.append(f"nothing is known of {_count(missing, 'attempt')}: no events are left of them")
    found += [f"not read: {reason}" for reason in run.reading.left_out[:5]]
    if len(run.reading.left_out) > 5:
        found.append(f"not read: {len(run.reading.left_out) - 5} more")
    return [clean(line) for line in found]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _silent_attempts(story: Story) -> int:
    """How many attempts there must have been, by their ordinals, that nothing is known of."""
    ordinals = set[int]()
    for leg in story.legs:
        with suppress(FormatError):
            ordinals.add(layout.parse_attempt(leg.attempt).ordinal)
    return max(ordinals, default=0) - len(ordinals)


def _look(settings: TierSettings, namespace: str) -> tuple[list[Piece], tuple[str, ...]] | TieredError:
    try:
        tier = open_for_looking(settings, namespace)
        try:
            return of_tier(tier, each=lambda read, keys: parallel(read, keys, threads=threads_for(settings)))
        finally:
            tier.close()
    except TieredError as error:
        return error


def _merged(pieces: Sequence[Piece], left_out: tuple[str, ...]) -> Reading:
    return merge(pieces, left_out=left_out)


def _run(reading: Reading, settings: Settings | None, errors: dict[str, TieredError]) -> Run:
    found = sorted({told.namespace for told in reading.events})
    if settings is None and len(found) > 1:
        names = ", ".join(clean(name)[:80] for name in found[:5])
        raise ConfigError(f"events of {len(found)} namespaces: {names}", hint="Give the files of one.")
    namespace = settings.namespace if settings is not None else (found[0] if found else "")
    events = [told for told in reading.events if told.namespace == namespace]
    if not events:
        _raise_nothing(settings, errors)
    memory = settings.memory.name if settings is not None and settings.memory is not None else None
    tiers = tuple(tier.name for tier in settings.tiers) if settings is not None else ()
    story = tell(events, tiers=tiers, memory=memory)
    if not story.legs:
        raise TieredError("the events tell of no launch", hint="Files of rank 0 are needed, not only a drainer's.")
    seen = exposure(story)
    return Run(
        namespace=clean(namespace)[:200],
        settings=settings,
        reading=reading,
        story=story,
        seen=seen,
        ledger=goodput(story, seen),
        errors=errors,
    )


def _raise_nothing(settings: Settings | None, errors: dict[str, TieredError]) -> None:
    for error in errors.values():
        raise error
    hint = "A run tells them below its memory tier, and brings them to durable tiers with each commit."
    if settings is not None and settings.memory is None:
        hint = "The recipe has no memory tier, and events are told there."
    raise TieredError("there are no events yet", hint=hint)
