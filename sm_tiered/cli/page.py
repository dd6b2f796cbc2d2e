"""The page of ``sm-tiered timeline``: one HTML file with its style, its script and what it shows, and nothing else.

What comes from events is data: it stands in a JSON block that no text can close, and the script writes it as text.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from sm_tiered.cli.told import Run, remarks
from sm_tiered.story import Leg, OnTier, Save

__all__ = ["STATES", "data_of", "page"]

STATES = ("acknowledged", "committed", "streamed", "skipped", "failed", "open")
"""A state is its place here in what the page is given."""
_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("scale.js", "model.js", "draw.js", "chart.js", "words.js", "hands.js", "start.js")
_MARKS_KEPT = 4000
"""Of a run; more would not be seen."""
_TEXTS_KEPT = 5000
"""Of the reasons why saves failed or were skipped, so many that differ."""


def page(run: Run, *, made_at: float) -> str:
    """Return the page of *run*."""
    data = json.dumps(data_of(run, made_at=made_at), separators=(",", ":"), allow_nan=False)
    # Inside of a script only these could end it, or begin a comment.
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    parts = {
        "TITLE": html.escape(f"{run.namespace}: checkpoints"),
        "STYLE": _asset("page.css"),
        "DATA": data,
        "SCRIPT": "\n".join(_asset(name) for name in _SCRIPTS),
    }
    # Split once: what is put in is not looked at again.
    first, *rest = _asset("page.html").split("{{")
    pieces = [first]
    for piece in rest:
        name, _, after = piece.partition("}}")
        pieces += [parts[name], after]
    return "".join(pieces)


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


class _Texts:
    """Each text once."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._places: dict[str, int] = {}

    def place(self, text: str) -> int:
        """Return where *text* stands; -1 when it is empty, or one too many."""
        if not text or (text not in self._places and len(self.all) >= _TEXTS_KEPT):
            return -1
        if text not in self._places:
            self._places[text] = len(self.all)
            self.all.append(text)
        return self._places[text]


def data_of(run: Run, *, made_at: float) -> dict[str, object]:
    """Return what the page shows. Times are seconds since ``t0``, to the millisecond."""
    story, ledger, texts = run.story, run.ledger, _Texts()
    t0 = ledger.began_at
    tiers = {name: place for place, name in enumerate(story.tiers)}

    def since(at: float) -> float:
        return round(at - t0, 3)

    def on(found: OnTier) -> list[object]:
        ended = None if found.ended_at is None else since(found.ended_at)
        facts = [tiers[found.tier], STATES.index(found.state), since(found.began_at), ended]
        return [*facts, found.bytes, texts.place(found.reason)]

    def save(one: Save) -> list[object]:
        blocked = round(one.blocked_secs, 4)
        return [one.leg, one.step, since(one.at), blocked, one.bytes, int(one.requested), [on(t) for t in one.tiers]]

    per_leg = max(2, _MARKS_KEPT // max(1, len(story.legs)))
    lost = {found.leg: since(found.from_at) for found in reversed(run.seen.lost)}
    return {
        "version": 1,
        "namespace": run.namespace,
        "made_at": round(made_at, 3),
        "t0": round(t0, 3),
        "t1": since(ledger.ended_at),
        "memory": tiers.get(story.memory) if story.memory is not None else None,
        "tiers": list(story.tiers),
        "launches": story.launches,
        "legs": [_leg(leg, since, lost.get(leg.index), per_leg) for leg in story.legs],
        "saves": [save(one) for one in story.saves],
        "texts": texts.all,
        "windows": [
            [w.leg, since(w.began_at), since(w.ended_at), round(w.process_secs, 3), round(w.node_secs, 3)]
            for w in run.seen.windows
        ],
        "failures": [
            {
                "leg": found.leg,
                "at": since(found.at),
                "kind": found.kind,
                "how": found.how,
                "reached": found.reached_step,
                "restored": found.restored_step,
                "lost_steps": found.lost_steps,
                "lost_secs": round(found.lost_secs, 3),
                "at_least": found.at_least,
            }
            for found in ledger.failures
        ],
        "notes": [[since(note.at), note.kind, note.text] for note in story.notes],
        "remarks": remarks(run),
        "figures": _figures(run),
    }


def _figures(run: Run) -> dict[str, object]:
    ledger = run.ledger
    names = ("kept", "blocked", "lost", "restoring", "closing", "down")
    return {
        "share": ledger.share,
        "wall": round(ledger.wall_secs, 3),
        "lost_steps": ledger.lost_steps,
        **{name: round(ledger.total(f"{name}_secs"), 3) for name in names},
        "mtbf": ledger.mtbf_secs("process", "node"),
    }


def _leg(leg: Leg, since: Callable[[float], float], lost_from: float | None, marks: int) -> dict[str, object]:
    restored = leg.restored
    return {
        "launch": leg.launch,
        "attempt": leg.attempt[:40],
        "began": since(leg.began_at),
        "ready": since(leg.ready_at),
        "ended": since(leg.ended_at),
        "end": leg.end,
        "preempted": leg.preempted,
        "reached": leg.reached_step,
        "lost_from": lost_from,
        "restored": None
        if restored is None
        else [restored.step, restored.tier, round(restored.secs, 3), restored.bytes, restored.chosen],
        "marks": [[since(at), step] for at, step in _thinned(leg.marks, marks)],
    }


def _thinned(marks: tuple[tuple[float, int], ...], number: int) -> Iterable[tuple[float, int]]:
    """At most about so many, the first and the last among them."""
    stride = max(1, -(-len(marks) // number))
    return [*marks[:-1:stride], *marks[-1:]]
