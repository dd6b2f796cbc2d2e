"""Commands about the recipe itself. Each one's module is loaded when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from sm_tiered.cli.common import reported
from sm_tiered.cli.root import JsonFlag, RecipePath, app

__all__ = ["config", "schema"]

_EXITS = "Exit status: 0 all right, 1 it can't be written, 2 usage or recipe."


@app.command(epilog=_EXITS, short_help="Print what a recipe comes to, and why.")
@reported
def config(recipe: RecipePath, as_json: JsonFlag = False) -> int:
    """Print the recipe that results from all files, the environment and --set, and where each value comes from."""
    from sm_tiered.cli import config as command

    return command.run(recipe, as_json=as_json)


@app.command(epilog=_EXITS, short_help="Print the JSON Schema of recipes, for editors.")
@reported
def schema(
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there.", show_default=False)
    ] = None,
    as_json: JsonFlag = False,
) -> int:
    """Print the JSON Schema (draft 2020-12) of recipes. A recipe that begins with the line

    # yaml-language-server: $schema=sm_tiered.schema.json

    is completed and checked by editors, where the schema lies beside it.
    """
    from sm_tiered.cli import schema as command

    return command.run(output=output, as_json=as_json)
