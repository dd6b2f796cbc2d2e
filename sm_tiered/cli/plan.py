"""``sm-tiered plan``: what a recipe's policies would do, cost and lose, without a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from sm_tiered.cli.amounts import bytes_of, check_count, check_number, secs_of
from sm_tiered.cli.common import EXIT_OK, kind_of, open_recipe
from sm_tiered.cli.output import print_json, render
from sm_tiered.cli.plan_figures import (
    GETS_PER_SEC,
    PUTS_PER_SEC,
    Between,
    Lost,
    Memory,
    Requests,
    Storage,
    lost_work,
    memory_need,
    requests_of,
    storage_of,
    stretches,
    usable_after_secs,
)
from sm_tiered.cli.planning import Assumptions, Run, simulate
from sm_tiered.cli.progress import Steps
from sm_tiered.policies import wanted_metrics
from sm_tiered.settings import HyperPodSettings, S3Settings, Settings

__all__ = ["Asked", "Plan", "run"]

_MOST_STEPS = 10_000_000
_COPY_BYTES_PER_SEC = 5 * 2**30
"""Of one rank into recycled memory, where nobody measured: between RAM of two cores and a GPU's bus."""
_DRAIN_GBPS = 8.0
_COMMIT_SECS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line says."""

    steps: int
    step_secs: float
    state_bytes: str
    ranks: int = 1
    nodes: int = 1
    mtbf: str = "6h"
    node_mtbf: str = "7d"
    cluster_mtbf: str = "90d"
    blocked_secs: float | None = None
    drain_gbps: float | None = None
    steps_per_epoch: int | None = None
    price: float = 0.023


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A simulated run and what follows from it."""

    settings: Settings
    given: Assumptions
    run: Run
    process: Lost
    """What the death of processes loses."""
    node: Lost | None
    """What the loss of a node loses; None: there is no durable tier."""
    cluster: Lost | None
    """What the loss of the cluster's memory loses; None: no tier is there, or none outlives it."""
    memory: Memory | None
    storage: Mapping[str, Storage]
    requests: Mapping[str, Requests]
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]


def run(recipe: str, asked: Asked, *, as_json: bool) -> int:
    """Plan *recipe*; return the exit status."""
    given, assumptions = _given(asked)
    between = Between(
        process=secs_of("--mtbf", asked.mtbf),
        node=secs_of("--node-mtbf", asked.node_mtbf),
        cluster=secs_of("--cluster-mtbf", asked.cluster_mtbf),
    )
    price = check_number("--price", asked.price, least=0.0)
    settings = open_recipe(recipe)
    with Steps(given.steps, quiet=as_json) as steps:
        done = simulate(settings, given, tell=steps.tell)
    plan = _plan(settings, given, done, between=between, price=price, assumptions=assumptions)
    if as_json:
        print_json(_document(plan))
    else:
        from sm_tiered.cli.plan_tables import blocks

        render(*blocks(plan))
    return EXIT_OK


def _given(asked: Asked) -> tuple[Assumptions, list[str]]:
    steps = check_count("--steps", asked.steps, most=_MOST_STEPS)
    ranks = check_count("--ranks", asked.ranks, most=100_000)
    nodes = check_count("--nodes", asked.nodes, most=ranks)
    per_epoch = asked.steps_per_epoch
    if per_epoch is not None:
        check_count("--steps-per-epoch", per_epoch, most=steps)
    state = bytes_of("--state-bytes", asked.state_bytes)
    assumed: list[str] = []
    blocked = asked.blocked_secs
    if blocked is None:
        blocked = state / ranks / _COPY_BYTES_PER_SEC
        assumed.append(f"a save blocks for {blocked:.3f} s: 5 GiB/s a rank into memory (--blocked-secs)")
    gbps = asked.drain_gbps
    if gbps is None:
        gbps = _DRAIN_GBPS
        assumed.append(f"each node drains {gbps:g} Gbit/s to one durable tier (--drain-gbps)")
    assumed.append(f"a commit takes {_COMMIT_SECS:g} s after the last byte")
    given = Assumptions(
        steps=steps,
        step_secs=check_number("--step-secs", asked.step_secs),
        state_bytes=state,
        ranks=ranks,
        nodes=nodes,
        blocked_secs=check_number("--blocked-secs", blocked),
        drain_bytes_per_sec=check_number("--drain-gbps", gbps) * 1e9 / 8,
        commit_secs=_COMMIT_SECS,
        steps_per_epoch=per_epoch,
    )
    return given, assumed


