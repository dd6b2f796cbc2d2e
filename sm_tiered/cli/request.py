"""``sm-tiered request``: asks a running job to save now, and waits until it has begun to."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sm_tiered.cli.common import EXIT_FAILED, EXIT_OK, open_recipe
from sm_tiered.cli.output import print_json, render, text
from sm_tiered.errors import ConfigError, TierRefusedError
from sm_tiered.event_reading import merge, of_paths
from sm_tiered.requests import ask_for_save, request_files
from sm_tiered.settings import Settings

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["run"]

_POLL_SECS = 0.05
_TOLD_SECS = 5.0
"""The file goes first; the event that names the step comes a moment later."""
MAX_WAIT_SECS = 86_400.0


def run(recipe: str, *, wait_secs: float, as_json: bool) -> int:
    """Ask the job of *recipe* for a save; return the exit status."""
    if not 0 <= wait_secs <= MAX_WAIT_SECS:
        raise ConfigError(f"--wait: {wait_secs:g} is no time to wait", hint=f"Allowed: 0 to {MAX_WAIT_SECS:g} seconds.")
    settings = open_recipe(recipe)
    files = request_files(settings)
    if not files:
        raise ConfigError(
            f"no policy of {settings.source} waits for a request",
            hint="Write on_request where a tier says when to save and start the job with it, "
            "e.g. save: {any: [{every_n_steps: 50}, on_request]}.",
        )
    _see_job(settings)
    asked_at = time.time()
    file = files[-1]
    new = ask_for_save(file)
    taken = _until(lambda: not file.exists(), wait_secs)
    step = _step(settings, asked_at) if taken else None
    if as_json:
        print_json(
            {
                "version": 1,
                "namespace": settings.namespace,
                "file": str(file),
                "asked": new,
                "taken": taken,
                "step": step,
                "waited_secs": round(time.time() - asked_at, 3),
            }
        )
    else:
        render(_verdict(file, new=new, taken=taken, step=step, wait_secs=wait_secs))
    return EXIT_OK if taken or not wait_secs else EXIT_FAILED


def _see_job(settings: Settings) -> None:
    """Where trainers can be seen, one has to be there: a request that nobody takes would surprise the next launch."""
    if settings.memory is None:
        return
    from sm_tiered.tiers.memory import trainers_at

    root = Path(settings.memory.path) / settings.namespace
    if not trainers_at(root):
        raise TierRefusedError(
            f"no trainer of namespace {settings.namespace!r} is alive on this node",
            hint=f"It would hold a lock in {root}. Run this on a node of the job, with the job's own environment.",
        )


def _until(done: Callable[[], bool], secs: float) -> bool:
    end = time.monotonic() + secs
    while not (found := done()) and time.monotonic() < end:
        time.sleep(_POLL_SECS)
    return found


def _step(settings: Settings, since: float) -> int | None:
    """Return the step that took the request, once the job has told; None: it tells nowhere here."""
    if settings.memory is None:
        return None
    root = Path(settings.memory.path) / settings.namespace
    found: list[int] = []

    def told() -> bool:
        try:
            pieces, _ = of_paths([root])
        except ConfigError:
            return False
        events = merge(pieces).events
        steps = [event.facts.get("step") for event in events if event.kind == "SaveRequested" and event.time >= since]
        found.extend(step for step in steps if isinstance(step, int))
        return bool(found)

    return found[0] if _until(told, _TOLD_SECS) else None


def _verdict(file: Path, *, new: bool, taken: bool, step: int | None, wait_secs: float) -> Text:
    if taken:
        return text("the job saves now" if step is None else f"the job saves step {step} now", "green")
    how = "asked" if new else "a request was waiting already"
    if not wait_secs:
        return text(f"{how}: the job saves when it comes to its next step ({file})")
    return text(f"{how}, and no rank has taken it in {wait_secs:g} s: {file} is still there", "yellow")
