"""``sm-tiered doctor``: whether this machine and the tiers of a recipe can do what a job will ask of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sm_tiered.cli.common import EXIT_FAILED, EXIT_OK, open_recipe
from sm_tiered.cli.doctor_durable import local_findings, s3_findings
from sm_tiered.cli.doctor_machine import job_findings, machine_findings, memory_findings, version_findings
from sm_tiered.cli.findings import Finding, Level, failed
from sm_tiered.cli.output import print_json, render, table, text
from sm_tiered.cli.survey import survey
from sm_tiered.errors import TieredError
from sm_tiered.settings import HyperPodSettings, LocalSettings, MemorySettings, S3Settings, Settings, TierSettings

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["run"]

_STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


def run(recipe: str | None, *, as_json: bool) -> int:
    """Examine this machine and, where it is given, the tiers of *recipe*; return the exit status."""
    settings = None if recipe is None else open_recipe(recipe)
    found = [*_findings(settings)]
    bad = any(finding.level is Level.FAIL for finding in found)
    if as_json:
        print_json(_document(settings, found))
    else:
        render(*_blocks(found))
    return EXIT_FAILED if bad else EXIT_OK


def _findings(settings: Settings | None) -> Iterator[Finding]:
    if settings is None:
        yield from machine_findings()
    else:
        node_bytes = _node_bytes(settings)
        for tier in settings.tiers:
            try:
                yield from _of_tier(tier, settings, node_bytes)
            except (TieredError, OSError) as error:
                yield failed(tier.name, "tier", error if isinstance(error, TieredError) else str(error))
    yield from version_findings()


def _of_tier(tier: TierSettings, settings: Settings, node_bytes: int | None) -> Iterator[Finding]:
    if isinstance(tier, MemorySettings):
        yield from memory_findings(tier, settings.arena_slots, node_bytes)
        yield from job_findings(tier, settings.namespace)
    elif isinstance(tier, LocalSettings):
        yield from local_findings(tier, settings.namespace)
    elif isinstance(tier, S3Settings):
        yield from s3_findings(tier, settings.namespace)
    elif isinstance(tier, HyperPodSettings):
        from sm_tiered.cli.doctor_cluster import cluster_findings

        yield from cluster_findings(tier, settings.namespace)


def _node_bytes(settings: Settings) -> int | None:
    """What one checkpoint takes in this node's memory, by the newest one there; None: there is none."""
    memory = settings.memory
    if memory is None:
        return None
    seen = survey(replace(settings, tiers=(memory,)), newest=3)
    seen.close()
    sizes = [view.bytes for tier in seen.tiers for view in tier.views if view.problem is None]
    return max(sizes, default=None)


# ---- for people


def _blocks(found: Sequence[Finding]) -> list[RenderableType]:
    blocks: list[RenderableType] = []
    areas = list(dict.fromkeys(finding.area for finding in found))
    for area in areas:
        rows = table("", "check", "finding")
        for finding in (finding for finding in found if finding.area == area):
            level = text(finding.level.value, _STYLES[finding.level])
            rows.add_row(level, text(finding.check), text(finding.text))
            if finding.fix is not None:
                rows.add_row(
                    text(""), text(""), text(f"→ {finding.fix}", "dim" if finding.level is Level.OK else "bold")
                )
        rows.show_header = False
        blocks += [text(area, "bold"), rows, text("")]
    return [*blocks, _verdict(found)]


def _verdict(found: Sequence[Finding]) -> RenderableType:
    times = Counter(finding.level for finding in found)
    if times[Level.FAIL]:
        return text(f"{times[Level.FAIL]} of {len(found)} checks failed, {times[Level.WARN]} warn", "bold red")
    if times[Level.WARN]:
        return text(f"all of {len(found)} checks work, {times[Level.WARN]} warn", "yellow")
    return text(f"all of {len(found)} checks are all right", "green")


# ---- for programs


def _document(settings: Settings | None, found: Sequence[Finding]) -> dict[str, object]:
    return {
        "version": 1,
        "namespace": None if settings is None else settings.namespace,
        "ok": not any(finding.level is Level.FAIL for finding in found),
        "findings": [
            {"area": f.area, "check": f.check, "level": f.level.value, "text": f.text, "fix": f.fix} for f in found
        ],
    }
