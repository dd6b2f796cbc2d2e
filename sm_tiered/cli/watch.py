"""``sm-tiered watch``: a running job from outside, live: its progress, its tiers, what is on its way."""

from __future__ import annotations

import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from sm_tiered.cli.amounts import check_number
from sm_tiered.cli.common import EXIT_FAILED, EXIT_OK, kind_of, open_recipe
from sm_tiered.cli.event_tail import facts_of
from sm_tiered.cli.output import age, print_json, render, size, table, text
from sm_tiered.cli.watching import Look, Seen, Watcher

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["run"]

_LEAST_SECS = 0.1
_INTERRUPTED = 128 + signal.SIGINT


def run(recipe: str, *, interval: float, once: bool, as_json: bool) -> int:
    """Watch the job of *recipe*, every *interval* seconds until Ctrl-C, or *once*; return the exit status."""
    check_number("--interval", interval, least=_LEAST_SECS)
    settings = open_recipe(recipe)
    watcher = Watcher(settings)
    try:
        if as_json or once:
            look = watcher.look()
            if as_json:
                print_json(_document(settings.namespace, look))
            else:
                render(*_blocks(settings.namespace, look))
            return EXIT_FAILED if any(tier.error is not None for tier in look.tiers) else EXIT_OK
        if sys.stdout.isatty():
            _live(watcher, settings.namespace, interval)
        else:
            _lines(watcher, interval)
    except KeyboardInterrupt:
        return _INTERRUPTED  # how a look that goes on for ever ends: nothing to tell
    finally:
        watcher.close()


def _live(watcher: Watcher, namespace: str, interval: float) -> NoReturn:
    from rich.console import Console, Group
    from rich.live import Live

    console = Console(markup=False, emoji=False, highlight=False)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(Group(*_blocks(namespace, watcher.look())), refresh=True)
            time.sleep(interval)


def _lines(watcher: Watcher, interval: float) -> NoReturn:
    while True:
        look = watcher.look()
        facts = [time.strftime("%H:%M:%S", time.gmtime(look.at)), _training(look)]
        facts += [f"{tier.settings.name}: {_tier_line(look, tier)}" for tier in look.tiers]
        render(text(" | ".join(facts)))
        time.sleep(interval)


# ---- for people


def _blocks(namespace: str, look: Look) -> list[RenderableType]:
    style = "green" if look.pids else "yellow"
    rows = table("tier", "newest", "age", "behind", "state", right=("newest", "age", "behind"))
    for tier in look.tiers:
        behind = look.behind(tier)
        rows.add_row(
            text(tier.settings.name, "bold"),
            text("none" if tier.newest is None else tier.newest),
            text("" if tier.saved_at is None else age(look.at - tier.saved_at)),
            text("" if behind is None else f"{behind:,}"),
            text(_state(tier), "red" if tier.error is not None else ""),
        )
    blocks: list[RenderableType] = [text(namespace, "bold"), text(_training(look), style), text(""), rows]
    if any(tier.on_its_way for tier in look.tiers) or look.drainer is not None:
        alive = f"drainer alive (pid {look.drainer})" if look.drainer is not None else "no drainer is alive here"
        blocks.append(text(alive, "dim" if look.drainer is not None else "yellow"))
    if look.heard.trouble is not None:
        when, what = look.heard.trouble
        blocks.append(text(f"{age(look.at - when)} ago: {what}", "yellow"))
    return blocks


def _training(look: Look) -> str:
    heard = look.heard
    if look.pids:
        shown = ", ".join(str(pid or "?") for pid in look.pids[:4]) + (", …" if len(look.pids) > 4 else "")
        facts = [f"{len(look.pids)} {'trainer' if len(look.pids) == 1 else 'trainers'} alive here (pid {shown})"]
    elif heard.ended is not None:
        facts = [f"no trainer is alive here; the last one {_HOW.get(heard.ended, 'ended')}"]
    else:
        facts = ["no trainer is alive here"]
    if look.step is not None:
        facts.append(f"step {look.step:,}")
    if look.pids and heard.steps_per_sec is not None:
        facts.append(f"{heard.steps_per_sec:.3g} steps/s")
    if heard.blocked_secs is not None:
        facts.append(f"the last save blocked {1000 * heard.blocked_secs:,.0f} ms")
    return ", ".join(facts)


_HOW = {"finished": "finished", "closed": "stopped before its end", "failed": "failed"}


def _state(tier: Seen) -> str:
    if tier.error is not None:
        return f"did not answer: {tier.error}"
    facts = [_going(tier)] if tier.on_its_way else []
    facts += [f"{size(int(tier.bytes_per_sec))}/s"] if tier.bytes_per_sec else []
    facts += [f"{tier.skipped} skipped"] if tier.skipped else []
    return ", ".join(facts)


def _going(tier: Seen) -> str:
    first, *others = tier.on_its_way
    share = f" {100 * first.done / first.total:.0f} % of {size(first.total)}" if first.total else ""
    more = f", {len(others)} more queued" if others else ""
    return f"step {first.step} on its way{share}{more}"


def _tier_line(look: Look, tier: Seen) -> str:
    if tier.error is not None:
        return f"did not answer: {tier.error.message}"
    if tier.newest is None:
        return "none" if not tier.on_its_way else f"none, {_going(tier)}"
    behind = look.behind(tier)
    facts = [f"step {tier.newest}"] + ([] if tier.saved_at is None else [f"{age(look.at - tier.saved_at)} old"])
    facts += [f"{behind} behind"] if behind else []
    return ", ".join([*facts, *([_state(tier)] if _state(tier) else [])])


# ---- for programs


def _document(namespace: str, look: Look) -> dict[str, object]:
    return {
        "version": 1,
        "namespace": namespace,
        "time": look.at,
        "trainers": list(look.pids),
        "drainer": look.drainer,
        "step": look.step,
        "training": dict(facts_of(look.heard)),
        "tiers": [_entry(look, tier) for tier in look.tiers],
    }


def _entry(look: Look, tier: Seen) -> dict[str, object]:
    error = tier.error
    told = None if error is None else {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    return {
        "name": tier.settings.name,
        "kind": kind_of(tier.settings),
        "error": told,
        "newest": tier.newest,
        "age_secs": None if tier.saved_at is None else round(look.at - tier.saved_at, 3),
        "behind_steps": look.behind(tier),
        "on_its_way": [{"step": each.step, "bytes": each.done, "of_bytes": each.total} for each in tier.on_its_way],
        "bytes_per_sec": tier.bytes_per_sec,
        "skipped": tier.skipped,
    }
