"""A plan for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sm_tiered.cli.output import age, size, table, text
from sm_tiered.cli.plan_figures import GETS_PER_SEC, PUTS_PER_SEC, Lost, Memory, Stretch, stretches, usable_after_secs

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from sm_tiered.cli.plan import Plan

__all__ = ["blocks"]

_STRETCHES = 6


def blocks(plan: Plan) -> list[RenderableType]:
    """Return what there is to print."""
    given = plan.given
    share = f"{_count(given.ranks, 'rank')} on {_count(given.nodes, 'node')}"
    head = f"{given.steps:,} steps of {_secs(given.step_secs)}, {size(given.state_bytes)} of state, {share}"
    found: list[RenderableType] = [text(head, "bold"), text(""), _saves(plan), text(""), _timeline(plan), text("")]
    found += [_figures(plan), text(""), text("assumed", "dim")]
    found.append(_list(plan.assumptions, "dim"))
    if plan.warnings:
        found += [text(""), _list(plan.warnings, "yellow")]
    return found


def _saves(plan: Plan) -> RenderableType:
    columns = ("saves", "due, skipped", "usable after", "written")
    rows = table("tier", *columns, "mean interval", right=columns)
    for tier in plan.settings.tiers:
        planned = plan.run.planned[tier.name]
        mean = plan.run.secs / len(planned) if planned else None
        after = usable_after_secs(planned)
        rows.add_row(
            text(tier.name, "bold"),
            text(f"{len(planned):,}"),
            text(f"{len(plan.run.skipped.get(tier.name, ())):,}"),
            text("" if after is None else _secs(after)),
            text(size(len(planned) * plan.given.state_bytes)),
            text("" if mean is None else f"{_secs(mean)}, {plan.given.steps / len(planned):,.4g} steps"),
        )
    return rows


def _timeline(plan: Plan) -> RenderableType:
    grid = _grid()
    for tier in plan.settings.tiers:
        grid.add_row(text(tier.name), text(_steps([each.step for each in plan.run.planned[tier.name]])))
        if skipped := plan.run.skipped.get(tier.name):
            grid.add_row(text(""), text(f"skipped: {_steps(skipped)}", "yellow"))
    return grid


def _steps(steps: Sequence[int]) -> str:
    found = stretches(steps)
    shown = "; ".join(map(_stretch, found[:_STRETCHES]))
    more = sum(stretch.count for stretch in found[_STRETCHES:])
    return f"{shown}; {more:,} more, the last at {found[-1].last}" if more else shown or "never"


def _stretch(one: Stretch) -> str:
    if one.every is None:
        return str(one.first)
    return f"{one.first}, {one.first + one.every} … {one.last} ({one.count:,}×, every {one.every:,})"


def _figures(plan: Plan) -> RenderableType:
    run, grid = plan.run, _grid()
    blocked = f"{_count(run.saves, 'save')}, {_secs(run.blocked_secs)} of {_secs(run.secs)}"
    grid.add_row(text("training blocked"), text(f"{blocked}: {_percent(run.blocked_secs / run.secs)}"))
    failures = (("processes die", plan.process), ("a node is lost", plan.node), ("the cluster is lost", plan.cluster))
    for what, lost in failures:
        if lost is not None:
            grid.add_row(text(what), text(_lost(lost)))
    if plan.memory is not None:
        grid.add_row(text("memory a node"), text(_memory(plan.memory), "" if plan.memory.fits else "yellow"))
    for name, storage in plan.storage.items():
        price = "" if storage.month_price is None else f", ${storage.month_price:,.2f} a month"
        kept = f"{storage.kept} kept at the end: {size(storage.bytes)}{price}; "
        room = "" if storage.slots is None else f"; room for {storage.slots}, and the service keeps replicas besides"
        most = f"at most {storage.most}: {size(storage.most_bytes)}"
        grid.add_row(text(f"stored on {name}"), text(f"{kept}{most}{room}"))
    for name, requests in plan.requests.items():
        rates = (
            f"{requests.puts_per_sec:,.0f} PUT/s ({_percent(requests.puts_per_sec / PUTS_PER_SEC)} of the limit), "
            f"{requests.gets_per_sec:,.0f} GET/s ({_percent(requests.gets_per_sec / GETS_PER_SEC)})"
        )
        each = f"{requests.puts:,} PUT and {requests.gets:,} GET a checkpoint"
        grid.add_row(text(f"requests to {name}"), text(f"{each}; {rates}; a restore: {requests.restore_gets:,} GET"))
    return grid


def _lost(lost: Lost) -> str:
    where = ", ".join(lost.tiers)
    every = f"every {_secs(lost.mtbf_secs)}: {_percent(lost.share)} of the time"
    best = f"the best interval would be {_secs(lost.optimal_secs)}"
    return f"{_secs(lost.mean_secs)} lost on average, {_secs(lost.worst_secs)} at worst ({where}); {every}; {best}"


def _memory(memory: Memory) -> str:
    need = f"{size(memory.need_bytes)} ({memory.generations} generations)"
    limits = [f"{memory.path} has {size(memory.size_bytes)}, {size(memory.free_bytes)} free, here"]
    limits += [f"budget {size(memory.budget_bytes)}"] if memory.budget_bytes is not None else []
    limits += [f"cgroup leaves {size(memory.cgroup_bytes)}"] if memory.cgroup_bytes is not None else []
    return f"{need}: {'fits' if memory.fits else 'does not fit'}; {'; '.join(limits)}"


def _grid() -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _list(lines: Sequence[str], style: str) -> RenderableType:
    from rich.table import Table

    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for line in lines:
        grid.add_row(text(" -", style), text(line, style))
    return grid


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _secs(secs: float) -> str:
    return f"{secs:.3g} s" if secs < 100 else age(secs)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
