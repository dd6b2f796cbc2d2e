"""The command that all commands belong to, and the arguments that they share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["EXITS", "JsonFlag", "RecipePath", "StepOption", "TierOption", "app"]

app = typer.Typer(
    name="sm-tiered",
    help="Look after the checkpoints of a run, on every tier, while its job goes on or after it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[str, typer.Argument(help="The run's recipe, a YAML file.", show_default=False)]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
StepOption = Annotated[int | None, typer.Option("--step", metavar="N", help="That step instead.", show_default=False)]
TierOption = Annotated[
    str | None, typer.Option("--tier", metavar="NAME", help="Only that tier, not all.", show_default=False)
]

EXITS = "Exit status: 0 all right, 1 a tier did not answer or nothing is there, 2 usage or recipe, 3 damage."


@app.callback()
def _root() -> None:
    """Look after the checkpoints of a run, on every tier, while its job goes on or after it."""
