"""Commands that only look: nothing is written, locked or unpickled. Each one's module is loaded when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from sm_tiered.cli.common import reported
from sm_tiered.cli.root import EXITS, JsonFlag, RecipePath, StepOption, TierOption, app

__all__ = ["ls", "show", "verify"]


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
