"""The command that all commands belong to, and the arguments that they share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from sm_tiered.cli.common import overriding

__all__ = ["EXITS", "JsonFlag", "RecipePath", "StepOption", "TierOption", "app"]

RecipePath = Annotated[str, typer.Argument(help="The run's recipe, a YAML file.", show_default=False)]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
StepOption = Annotated[int | None, typer.Option("--step", metavar="N", help="That step instead.", show_default=False)]
TierOption = Annotated[
    str | None, typer.Option("--tier", metavar="NAME", help="Only that tier, not all.", show_default=False)
]
_SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.KEY=VALUE", help="Over what the recipe says; repeatable.", show_default=False),
]

EXITS = "Exit status: 0 all right, 1 a tier did not answer or nothing is there, 2 usage or recipe, 3 damage."

_RECIPES = frozenset({"recipe", "sources"})
"""Parameters that name a recipe."""


class _App(typer.Typer):
    """Every command that takes a recipe takes ``--set`` too, without a word of its own."""

    def command(self, *args: Any, **kwargs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        register = super().command(*args, **kwargs)

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            register(_with_set(function))
            return function

        return decorate


def _with_set(function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function, eval_str=True)
    parameters = list(signature.parameters.values())
    if not _RECIPES & set(signature.parameters):
        return function

    @functools.wraps(function)
    def run(*args: Any, overrides: Sequence[str] | None = None, **kwargs: Any) -> None:
        with overriding(overrides or ()):
            function(*args, **kwargs)

    kind = inspect.Parameter.KEYWORD_ONLY
    option = inspect.Parameter("overrides", kind, default=None, annotation=_SetOption)
    vars(run)["__signature__"] = signature.replace(parameters=[*parameters, option])
    return run


app = _App(
    name="sm-tiered",
    help="Look after the checkpoints of a run, on every tier, while its job goes on or after it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root() -> None:
    """Look after the checkpoints of a run, on every tier, while its job goes on or after it."""
