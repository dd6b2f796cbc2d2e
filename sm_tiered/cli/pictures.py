"""Commands that tell a run's story from its events. Each one's module is loaded when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from sm_tiered.cli.common import reported
from sm_tiered.cli.root import JsonFlag, app

__all__ = ["report", "timeline"]

_EXITS = "Exit status: 0 all right, 1 a tier did not answer or there are no events, 2 usage or recipe."

Sources = Annotated[
    list[str],
    typer.Argument(metavar="RECIPE|EVENTS...", help="The run's recipe; or files and directories of events."),
]


@app.command(epilog=_EXITS, short_help="Draw the run: saves, tiers, failures, work at risk.")
@reported
def timeline(
    sources: Sources,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="A page (.html), or a trace for Perfetto (.json).")
    ],
    as_json: JsonFlag = False,
) -> int:
    """Draw the whole run, all its launches, as one page that needs nothing else, or as a trace for Perfetto."""
    from sm_tiered.cli import timeline as command

    return command.run(sources, output=output, as_json=as_json)


@app.command(epilog=_EXITS, short_help="Tell where the run's time went, and what to change.")
@reported
def report(
    sources: Sources,
    mtbf: Annotated[
        str | None,
        typer.Option("--mtbf", metavar="TIME", help="Time between failures of any kind, e.g. 6h.", show_default=False),
    ] = None,
    node_mtbf: Annotated[
        str | None,
        typer.Option("--node-mtbf", metavar="TIME", help="Time between losses of a node.", show_default=False),
    ] = None,
    as_json: JsonFlag = False,
) -> int:
    """Tell where the time of all launches went, what failed, and which intervals would have lost the least.

    Times between failures are taken from what was seen, unless they are given.
    """
    from sm_tiered.cli import report as command

    return command.run(sources, mtbf=mtbf, node_mtbf=node_mtbf, as_json=as_json)
