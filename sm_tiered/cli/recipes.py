"""Commands about the recipe itself. Each one's module is loaded when it is called."""

from __future__ import annotations

from sm_tiered.cli.common import reported
from sm_tiered.cli.root import JsonFlag, RecipePath, app

__all__ = ["config"]

_EXITS = "Exit status: 0 all right, 1 it can't be written, 2 usage or recipe."


@app.command(epilog=_EXITS, short_help="Print what a recipe comes to, and why.")
@reported
def config(recipe: RecipePath, as_json: JsonFlag = False) -> int:
    """Print the recipe that results from all files, the environment and --set, and where each value comes from."""
    from sm_tiered.cli import config as command

    return command.run(recipe, as_json=as_json)
