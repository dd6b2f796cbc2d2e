"""What `sm-tiered prune` tells people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from sm_tiered import retention
from sm_tiered.cli.ls import attempt_names
from sm_tiered.cli.output import size, table, text
from sm_tiered.records import CheckpointId

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Told", "blocks", "why"]


class Told(Protocol):
    """What retention does, or did, on one tier."""

    @property
    def name(self) -> str:
        """The tier."""
        ...

    @property
    def plan(self) -> retention.Plan:
        """What it is about to do."""
        ...

    @property
    def sizes(self) -> dict[CheckpointId, int]:
        """Bytes that each deletion frees."""
        ...

    @property
    def uploads(self) -> int:
        """Unfinished uploads that belong to nobody any more."""
        ...

    @property
    def done(self) -> tuple[CheckpointId, ...] | None:
        """What was deleted; None: this was a dry run."""
        ...

    @property
    def freed(self) -> int:
        """Bytes of what is, or would be, deleted."""
        ...

    @property
    def blocked(self) -> str | None:
        """Why nothing at all is given up there."""
        ...


def why(plan: retention.Plan, checkpoint: CheckpointId) -> str:
    """Return why *checkpoint* goes."""
    if checkpoint in plan.committed:
        return "the keep policy gives it up"
    if checkpoint in plan.unfinished:
        return "its deletion was cut short"
    return "never committed, and long out of use"


def blocks(tiers: Sequence[Told], pids: Sequence[int], *, yes: bool) -> list[RenderableType]:
    """Return what to print."""
    made: list[RenderableType] = []
    for tier in tiers:
        made += [text(tier.name, "bold"), *_tier(tier), text("")]
    if pids:
        made.append(text(f"a job is running here (pids {', '.join(map(str, pids))}); its own retention goes on", "dim"))
    return [*made, *_verdict(tiers, yes=yes)]


def _tier(tier: Told) -> list[RenderableType]:
    from rich.padding import Padding

    plan = tier.plan
    lines: list[RenderableType] = []
    shown = sorted({*plan.delete, *plan.kept}, reverse=True)
    names = attempt_names(checkpoint.attempt for checkpoint in shown)
    if shown:
        rows = table("step", "attempt", "frees", "verdict", "why", right=("step", "frees"))
        for checkpoint in shown:
            rows.add_row(
                text(checkpoint.step),
                text(names[checkpoint.attempt]),
                text(size(tier.sizes[checkpoint]) if checkpoint in tier.sizes else ""),
                *_row(tier, checkpoint),
            )
        lines.append(rows)
    facts = [tier.blocked] if tier.blocked else []
    facts += _counted(len(plan.bury), "tombstone", "a day old") + _counted(len(plan.forget), "attempt record", "empty")
    facts += _counted(len(plan.revive), "deletion", "taken back: pinned or gone on from meanwhile")
    facts += _counted(tier.uploads, "unfinished upload", "of nobody")
    if not shown and not facts:
        facts = ["nothing"]
    return lines + [Padding(text(fact, "yellow" if fact == tier.blocked else "dim"), (0, 0, 0, 2)) for fact in facts]


def _row(tier: Told, checkpoint: CheckpointId) -> tuple[RenderableType, RenderableType]:
    if checkpoint in tier.plan.kept:
        reasons = ", ".join(sorted(reason.value for reason in tier.plan.kept[checkpoint]))
        return text("stays", "green"), text(reasons, "dim")
    if tier.done is None:
        return text("goes", "yellow"), text(why(tier.plan, checkpoint))
    if checkpoint in tier.done:
        return text("deleted", "yellow"), text(why(tier.plan, checkpoint))
    return text("stays", "green"), text("somebody else was there in between", "dim")


def _counted(number: int, what: str, how: str) -> list[str]:
    return [f"{number} {what}{'' if number == 1 else 's'}, {how}"] if number else []


def _verdict(tiers: Sequence[Told], *, yes: bool) -> list[RenderableType]:
    number = sum(len(tier.plan.delete if tier.done is None else tier.done) for tier in tiers)
    freed = size(sum(tier.freed for tier in tiers))
    left = any(tier.plan.bury or tier.plan.forget or tier.plan.revive or tier.uploads for tier in tiers)
    checkpoints = f"{number} checkpoint{'' if number == 1 else 's'}"
    if not number and not left:
        return [text("nothing is to be given up", "green")]
    if yes:
        return [text(f"{checkpoints} deleted, {freed} freed", "green")]
    return [text(f"{checkpoints} would go, {freed} would be freed; nothing was done: say --yes", "yellow")]
