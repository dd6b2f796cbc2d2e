"""``sm-tiered report``: where the time of all launches went, what failed, and what to change in the recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from sm_tiered.advice import Advice, advise, changed_policy
from sm_tiered.cli.amounts import secs_of
from sm_tiered.cli.common import EXIT_FAILED, EXIT_OK
from sm_tiered.cli.output import note_error, print_json, render, size, table, text, utc
from sm_tiered.cli.report_json import document
from sm_tiered.cli.told import Run, read_run, remarks
from sm_tiered.goodput import Failure
from sm_tiered.settings import HyperPodSettings

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["run", "yaml_lines"]

_SHARES = (
    ("kept_secs", "training", "green"),
    ("lost_secs", "lost to failures and done again", "red"),
    ("blocked_secs", "blocked by saves", "yellow"),
    ("restoring_secs", "restoring", "magenta"),
    ("closing_secs", "closing", ""),
    ("down_secs", "down between launches", "dim"),
)
_KINDS = {"process": "processes died", "node": "node lost", "preempted": "preempted"}
_FAILURES_SHOWN = 12
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def run(sources: Sequence[str], *, mtbf: str | None, node_mtbf: str | None, as_json: bool) -> int:
    """Print the ledger of what *sources* tell; return the exit status."""
    given = secs_of("--mtbf", mtbf) if mtbf is not None else None
    node = secs_of("--node-mtbf", node_mtbf) if node_mtbf is not None else None
    found = read_run(sources)
    advices = advise(found.ledger, memory=found.story.memory, mtbf_secs=given, node_mtbf_secs=node)
    advices = [_unknown(advice) if _is_behind_cluster(found, advice) else advice for advice in advices]
    lines = yaml_lines(found, advices)
    if as_json:
        print_json(document(found, advices, lines))
    else:
        for error in found.errors.values():
            note_error(error)
        render(*_blocks(found, advices, lines))
    return EXIT_FAILED if found.errors else EXIT_OK


def _is_behind_cluster(run: Run, advice: Advice) -> bool:
    """Whether the cluster's memory takes the losses of nodes, so that the tier is for losing that."""
    if run.settings is None or not advice.durable:
        return False
    cluster = {tier.name for tier in run.settings.tiers if isinstance(tier, HyperPodSettings)}
    saved = {figures.tier for figures in run.ledger.tiers if figures.blocked_secs is not None}
    return bool(cluster & saved) and advice.tier not in cluster


def _unknown(advice: Advice) -> Advice:
    return replace(
        advice,
        mtbf_secs=None,
        given=False,
        optimal_secs=None,
        advised_secs=None,
        lost_now=None,
        lost_then=None,
        steps=None,
    )


def span(secs: float | None) -> str:
    """Return a duration for people, in at most two units."""
    if secs is None:
        return "?"
    if secs < 0.0995:
        return f"{secs * 1000:.0f} ms" if secs else "0 s"
    if secs < 9.995:
        return f"{secs:.2f} s"
    if secs < 59.95:
        return f"{secs:.1f} s"
    whole = round(secs)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    place = next(place for place, (_, unit) in enumerate(units) if whole >= unit)
    (name, unit), (less, lesser) = units[place], units[place + 1]
    rest = whole % unit // lesser
    return f"{whole // unit} {name}" + (f" {rest} {less}" if rest else "")


# ---- for people


def _blocks(run: Run, advices: Sequence[Advice], lines: Sequence[str]) -> list[RenderableType]:
    ledger, story = run.ledger, run.story
    launches = f"{story.launches} launch" + ("" if story.launches == 1 else "es")
    title = f"{run.namespace}: {launches}, {utc(ledger.began_at)} to {utc(ledger.ended_at)}"
    blocks: list[RenderableType] = [text(title, "bold"), text(""), _shares(run), text("")]
    blocks += [_tiers(run), text("")]
    blocks += [*_failures(run), text("")]
    blocks += [_intervals(run, advices), text("")]
    blocks += _verdict(run, advices, lines)
    found = remarks(run)
    return blocks + ([text(""), *(text(line, "yellow") for line in found)] if found else [])


def _shares(run: Run) -> RenderableType:
    ledger = run.ledger
    rows = table("time", "share", "", right=("time", "share"))
    for name, words, style in _SHARES:
        secs = ledger.total(name)
        if secs > 0 or name == "kept_secs":
            share = secs / ledger.wall_secs if ledger.wall_secs else 0.0
            rows.add_row(
                text(span(secs)), text(f"{share:.1%}" if share >= 0.0005 or not secs else "<0.1%"), text(words, style)
            )
    rows.add_row(text(span(ledger.wall_secs), "bold"), text("100.0%", "bold"), text("in all", "bold"))
    return rows


def _tiers(run: Run) -> RenderableType:
    right = ("saves", "left out", "failed", "blocked", "until safe", "every", "size")
    rows = table("tier", *right, "", right=right)
    for tier in run.ledger.tiers:
        every = "?" if tier.interval_steps is None else f"{tier.interval_steps:g} steps"
        rows.add_row(
            text(tier.tier, "bold"),
            text(tier.safe),
            text(tier.skipped or ""),
            text(tier.failed or "", "red"),
            text(span(tier.blocked_secs)),
            text(span(tier.safe_secs)),
            text(every),
            text(size(None if tier.bytes is None else int(tier.bytes))),
            text(""),
        )
    return rows


