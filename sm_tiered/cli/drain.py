"""``sm-tiered drain``: finishes what a job left in the memory directory's queue."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sm_tiered.cli.common import EXIT_CORRUPT, EXIT_FAILED, EXIT_OK, open_recipe
from sm_tiered.cli.following import Ended, check_timeout, follow
from sm_tiered.cli.holdings import open_memory
from sm_tiered.cli.ls import attempt_names
from sm_tiered.cli.meter import Meter
from sm_tiered.cli.output import note_error, print_json, rate, render, size, table, text
from sm_tiered.errors import CorruptPartError, error_to_json
from sm_tiered.handover import Follower
from sm_tiered.queue import Queue
from sm_tiered.settings import Settings

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["run"]


def run(recipe: str, *, timeout_secs: float | None, as_json: bool) -> int:
    """Drain this node's queue; return the exit status: 0 when all that was in it is committed."""
    check_timeout(timeout_secs)
    settings = open_recipe(recipe)
    memory = open_memory(settings)
    began, ended, moved = time.monotonic(), list[Ended](), 0
    if memory is not None:
        queue = Queue(memory)
        if queue.entries():
            follower, meter = Follower(memory, queue), Meter(quiet=as_json)
            ended, last = follow(memory, follower, settings, meter, label="draining", timeout_secs=timeout_secs)
            moved = last.done
            follower.leave()
    secs = time.monotonic() - began
    failed = [each for each in ended if each.error is not None]
    if as_json:
        print_json(_document(settings, ended, moved, secs))
    else:
        for each in failed:
            if each.error is not None:
                note_error(each.error)
        render(*_blocks(ended, moved, secs))
    if any(isinstance(each.error, CorruptPartError) for each in failed):
        return EXIT_CORRUPT
    return EXIT_FAILED if failed else EXIT_OK


def _blocks(ended: Sequence[Ended], moved: int, secs: float) -> list[RenderableType]:
    if not ended:
        return [text("nothing is queued here", "green")]
    names = attempt_names(each.checkpoint.attempt for each in ended)
    rows = table("tier", "step", "attempt", "state", right=("step",))
    for each in ended:
        state = text("committed", "green") if each.error is None else text(each.error.message, "red")
        rows.add_row(text(each.tier), text(each.checkpoint.step), text(names[each.checkpoint.attempt]), state)
    good = sum(each.error is None for each in ended)
    speed = rate(moved, secs)
    line = f"{good} of {len(ended)} committed, {size(moved)} in {secs:.1f} s" + (f" ({speed})" if speed else "")
    return [rows, text(""), text(line, "green" if good == len(ended) else "bold red")]


def _document(settings: Settings, ended: Sequence[Ended], moved: int, secs: float) -> dict[str, object]:
    return {
        "version": 1,
        "namespace": settings.namespace,
        "ok": all(each.error is None for each in ended),
        "bytes": moved,
        "secs": round(secs, 3),
        "promotions": [
            {
                "step": each.checkpoint.step,
                "attempt": str(each.checkpoint.attempt),
                "tier": each.tier,
                "committed": each.error is None,
                "error": None if each.error is None else error_to_json(each.error),
            }
            for each in ended
        ],
    }
