"""Commands that only look: nothing is written, locked or unpickled. Each one's module is loaded when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from sm_tiered.cli.common import reported
from sm_tiered.cli.root import EXITS, JsonFlag, RecipePath, StepOption, TierOption, app

__all__ = ["diff", "doctor", "ls", "plan", "show", "verify", "watch", "why"]


@app.command(epilog=EXITS, short_help="List what each tier holds.")
@reported
def ls(
    recipe: RecipePath,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint, not the newest 50 of a tier.")] = False,
    as_json: JsonFlag = False,
) -> int:
    """List what each tier holds: step, age, size, complete or why not, and what a restore would take now."""
    from sm_tiered.cli import ls as command

    return command.run(recipe, every=every, as_json=as_json)


@app.command(epilog=EXITS, short_help="Show one checkpoint: parts, tensors, values.")
@reported
def show(
    recipe: RecipePath,
    step: StepOption = None,
    every: Annotated[bool, typer.Option("--all", help="All parts, tensors and values, not the first 20.")] = False,
    as_json: JsonFlag = False,
) -> int:
    """Show the newest complete checkpoint of each tier: where it comes from, its parts, tensors and values."""
    from sm_tiered.cli import show as command

    return command.run(recipe, step=step, every=every, as_json=as_json)


@app.command(epilog=EXITS, short_help="Compare what is stored with its digests.")
@reported
def verify(
    recipe: RecipePath,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="Only that step, not all.", show_default=False)
    ] = None,
    read_data: Annotated[
        str, typer.Option("--read-data", metavar="PERCENT", help="Share of the data to read, e.g. 10%.")
    ] = "100%",
    tier: TierOption = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Choose the same data as that run.", show_default=False)
    ] = None,
    as_json: JsonFlag = False,
) -> int:
    """Read checkpoints and compare every byte, or a share, with the digests that were taken when they were saved."""
    from sm_tiered.cli import verify as command

    return command.run(recipe, step=step, read_data=read_data, tier=tier, seed=seed, as_json=as_json)


@app.command(
    epilog="Exit status: 0 all right, 2 usage or recipe.", short_help="Replay the policies, without a training."
)
@reported
def plan(
    recipe: RecipePath,
    steps: Annotated[int, typer.Option(metavar="N", help="Steps to train.", show_default=False)],
    step_secs: Annotated[float, typer.Option(metavar="S", help="Seconds of one step.", show_default=False)],
    state_bytes: Annotated[
        str, typer.Option(metavar="SIZE", help="State of the whole job, e.g. 14GiB.", show_default=False)
    ],
    ranks: Annotated[int, typer.Option(metavar="W", help="Ranks of the job.")] = 1,
    nodes: Annotated[int, typer.Option(metavar="N", help="Nodes of the job.")] = 1,
    mtbf: Annotated[str, typer.Option(metavar="TIME", help="Mean time between deaths of processes.")] = "6h",
    node_mtbf: Annotated[str, typer.Option(metavar="TIME", help="Mean time between losses of a node.")] = "7d",
    cluster_mtbf: Annotated[
        str, typer.Option(metavar="TIME", help="Mean time between losses of the cluster's memory.")
    ] = "90d",
    blocked_secs: Annotated[
        float | None, typer.Option(metavar="S", help="How long a save blocks, as measured.", show_default=False)
    ] = None,
    drain_gbps: Annotated[
        float | None, typer.Option(metavar="G", help="Gbit/s of one node to a durable tier.", show_default=False)
    ] = None,
    steps_per_epoch: Annotated[
        int | None, typer.Option(metavar="N", help="For every_n_epochs.", show_default=False)
    ] = None,
    price: Annotated[float, typer.Option(metavar="USD", help="Of a GiB on S3 for a month.")] = 0.023,
    as_json: JsonFlag = False,
) -> int:
    """Replay the policies over so many steps: what is saved where, what that costs, what a failure would lose."""
    from sm_tiered.cli import plan as command

    asked = command.Asked(
        steps=steps,
        step_secs=step_secs,
        state_bytes=state_bytes,
        ranks=ranks,
        nodes=nodes,
        mtbf=mtbf,
        node_mtbf=node_mtbf,
        cluster_mtbf=cluster_mtbf,
        blocked_secs=blocked_secs,
        drain_gbps=drain_gbps,
        steps_per_epoch=steps_per_epoch,
        price=price,
    )
    return command.run(recipe, asked, as_json=as_json)


@app.command(epilog=EXITS, short_help="Tell what a restore would take, and why.")
@reported
def why(
    recipe: RecipePath,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="A restore of that step.", show_default=False)
    ] = None,
    read_data: Annotated[
        str | None,
        typer.Option("--read-data", metavar="PERCENT", help="Verify that share of the bytes too.", show_default=False),
    ] = None,
    as_json: JsonFlag = False,
) -> int:
    """Tell which checkpoint a restore would take now, from which tiers, and why each newer one is passed over."""
    from sm_tiered.cli import why as command

    return command.run(recipe, step=step, read_data=read_data, as_json=as_json)


@app.command(epilog=EXITS, short_help="Compare two checkpoints, tensor by tensor.")
@reported
def diff(
    recipe: RecipePath,
    one: Annotated[str, typer.Argument(metavar="A", help="STEP, TIER:STEP or TIER:STEP@ATTEMPT.", show_default=False)],
    other: Annotated[str, typer.Argument(metavar="B", help="The same.", show_default=False)],
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="GLOB", help="Only tensors whose names match; repeatable.", show_default=False),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All that differs, not the first 20.")] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 when they differ.")] = False,
    as_json: JsonFlag = False,
) -> int:
    """Say which tensors of two checkpoints differ and by how much, and warn of optimizer state that was saved stale.

    A checkpoint is a step, on the nearest tier that has it complete; TIER:STEP takes that tier's, and @ATTEMPT, an
    ordinal as `ls` shows it, that attempt's. It may have been saved by another number of ranks. What is read is
    verified; what has equal digests is not read. Without --exit-code the exit status is 0 also when they differ.
    """
    from sm_tiered.cli import diff as command

    return command.run(recipe, one, other, only=only or (), every=every, exit_code=exit_code, as_json=as_json)


@app.command(epilog="Exit status: 0 all right, 1 something fails, 2 usage.", short_help="Examine machine and tiers.")
@reported
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="A recipe, whose tiers are tried.", show_default=False)] = None,
    as_json: JsonFlag = False,
) -> int:
    """Try what a job will need here, tmpfs, limits, each permission on S3, and say what to change.

    On durable tiers it writes small probes below the namespace, and takes them away again.
    """
    from sm_tiered.cli import doctor as command

    return command.run(recipe, as_json=as_json)


@app.command(epilog=EXITS, short_help="Watch a running job.")
@reported
def watch(
    recipe: RecipePath,
    interval: Annotated[float, typer.Option("--interval", metavar="S", help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once; --json does so too.")] = False,
    as_json: JsonFlag = False,
) -> int:
    """Watch a running job from its node: how far it is, what each tier has, what is on its way, how fast."""
    from sm_tiered.cli import watch as command

    return command.run(recipe, interval=interval, once=once, as_json=as_json)
