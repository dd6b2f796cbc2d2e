"""The command line's entry: what can be said there. Each command is loaded when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from sm_tiered.cli.common import fail_softly, reported

__all__ = ["app", "main"]

app = typer.Typer(
    name="sm-tiered",
    help="Look at the checkpoints of a run, on every tier. Nothing is written, locked or unpickled; a job may go on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Recipe = Annotated[str, typer.Argument(help="The run's recipe, a YAML file.", show_default=False)]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
_Step = Annotated[int | None, typer.Option("--step", metavar="N", help="That step instead.", show_default=False)]

_EXITS = "Exit status: 0 all right, 1 a tier did not answer or nothing is there, 2 usage or recipe, 3 damage."


@app.callback()
def _root() -> None:
    """Look at the checkpoints of a run, on every tier. Nothing is written, locked or unpickled; a job may go on."""


@app.command(epilog=_EXITS, short_help="List what each tier holds.")
@reported
def ls(recipe: _Recipe, as_json: _Json = False) -> int:
    """List what each tier holds: step, age, size, complete or why not, and what a restore would take now."""
    from sm_tiered.cli import ls as command

    return command.run(recipe, as_json=as_json)


@app.command(epilog=_EXITS, short_help="Show one checkpoint: parts, tensors, values.")
@reported
def show(
    recipe: _Recipe,
    step: _Step = None,
    every: Annotated[bool, typer.Option("--all", help="All parts, tensors and values, not the first 20.")] = False,
    as_json: _Json = False,
) -> int:
    """Show the newest complete checkpoint of each tier: where it comes from, its parts, tensors and values."""
    from sm_tiered.cli import show as command

    return command.run(recipe, step=step, every=every, as_json=as_json)


@app.command(epilog=_EXITS, short_help="Compare what is stored with its digests.")
@reported
def verify(
    recipe: _Recipe,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="Only that step, not all.", show_default=False)
    ] = None,
    read_data: Annotated[
        str, typer.Option("--read-data", metavar="PERCENT", help="Share of the data to read, e.g. 10%.")
    ] = "100%",
    tier: Annotated[
        str | None, typer.Option("--tier", metavar="NAME", help="Only that tier, not all.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Choose the same data as that run.", show_default=False)
    ] = None,
    as_json: _Json = False,
) -> int:
    """Read checkpoints and compare every byte, or a share, with the digests that were taken when they were saved."""
    from sm_tiered.cli import verify as command

    return command.run(recipe, step=step, read_data=read_data, tier=tier, seed=seed, as_json=as_json)


def main() -> None:
    """Run the command that the arguments name."""
    fail_softly()
    app(prog_name="sm-tiered")


if __name__ == "__main__":
    main()
