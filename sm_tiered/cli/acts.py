"""Commands that change something: each says what it did. Each one's module is loaded when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from sm_tiered.cli.common import reported
from sm_tiered.cli.root import EXITS, JsonFlag, RecipePath, app

__all__ = ["request"]


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