def _failures(run: Run) -> Iterator[RenderableType]:
    failures, ledger = run.ledger.failures, run.ledger
    if not failures:
        yield text(f"no failure in {span(ledger.up_secs)}", "green")
        return
    rows = table("failure", "last heard of", "at step", "from step", "lost", right=("at step", "from step"))
    for failure in failures[-_FAILURES_SHOWN:]:
        rows.add_row(
            text(_KINDS[failure.kind], "red"),
            text(utc(failure.at).removesuffix(" UTC")),
            text("?" if failure.reached_step is None else failure.reached_step),
            text("start" if failure.restored_step is None else failure.restored_step),
            text(_lost(failure)),
        )
    yield rows
    if len(failures) > _FAILURES_SHOWN:
        yield text(f"and {len(failures) - _FAILURES_SHOWN} before", "dim")
    between = [
        f"{name} every {span(secs)}"
        for name, kinds in (("any", ("process", "node")), ("a node lost", ("node",)))
        if (secs := ledger.mtbf_secs(*kinds)) is not None
    ]
    if between:
        yield text(f"mean time between failures: {', '.join(between)}")


def _lost(failure: Failure) -> str:
    number = failure.lost_steps
    steps = "" if number is None else f", {number} step" + ("" if number == 1 else "s")
    return f"{'at least ' if failure.at_least else ''}{span(failure.lost_secs)}{steps}"


def _intervals(run: Run, advices: Sequence[Advice]) -> RenderableType:
    right = ("now", "optimal", "lost now", "then")
    rows = table("interval", *right, "", right=right)
    for advice in advices:
        lost = ["?" if share is None else f"{share:.2%}" for share in (advice.lost_now, advice.lost_then)]
        rows.add_row(
            text(advice.tier, "bold"),
            text(span(advice.interval_secs)),
            text(span(advice.optimal_secs)),
            *map(text, lost),
            text(_why(run, advice), "dim"),
        )
    return rows


def _why(run: Run, advice: Advice) -> str:
    if advice.cost_secs is None:
        return "no save came there"
    if _is_behind_cluster(run, advice):
        return "for the loss of the cluster's memory, which takes those of nodes; `sm-tiered plan --cluster-mtbf`"
    if advice.mtbf_secs is None:
        option = "--node-mtbf" if advice.durable else "--mtbf"
        return f"nothing failed that it is for in {span(run.ledger.up_secs)}; say how often with {option}"
    failing = "a node is lost" if advice.durable else "something fails"
    said = "as said" if advice.given else "as seen"
    why = f"{span(advice.cost_secs)} a save, {failing} every {span(advice.mtbf_secs)} ({said})"
    held_up = advice.optimal_secs is not None and cast(float, advice.advised_secs) > advice.optimal_secs * 1.01
    return f"{why}; not below {span(advice.advised_secs)}: that is how long one takes" if held_up else why


def _verdict(run: Run, advices: Sequence[Advice], lines: Sequence[str]) -> list[RenderableType]:
    if lines:
        what = "what to change in the recipe:" if run.settings is not None else "what a recipe should say:"
        return [text(what, "bold"), *(text(line, "cyan") for line in lines)]
    known = [advice for advice in advices if advice.lost_now is not None]
    if known and not any(advice.worth_it for advice in known):
        return [text("the intervals are as good as any: leave the recipe as it is", "green")]
    if any(advice.worth_it for advice in known):
        return [text("the recipe's policies look after the intervals themselves: leave them as they are", "green")]
    return [text("too little is known for advice", "dim")]


# ---- what to change


def yaml_lines(run: Run, advices: Sequence[Advice]) -> list[str]:
    """Return what to change, as YAML to paste into the recipe; empty: nothing."""
    policies = _policies(run)
    found = ((advice, changed_policy(policies.get(advice.tier), advice)) for advice in advices if advice.worth_it)
    lines = [f"  {_flow(advice.tier)}:\n    save: {_flow(policy)}" for advice, policy in found if policy is not None]
    return ["tiers:", *(line for entry in lines for line in entry.split("\n"))] if lines else []


def _policies(run: Run) -> Mapping[str, object]:
    """Each tier's save policy as the recipe's own JSON has it."""
    if run.settings is None:
        return {}
    recipe = cast("dict[str, dict[str, dict[str, object]]]", json.loads(run.settings.text))
    return {name: tier.get("save") for name, tier in recipe["tiers"].items()}


def _flow(value: object) -> str:
    """Return JSON's values as YAML would be written by hand, on one line."""
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, object]", value)
        if list(entries.values()) == [True]:
            return next(iter(entries))
        return "{" + ", ".join(f"{_flow(key)}: {_flow(entry)}" for key, entry in entries.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, cast("list[object]", value))) + "]"
    if (
        isinstance(value, str)
        and _PLAIN.fullmatch(value)
        and value.lower() not in ("true", "false", "null", "yes", "no")
    ):
        return value
    return json.dumps(value)
