"""Commands that change something: each says what it did. Each one's module is loaded when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from sm_tiered.cli.common import reported
from sm_tiered.cli.root import EXITS, JsonFlag, RecipePath, StepOption, TierOption, app

__all__ = ["copy", "drain", "export", "import_", "pin", "promote", "prune", "request"]

_Step = Annotated[int, typer.Option("--step", metavar="N", help="That step.", show_default=False)]
_AnyStep = Annotated[int | None, typer.Option("--step", metavar="N", help="That step.", show_default=False)]
_Attempt = Annotated[
    str | None,
    typer.Option("--attempt", metavar="A", help="Of that attempt, e.g. a2; else as restore does.", show_default=False),
]
_Timeout = Annotated[
    float | None,
    typer.Option("--timeout", metavar="SECS", help="Wait no longer; the drain goes on.", show_default=False),
]


@app.command(epilog=EXITS, short_help="Keep a checkpoint, whatever the keep policy says.")
@reported
def pin(
    recipe: RecipePath,
    step: _AnyStep = None,
    attempt: _Attempt = None,
    tier: TierOption = None,
    reason: Annotated[
        str | None, typer.Option("--reason", metavar="TEXT", help="Why, for those who find it.", show_default=False)
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the pin away.")] = False,
    as_json: JsonFlag = False,
) -> int:
    """Pin a step on every durable tier that holds it: it is never pruned there. Without --step: list the pins."""
    from sm_tiered.cli import pin as command

    return command.run(recipe, step=step, attempt=attempt, tier=tier, reason=reason, remove=remove, as_json=as_json)


@app.command(epilog=EXITS, short_help="Give up what the keep policies do not want.")
@reported
def prune(
    recipe: RecipePath,
    tier: TierOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete it; without, only tell.")] = False,
    as_json: JsonFlag = False,
) -> int:
    """Tell what the keep policies give up now, what stays and why, and what dead attempts left; delete with --yes.

    Never deleted are the newest, what is pinned, restored from or in flight, other namespaces, and unknown files.
    """
    from sm_tiered.cli import prune as command

    return command.run(recipe, tier=tier, yes=yes, as_json=as_json)


@app.command(epilog=EXITS, short_help="Bring a step to a durable tier now.")
@reported
def promote(
    recipe: RecipePath,
    step: _Step,
    attempt: _Attempt = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="TIER", help="Where to; may be left out if there is one.", show_default=False),
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="And pin it there.")] = False,
    timeout: _Timeout = None,
    as_json: JsonFlag = False,
) -> int:
    """Bring a step that is complete in memory, or on one durable tier, to a durable tier, verified on the way.

    From memory this node's drainer does it, and is waited for; with several nodes run it on each of them.
    """
    from sm_tiered.cli import promote as command

    return command.run(recipe, step=step, attempt=attempt, to=to, pin=pin, timeout_secs=timeout, as_json=as_json)


@app.command(epilog=EXITS, short_help="Copy checkpoints to another tier or run.")
@reported
def copy(
    recipe: RecipePath,
    source: Annotated[str, typer.Option("--from", metavar="TIER", help="Tier to copy from.", show_default=False)],
    target: Annotated[str, typer.Option("--to", metavar="TIER", help="Tier to copy to.", show_default=False)],
    step: _AnyStep = None,
    every: Annotated[bool, typer.Option("--all", help="All complete checkpoints.")] = False,
    attempt: _Attempt = None,
    to_recipe: Annotated[
        str | None,
        typer.Option("--to-recipe", metavar="RECIPE", help="The recipe that has the --to tier.", show_default=False),
    ] = None,
    namespace: Annotated[
        str | None,
        typer.Option("--namespace", metavar="NAME", help="Into that run's namespace.", show_default=False),
    ] = None,
    as_json: JsonFlag = False,
) -> int:
    """Copy checkpoints between tiers and runs: every byte is verified on its way, and the manifest comes last.

    What was cut short is gone on with by the same command; what is there already stays as it is.
    """
    from sm_tiered.cli import copy as command

    return command.run(
        recipe,
        step=step,
        every=every,
        attempt=attempt,
        source=source,
        target=target,
        to_recipe=to_recipe,
        namespace=namespace,
        as_json=as_json,
    )


@app.command("import", epilog=EXITS, short_help="Take over checkpoints of amzn-sagemaker-checkpointing.")
@reported
def import_(
    recipe: RecipePath,
    origin: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="PLACE",
            help="Its s3_tier_base_path, s3://bucket/prefix, or the cluster's service, http://HOST:9200.",
            show_default=False,
        ),
    ],
    namespace: Annotated[
        str | None,
        typer.Option("--from-namespace", metavar="NAME", help="Its namespace, if not ours.", show_default=False),
    ] = None,
    step: _AnyStep = None,
    latest: Annotated[
        bool, typer.Option("--latest", help="The newest complete one, as without --step or --all.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="All complete checkpoints.")] = False,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="TIER", help="Where to; may be left out if there is one.", show_default=False),
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="And pin them there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell; nothing is written.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Unpickle values that can't be loaded safely: that can run code.")
    ] = False,
    as_json: JsonFlag = False,
) -> int:
    """Take over checkpoints that amzn-sagemaker-checkpointing wrote: checked, converted, committed and read back.

    They keep their steps and count as older than every save of ours: a job without saves of its own goes on from them
    by itself; where it has some, those stay the latest. Any number of ranks can restore them, and stock DCP reads them.

    On S3, a step with a shard that is newer than its metadata may be of two saves: it is passed over unless --step asks
    for it. The cluster's service tells no times, so there nothing can tell that.
    """
    from sm_tiered.cli import import_ as command

    asked = command.Asked(
        origin=origin,
        namespace=namespace,
        step=step,
        latest=latest,
        every=every,
        to=to,
        pin=pin,
        dry_run=dry_run,
        allow_pickle=allow_pickle,
    )
    return command.run(recipe, asked, as_json=as_json)


@app.command(epilog=EXITS, short_help="Finish what a dead job left in memory.")
@reported
def drain(recipe: RecipePath, timeout: _Timeout = None, as_json: JsonFlag = False) -> int:
    """Bring what waits in this node's memory directory to its durable tiers, and wait for it."""
    from sm_tiered.cli import drain as command

    return command.run(recipe, timeout_secs=timeout, as_json=as_json)


