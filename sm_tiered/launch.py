"""What a launch makes sure of before anything is saved: one recipe, no other job here, shared directories."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sm_tiered.errors import ConfigError, NamespaceInUseError
from sm_tiered.group import Group, all_or_none
from sm_tiered.settings import MemorySettings, Settings
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.local import LocalTier
from sm_tiered.tiers.memory import MemoryTier

__all__ = ["agree_on_launch", "probe_local_tiers", "wait_for_others"]


def agree_on_launch(settings: Settings, group: Group) -> str:
    """Return a name for this launch, the same on all ranks, after comparing their recipes."""
    mine = {"launch": secrets.token_hex(8), "recipe": _facts(settings)}
    views: list[dict[str, Any]] = group.gather(mine)
    for rank, view in enumerate(views):
        differing = [name for name, value in view["recipe"].items() if value != views[0]["recipe"][name]]
        if differing:
            raise ConfigError(
                f"rank {rank} has another recipe than rank 0: {', '.join(differing)} differ",
                hint="Give every rank the same recipe; only the memory tier's path may differ.",
                rank=rank,
            )
    return views[0]["launch"]


def _facts(settings: Settings) -> dict[str, str]:
    """What must be alike on all ranks; not where memory is."""
    tiers = [replace(tier, path="") if isinstance(tier, MemorySettings) else tier for tier in settings.tiers]
    return {
        "namespace": settings.namespace,
        "tiers": hashlib.sha256(repr(tiers).encode()).hexdigest(),
        "on_error": settings.on_error,
        "unreachable": settings.unreachable,
    }


def wait_for_others(memory: MemoryTier, launch: str, wait_secs: float) -> None:
    """Return once no trainer of another launch is alive in this memory directory.

    Raises:
        NamespaceInUseError: they still are after *wait_secs*.
    """
    end = time.monotonic() + wait_secs
    while alive := memory.live_trainers(launch):
        if time.monotonic() >= end:
            pids = tuple(pid for pid, _ in alive)
            raise NamespaceInUseError(
                f"namespace {memory.namespace!r} is in use by trainers with pids {list(pids)} on this node",
                pids=pids,
                hint="Wait for that job to end, or give this one a namespace of its own.",
            )
        time.sleep(0.05)


def probe_local_tiers(group: Group, durable: Mapping[str, Tier], token: str) -> None:
    """See that every rank reads what rank 0 writes, or a directory tier is no shared one. Collective.

    Raises:
        ConfigError: one does not, on all ranks alike.
    """
    for name, tier in durable.items():
        if not isinstance(tier, LocalTier):
            continue
        first = group.rank == 0
        all_or_none(group, lambda tier=tier, first=first: tier.write_probe(token) if first else None)
        try:
            all_or_none(group, lambda name=name, tier=tier: _read_probe(name, tier, token))
        finally:
            if first:
                tier.clear_probe(token)


def _read_probe(name: str, tier: LocalTier, token: str) -> None:
    if not tier.read_probe(token):
        raise ConfigError(
            f"tier {name!r}: what rank 0 writes is not visible here",
            hint="A local tier must be one directory that all ranks share (FSx, NFS).",
            tier=name,
        )
