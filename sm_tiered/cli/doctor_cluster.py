"""The cluster's in-memory checkpoint service: whether it is there, what it has room for, what it takes."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar
from urllib.parse import urlsplit

from sm_tiered import deadline
from sm_tiered.cli.findings import Finding, failed, ok, warn
from sm_tiered.errors import TierError, TierFullError, TierUnavailableError
from sm_tiered.inventory import list_checkpoints
from sm_tiered.layout import MAX_STEP
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers import Tier, open_tier
from sm_tiered.tiers.hyperpod_index import Index
from sm_tiered.tiers.hyperpod_service import HyperPodService, Namespace

__all__ = ["cluster_findings"]

_PATIENCE_SECS = 10.0
_ROUND_TRIPS = 5
_SLOW_SECS = 0.1
_ENABLE = (
    "In a pod of the cluster: `aws sagemaker update-cluster --cluster-name … --node-recovery … --tiered-storage-config "
    "Mode=Enable,InstanceMemoryAllocationPercentage=20`, then wait for the daemon set ai-toolkit in aws-hyperpod. "
    "Elsewhere the service can't be reached: run this in a pod."
)
_NOT_IT = "Leave the tier's `url` out: its default is what HyperPod clusters have."
_FULL = "InstanceMemoryAllocationPercentage of the cluster's tiered storage says how much memory it has."

_T = TypeVar("_T")


def cluster_findings(settings: HyperPodSettings, namespace: str) -> Iterator[Finding]:
    """Look at a tier in the cluster's memory: its address, its answers, the namespace's room, and a small probe."""
    name = settings.name
    hasty = replace(
        settings,
        request_timeout_secs=min(settings.request_timeout_secs, _PATIENCE_SECS),
        retry_attempts=min(settings.retry_attempts, 2),
        retry_deadline_secs=min(settings.retry_deadline_secs, _PATIENCE_SECS),
    )
    service, tier = HyperPodService(hasty), open_tier(hasty, namespace)
    check = "address"
    try:
        yield _address(hasty)
        check = "service"
        yield _answers(service, hasty, namespace)
        check = "namespace"
        yield from _namespaces(service, tier, hasty, namespace)
        check = "writing"
        _, secs = _timed(tier.probe)
        yield ok(name, check, f"a small write, read and delete took {_ms(secs)}")
    except TierError as error:
        yield _failed(settings, check, error)
    finally:
        tier.close()
        service.close()


def _failed(settings: HyperPodSettings, check: str, error: TierError) -> Finding:
    hint = error.hint or ""
    more = _NOT_IT if "`url`" in hint or not hint else ""
    if isinstance(error, TierFullError):
        more = _FULL
    elif isinstance(error, TierUnavailableError):
        more = _ENABLE
    without = "; saves and restores go on without it" if settings.unreachable == "skip" else ""
    return failed(settings.name, check, f"{error.message}{without}", " ".join(filter(None, (hint, more))))


def _address(settings: HyperPodSettings) -> Finding:
    """Tell where its name leads.

    Raises:
        TierUnavailableError: nowhere.
    """
    parts = urlsplit(settings.url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = deadline.run(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), _PATIENCE_SECS)
    except (OSError, UnicodeError) as error:
        how = "it could not be looked up in time" if isinstance(error, TimeoutError) else "its name is not known here"
        raise TierUnavailableError(f"{settings.url}: {how}", tier=settings.name) from error
    addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
    more = f" and {len(addresses) - 1} more" if len(addresses) > 1 else ""
    is_name = True
    with suppress(ValueError):
        ipaddress.ip_address(host)
        is_name = False
    return ok(settings.name, "address", f"{settings.url}" + (f" is {addresses[0]}{more}" if is_name else ""))


def _answers(service: HyperPodService, settings: HyperPodSettings, namespace: str) -> Finding:
    service.describe(namespace)  # makes the connection
    secs = min(_timed(lambda: service.describe(namespace))[1] for _ in range(_ROUND_TRIPS))
    text = f"answers; a round trip takes {_ms(secs)}"
    if secs > _SLOW_SECS:
        fix = "Is it another cluster's, or is the network between saturated? A save asks several times."
        return warn(settings.name, "service", text, fix)
    return ok(settings.name, "service", text)


def _namespaces(service: HyperPodService, tier: Tier, settings: HyperPodSettings, namespace: str) -> Iterator[Finding]:
    name, need = settings.name, settings.slots
    index = Index(service, settings, namespace)
    members = index.chain.members()
    wanted = f"{need} steps a rank: keep's {settings.most_kept} and 3 that are on their way, restored from or failed"
    if not members:
        yield ok(name, "namespace", f"{namespace} is not there yet; the first save makes it, with room for {wanted}")
        return
    mine = list_checkpoints(tier)
    others = _of_others(service, index, members)
    for place, member in enumerate(members):
        room = f"{member.name} has {member.ranks} slots, for up to {member.ranks - 1} ranks, and keeps "
        room += f"{member.kept} {'step' if member.kept == 1 else 'steps'} of each"
        if member.kept >= need and member.name not in others:
            yield ok(name, "namespace", room)
            continue
        beside = members[place + 1].name if place + 1 < len(members) else f"{namespace}__{place + 2}"
        if member.kept < need:
            fix = "That is all right; to have it in one place, let this run take a namespace of its own."
            yield ok(name, "namespace", f"{room}; that is less than {wanted}. Saves go to {beside}, both are read", fix)
        else:
            yield ok(name, "namespace", f"{room}, some of them somebody else's. Saves go to {beside}, both are read")
    newest = f", the newest is step {mine[-1].step}" if mine else ""
    yield ok(name, "checkpoints", f"{len(mine)} there{newest}")
    for member, steps in others.items():
        shown = ", ".join(map(str, steps[:5]))
        fix = "Where amzn-sagemaker-checkpointing wrote them, `sm-tiered import` brings the newest over."
        yield warn(name, "other steps", f"{member} has steps of another program: {shown}", fix)


def _of_others(service: HyperPodService, index: Index, members: tuple[Namespace, ...]) -> dict[str, list[int]]:
    """By namespace: the steps under which something stands that is not ours, newest first."""
    found: dict[str, list[int]] = {}
    for member in members:
        low = [wire for wire in service.latest(member) if wire < MAX_STEP]
        found[member.name] = [wire for wire in low if None in index.holders(member, wire)]
    return {name: steps for name, steps in found.items() if steps}


def _timed(call: Callable[[], _T]) -> tuple[_T, float]:
    begun = time.monotonic()
    return call(), time.monotonic() - begun


def _ms(secs: float) -> str:
    return f"{1000 * secs:.1f} ms" if secs < 0.1 else f"{secs:.2f} s"