@app.command(epilog=EXITS, short_help="Ask a running job to save now.")
@reported
def request(
    recipe: RecipePath,
    wait: Annotated[
        float,
        typer.Option("--wait", metavar="SECS", help="How long to wait until the job has taken it; 0: not at all."),
    ] = 60.0,
    as_json: JsonFlag = False,
) -> int:
    """Ask the running job to save at its next step, wherever a tier says `save: on_request`."""
    from sm_tiered.cli import request as command

    return command.run(recipe, wait_secs=wait, as_json=as_json)


@app.command(epilog=EXITS, short_help="Write a checkpoint's model as safetensors files.")
@reported
def export(
    recipe: RecipePath,
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="DIR", help="The directory to write to.", show_default=False)
    ],
    step: StepOption = None,
    tier: TierOption = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="One file holds at most that much.")
    ] = "5GB",
    prefix: Annotated[
        str | None, typer.Option("--prefix", metavar="TEXT", help="Only names that begin so.", show_default=False)
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="GLOB", help="Only names that match; repeatable.", show_default=False),
    ] = None,
    strip: Annotated[
        str | None, typer.Option("--strip", metavar="TEXT", help="Take that off names' beginnings.", show_default=False)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All tensors, the optimizer's too.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that stands there.")] = False,
    as_json: JsonFlag = False,
) -> int:
    """Write the newest complete checkpoint's model as safetensors files with an index: whole tensors, verified."""
    from sm_tiered.cli import export as command

    asked = command.Asked(
        step=step,
        tier=tier,
        output=output,
        max_shard_size=max_shard_size,
        prefix=prefix,
        only=only or (),
        strip=strip,
        every=every,
        force=force,
    )
    return command.run(recipe, asked, as_json=as_json)
