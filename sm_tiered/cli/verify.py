"""``sm-tiered verify``: whether every byte, or a share of them, is what was saved."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sm_tiered.cli.common import (
    EXIT_CORRUPT,
    EXIT_FAILED,
    EXIT_OK,
    check_step,
    chosen_tiers,
    is_durable,
    open_for_looking,
    open_recipe,
    parse_share,
)
from sm_tiered.cli.ls import attempt_names
from sm_tiered.cli.output import note_error, print_json, rate, render, size, table, text
from sm_tiered.cli.progress import Timed, Watch
from sm_tiered.errors import TieredError, TierRefusedError
from sm_tiered.inventory import list_checkpoints
from sm_tiered.settings import HyperPodSettings, S3Settings, Settings, TierSettings
from sm_tiered.verify import Problem, Report, State, verify_checkpoint

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["run", "threads_for_reading"]

_MOST_THREADS, _S3_THREADS = 4, 8
_VERIFIED = frozenset({State.WHOLE, State.PARTIAL, State.DAMAGED})
_STYLES = {State.WHOLE: "green", State.PARTIAL: "green", State.DAMAGED: "bold red", State.CHANGING: "yellow"}


@dataclass(slots=True, kw_only=True)
class _Outcome:
    """Everything that one run found."""

    settings: Settings
    share: float
    seed: int
    done: list[Timed] = field(default_factory=list[Timed])
    errors: dict[str, TieredError] = field(default_factory=dict[str, TieredError])
    """By tier."""

    @property
    def problems(self) -> list[Problem]:
        return [problem for timed in self.done for problem in timed.report.problems]

    @property
    def verified(self) -> list[Timed]:
        return [timed for timed in self.done if timed.report.state in _VERIFIED]

    @property
    def status(self) -> int:
        if self.problems:
            return EXIT_CORRUPT
        return EXIT_FAILED if self.errors or not self.verified else EXIT_OK


def run(recipe: str, *, step: int | None, read_data: str, tier: str | None, seed: int | None, as_json: bool) -> int:
    """Verify the checkpoints of *recipe*, all or those of *step*; return the exit status."""
    share = parse_share(read_data)
    check_step(step)
    settings = open_recipe(recipe)
    tiers = chosen_tiers(settings, tier)
    chosen_seed = secrets.randbelow(2**32) if seed is None else seed
    outcome = _Outcome(settings=settings, share=share, seed=chosen_seed)
    watch = Watch(quiet=as_json)
    try:
        for each in tiers:
            try:
                _verify_tier(outcome, each, step, watch)
            except TieredError as error:
                outcome.errors[each.name] = error
    finally:
        watch.close()
    if as_json:
        print_json(_document(outcome, step))
        return outcome.status
    for error in outcome.errors.values():
        note_error(error)
    render(*_blocks(outcome, step))
    return outcome.status


def _verify_tier(outcome: _Outcome, settings: TierSettings, step: int | None, watch: Watch) -> None:
    durable = is_durable(settings)
    tier = open_for_looking(settings, outcome.settings.namespace, patient=True)
    try:
        for checkpoint in reversed(list_checkpoints(tier)):
            if step is not None and checkpoint.step != step:
                continue
            began = time.monotonic()
            try:
                report = verify_checkpoint(
                    tier,
                    checkpoint,
                    durable=durable,
                    share=outcome.share,
                    seed=outcome.seed,
                    threads=threads_for_reading(settings),
                    progress=watch.begin(settings.name, checkpoint),
                )
            except TierRefusedError as error:
                # This one can't be read; the others may be.
                error.step = checkpoint.step if error.step is None else error.step
                outcome.errors.setdefault(settings.name, error)
                continue
            timed = Timed(report=report, secs=time.monotonic() - began)
            outcome.done.append(timed)
            watch.done(timed)
    finally:
        tier.close()


def threads_for_reading(settings: TierSettings) -> int:
    """A thread reads while another hashes; where a network is between, it waits for several answers at once."""
    if isinstance(settings, HyperPodSettings):
        return 1  # it gives a share from its beginning on and no other way: several readers would start it over
    return _S3_THREADS if isinstance(settings, S3Settings) else min(_MOST_THREADS, len(os.sched_getaffinity(0)))


# ---- for people


def _blocks(outcome: _Outcome, step: int | None) -> list[RenderableType]:
    blocks: list[RenderableType] = []
    names = attempt_names(timed.report.checkpoint.attempt for timed in outcome.done)
    if outcome.done:
        right = ("step", "parts", "read", "rate")
        rows = table("tier", "step", "attempt", "parts", "read", "rate", "state", right=right)
        for timed in outcome.done:
            report = timed.report
            rows.add_row(
                text(report.tier),
                text(report.checkpoint.step),
                text(names[report.checkpoint.attempt]),
                text(report.parts or ""),
                text(size(report.bytes_read) if report.bytes_read else ""),
                text(rate(report.bytes_read, timed.secs)),
                text(_state(report), _STYLES.get(report.state, "dim")),
            )
        blocks += [rows, text("")]
    if outcome.problems:
        blocks += [_problem_table(outcome.problems), text("")]
    return [*blocks, *_verdict(outcome, step)]


def _state(report: Report) -> str:
    facts = [report.state.value] + ([report.note] if report.note and report.note != report.state.value else [])
    if report.problems:
        facts.append(_count(len(report.problems), "problem"))
    if report.rereads:
        facts.append(f"{_count(report.rereads, 'chunk')} wrong once, right when read again")
    return ": ".join(facts[:2]) + "".join(f"; {fact}" for fact in facts[2:])


def _problem_table(problems: Sequence[Problem]) -> RenderableType:
    rows = table("tier", "step", "rank", "file", "chunk", "problem", right=("step", "rank", "chunk"))
    for problem in problems:
        rows.add_row(
            text(problem.tier),
            text(problem.checkpoint.step),
            text("" if problem.rank is None else problem.rank),
            text(problem.part or ""),
            text("" if problem.chunk is None else problem.chunk),
            text(problem.what, "red"),
        )
    return rows


def _verdict(outcome: _Outcome, step: int | None) -> list[RenderableType]:
    done = sum(timed.report.bytes_read for timed in outcome.done)
    secs = sum(timed.secs for timed in outcome.done)
    speed = rate(done, secs)
    read = f"{size(done)} read in {secs:.1f} s" + (f" ({speed})" if speed else "")
    if outcome.share < 1.0:
        read += f", {outcome.share * 100:g}% of the chunks, seed {outcome.seed}"
    checkpoints = _count(len(outcome.verified), "checkpoint")
    if outcome.problems:
        bad = sum(bool(timed.report.problems) for timed in outcome.done)
        return [text(f"{_count(len(outcome.problems), 'problem')} in {bad} of {checkpoints}; {read}", "bold red")]
    if not outcome.verified and not outcome.errors:
        what = "nothing to verify" if step is None else f"nothing to verify of step {step}"
        return [text(f"{what}: `sm-tiered ls` lists what each tier has", "yellow")]
    if outcome.errors:
        silent = ", ".join(outcome.errors)
        return [text(f"not all could be verified ({silent}); {checkpoints} all right; {read}", "yellow")]
    return [text(f"all right: {checkpoints}, {read}", "green")]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# ---- for programs


def _document(outcome: _Outcome, step: int | None) -> dict[str, object]:
    return {
        "version": 1,
        "namespace": outcome.settings.namespace,
        "step": step,
        "share": outcome.share,
        "seed": outcome.seed,
        "ok": outcome.status == EXIT_OK,
        "checkpoints": [_entry(timed) for timed in outcome.done],
        "errors": {
            name: {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
            for name, error in outcome.errors.items()
        },
    }


def _entry(timed: Timed) -> dict[str, object]:
    report = timed.report
    return {
        "tier": report.tier,
        "step": report.checkpoint.step,
        "attempt": str(report.checkpoint.attempt),
        "state": report.state.value,
        "note": report.note,
        "parts": report.parts,
        "chunks_read": report.chunks,
        "bytes_read": report.bytes_read,
        "rereads": report.rereads,
        "secs": round(timed.secs, 3),
        "problems": [{"rank": p.rank, "file": p.part, "chunk": p.chunk, "problem": p.what} for p in report.problems],
    }