def _plan(
    settings: Settings,
    given: Assumptions,
    done: Run,
    *,
    between: Between,
    price: float,
    assumptions: list[str],
) -> Plan:
    durable, every = ([tier.name for tier in tiers] for tiers in (settings.durable, settings.tiers))
    lasting = [tier.name for tier in settings.durable if not isinstance(tier, HyperPodSettings)]
    cost = done.blocked_secs / done.saves if done.saves else given.blocked_secs
    storage = {tier.name: storage_of(tier, done, given, price=price) for tier in settings.durable}
    requests = {
        tier.name: requests_of(tier, given, kept=storage[tier.name].kept)
        for tier in settings.durable
        if isinstance(tier, S3Settings) and done.planned[tier.name]
    }
    slots = settings.arena_slots
    memory = memory_need(settings.memory, given, generations=slots) if settings.memory is not None else None
    made = Plan(
        settings=settings,
        given=given,
        run=done,
        process=lost_work(done, every, mtbf_secs=between.process, blocked_secs=cost),
        node=lost_work(done, durable, mtbf_secs=between.node, blocked_secs=cost) if durable else None,
        cluster=lost_work(done, lasting, mtbf_secs=between.cluster, blocked_secs=cost)
        if lasting and lasting != durable
        else None,
        memory=memory,
        storage=storage,
        requests=requests,
        assumptions=(
            *assumptions,
            "failures strike at any time alike; --mtbf and --node-mtbf are those of the whole job",
            *(["the cluster's memory is as fast as other durable tiers"] if lasting != durable else []),
            f"S3 takes {PUTS_PER_SEC:,} PUT and {GETS_PER_SEC:,} GET a second on one prefix",
            f"a GiB costs ${price:g} a month on S3 (--price); requests and transfer are not counted",
            "nobody pins, stops or asks for anything, and no metrics are given",
        ),
        warnings=(),
    )
    return replace(made, warnings=tuple(_warnings(made)))


def _warnings(plan: Plan) -> list[str]:
    found: list[str] = []
    given, done = plan.given, plan.run
    for name, steps in done.skipped.items():
        if steps:
            saved = len(done.planned[name])
            found.append(
                f"{name}: {len(steps)} of {len(steps) + saved} due saves find the drain busy ({given.drain_secs:.1f} s "
                "a checkpoint) and give way to newer ones: save less often there, or drain faster"
            )
    memory = plan.memory
    if memory is not None and not memory.fits:
        found.append(f"memory: what is needed does not fit into {memory.path} on this machine")
    for name, requests in plan.requests.items():
        if requests.puts_per_sec > PUTS_PER_SEC or requests.gets_per_sec > GETS_PER_SEC:
            found.append(f"{name}: more requests a second than one prefix takes: raise part_size, or drain more slowly")
    for tier in plan.settings.tiers:
        if not done.planned[tier.name]:
            found.append(f"{tier.name}: nothing is ever saved there in these steps")
        if wanted_metrics(tier.keep):
            found.append(
                f"{tier.name}: keep.best is not replayed without metrics: it keeps up to as many more as its n"
            )
    if plan.node is None:
        found.append("there is no durable tier: the loss of a node loses everything")
    elif plan.cluster is None and any(isinstance(tier, HyperPodSettings) for tier in plan.settings.tiers):
        found.append("no tier outlives the cluster: with its memory everything is lost; add one, e.g. kind: s3")
    return found


# ---- for programs


def _document(plan: Plan) -> dict[str, object]:
    given, done = plan.given, plan.run
    return {
        "version": 1,
        "namespace": plan.settings.namespace,
        "given": asdict(given),
        "secs": done.secs,
        "blocked_secs": done.blocked_secs,
        "blocked_share": done.blocked_secs / done.secs,
        "tiers": [_tier(plan, tier.name, kind_of(tier)) for tier in plan.settings.tiers],
        "lost": {"process": _lost(plan.process), "node": _lost(plan.node), "cluster": _lost(plan.cluster)},
        "memory": None if plan.memory is None else {**asdict(plan.memory), "fits": plan.memory.fits},
        "limits": {"puts_per_sec": PUTS_PER_SEC, "gets_per_sec": GETS_PER_SEC},
        "assumptions": list(plan.assumptions),
        "warnings": list(plan.warnings),
    }


def _tier(plan: Plan, name: str, kind: str) -> dict[str, object]:
    planned = plan.run.planned[name]
    storage, requests = plan.storage.get(name), plan.requests.get(name)
    return {
        "name": name,
        "kind": kind,
        "saves": len(planned),
        "steps": [
            {"first": s.first, "last": s.last, "count": s.count, "every": s.every}
            for s in stretches([each.step for each in planned])
        ],
        "skipped": plan.run.skipped.get(name, []),
        "written_bytes": len(planned) * plan.given.state_bytes,
        "usable_after_secs": usable_after_secs(planned),
        "storage": None if storage is None else asdict(storage),
        "requests": None if requests is None else asdict(requests),
    }


def _lost(lost: Lost | None) -> dict[str, object] | None:
    return None if lost is None else {**asdict(lost), "share": lost.share}
