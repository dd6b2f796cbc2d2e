"""Recipes: one YAML file that says where checkpoints live, when to save and what to keep.

A recipe is read strictly and resolved once: the environment is filled in and paths are absolute, so that
`Settings.text` means the same to every process. Every mistake is a `RecipeError` with its place in the file.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import stat
from collections.abc import Mapping
from typing import Annotated, Literal, cast

from pydantic import AfterValidator, PrivateAttr, ValidationError, field_validator
from pydantic_core import ErrorDetails

from sm_tiered.errors import ConfigError, RecipeError, TieredError
from sm_tiered.layout import check_namespace
from sm_tiered.policies import AnyOf, EveryNSteps, OnRequest, SavePolicy, members_of
from sm_tiered.recipe_fields import closest, shown
from sm_tiered.recipe_fill import fill
from sm_tiered.recipe_models import LocalTier, MemoryTier, Tier
from sm_tiered.recipe_policies import Flag, Secs, Section, located
from sm_tiered.recipe_yaml import MAX_BYTES, Document, FromEnvironment, Path, Place, parse_yaml
from sm_tiered.settings import Settings

__all__ = ["Recipe", "load_recipe"]

_KINDS = ("memory", "local", "s3")
_TIER_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)
_logger = logging.getLogger("sm_tiered")


class Recipe(Section):
    """A recipe that was checked. `settings` is what the rest of the package works with."""

    hints = {
        "save_to_s3": "Give the s3 tier a save policy instead: save: {every_n_steps: 50}.",
        "s3_tier_base_path": "Name a tier instead: tiers: {s3: {kind: s3, uri: 's3://bucket/prefix'}}.",
        "disk_tier_base_path": "Name a tier instead: tiers: {disk: {kind: local, path: ./checkpoints}}.",
        "world_size": "Leave it out: it is taken from the process group.",
        "checksum": "Leave it out: every part carries XXH3-128 digests.",
        "save": "Each tier has its own: tiers: {memory: {save: …}}.",
        "keep": "Each tier has its own: tiers: {memory: {keep: …}}.",
    }

    version: Literal[1]
    namespace: Annotated[str, AfterValidator(check_namespace)]
    tiers: dict[str, Tier]
    """Fast → durable."""
    on_error: Literal["warn", "raise"] = "warn"
    unreachable: Literal["raise", "use_memory"] = "raise"
    allow_pickle: Flag = False
    allow_partial: Flag = False
    drain_timeout_secs: Secs = 1800.0
    commit_deadline_secs: Secs = 3600.0
    group_timeout_secs: Secs = 600.0
    in_use_wait_secs: Secs = 30.0
    stream_timeout_secs: Secs = 600.0

    _source: str = PrivateAttr(default="recipe")

    @classmethod
    def shape(cls, data: object) -> object:
        """Refuse another version before anything else, for what it says may mean something else there."""
        fields = cast("Mapping[str, object]", data if isinstance(data, Mapping) else {})
        if "version" in fields:
            given = fields["version"]
            version = int(given) if isinstance(given, FromEnvironment) and given.isdecimal() else given
            if isinstance(version, bool) or not isinstance(version, int):
                raise located(ConfigError(f"must be 1, got {shown(version)}", hint="Write version: 1."), "version")
            if version != 1:
                hint = "Upgrade sm-tiered, or write the recipe for version 1."
                raise located(ConfigError(f"recipe version {version}, this release knows 1", hint=hint), "version")
            return {**fields, "version": version}
        return cast(object, data)

    @field_validator("tiers")
    @classmethod
    def _tiers_fit(cls, tiers: dict[str, Tier]) -> dict[str, Tier]:
        if not tiers:
            raise ConfigError("no tier", hint="Name at least one: tiers: {memory: {kind: memory}}.")
        places: dict[tuple[str, ...], str] = {}
        for position, (name, tier) in enumerate(tiers.items()):
            if not _TIER_NAME.fullmatch(name):
                hint = "A letter a-z, then up to 31 of a-z 0-9 _."
                raise located(ConfigError(f"{shown(name)} can't be the name of a tier", hint=hint), name)
            if isinstance(tier, MemoryTier) and position:
                hint = "At most one memory tier, and it comes first: tiers are listed fast to durable."
                raise located(ConfigError("a memory tier that is not the first", hint=hint), name)
            other = places.setdefault(tier.place(), name)
            if other != name:
                hint = "Each tier needs a place of its own."
                raise located(ConfigError(f"is the same place as tier {other!r}", hint=hint), name)
        _see_requests(tiers)
        return tiers

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Return the recipe in the YAML file at *path*.

        Raises:
            RecipeError: it can't be read or used; says where and what is allowed.
        """
        return cls.parse(_read(path), source=os.fspath(path))

    @classmethod
    def parse(cls, text: str | Mapping[str, object], *, source: str = "recipe") -> Recipe:
        """Return the recipe that YAML *text*, or a mapping of its values, holds. *source* names it in messages.

        Raises:
            RecipeError: it can't be used.
        """
        document = parse_yaml(text, source) if isinstance(text, str) else Document(source=source, value=text)
        return cls._validated(fill(document, environment=os.environ))

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "recipe") -> Recipe:
        """Return the recipe that a `Settings.text` holds; the environment is not looked at again.

        Raises:
            RecipeError: it holds none.
        """
        try:
            value = cast(object, json.loads(text))
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{source}: not JSON: {type(error).__name__}") from error
        if not isinstance(value, dict):
            raise RecipeError(f"{source}: expected a mapping, got {shown(value)}")
        return cls._validated(fill(Document(source=source, value=cast("dict[str, object]", value)), environment=None))

    @classmethod
    def _validated(cls, document: Document) -> Recipe:
        try:
            recipe = cls.model_validate(document.value)
        except ValidationError as error:
            raise _translated(error.errors(include_url=False), document) from None
        recipe._source = document.source
        return recipe

    def settings(self) -> Settings:
        """Return what the recipe stands for."""
        return Settings(
            namespace=self.namespace,
            tiers=tuple(tier.settings(name) for name, tier in self.tiers.items()),
            on_error=self.on_error,
            unreachable=self.unreachable,
            allow_pickle=self.allow_pickle,
            allow_partial=self.allow_partial,
            drain_timeout_secs=self.drain_timeout_secs,
            commit_deadline_secs=self.commit_deadline_secs,
            group_timeout_secs=self.group_timeout_secs,
            in_use_wait_secs=self.in_use_wait_secs,
            stream_timeout_secs=self.stream_timeout_secs,
            source=self._source,
            text=json.dumps(self.model_dump(mode="json", exclude_none=True, by_alias=True), separators=(",", ":")),
        )

    def warnings(self) -> list[str]:
        """Return what can be used but is hardly meant: durable saves at steps that memory is not saved at."""
        found: list[str] = []
        settings = self.settings()
        memory = settings.memory
        periods = _periods(memory.save) if memory else set[int]()
        for tier in settings.durable:
            for every in sorted(_periods(tier.save)):
                if memory and periods and not any(every % period == 0 for period in periods):
                    found.append(
                        f"{self._source}: tiers.{tier.name}.save: steps {every} are no multiples of those of tier "
                        f"{memory.name!r} ({', '.join(map(str, sorted(periods)))}): each one is staged in memory too"
                    )
        return found


def load_recipe(recipe: str | os.PathLike[str] | Mapping[str, object] | Recipe) -> Recipe:
    """Return *recipe*, which is a path, the values of one, or a recipe already; log what is hardly meant.

    Raises:
        RecipeError: it can't be used.
    """
    given = cast(object, recipe)
    if isinstance(given, Recipe):
        return given
    if isinstance(given, Mapping):
        found = Recipe.parse(cast("Mapping[str, object]", given))
    elif isinstance(given, str) and "\n" in given:
        raise RecipeError("a path was expected, got text of several lines", hint="Use Recipe.parse(text).")
    elif isinstance(given, (str, os.PathLike)):
        found = Recipe.load(cast("str | os.PathLike[str]", given))
    else:
        raise RecipeError(f"a recipe is a path, a mapping or a Recipe, got {shown(given)}")
    for warning in found.warnings():
        _logger.warning("%s", warning)
    return found


def _read(path: str | os.PathLike[str]) -> str:
    source = os.fspath(path)
    try:
        found = os.stat(source)
        if not stat.S_ISREG(found.st_mode):  # a pipe would block
            kind = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise RecipeError(f"recipe {source!r} is {kind}", hint="Name the YAML file.")
        if found.st_size > MAX_BYTES:
            raise RecipeError(f"{source}: longer than {MAX_BYTES} bytes", hint="A recipe is a few dozen lines.")
        with open(source, "rb") as file:
            return file.read(MAX_BYTES + 1).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{source}: not UTF-8 at byte {error.start}", hint="Save the file as UTF-8.") from None
    except FileNotFoundError as error:
        raise RecipeError(f"recipe not found: {source}", hint=f"Looked from {os.getcwd()}.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"recipe {source!r} can't be read: {error}") from error


def _see_requests(tiers: Mapping[str, Tier]) -> None:
    """A request that names no file is looked for in a directory tier."""
    if any(isinstance(tier, (MemoryTier, LocalTier)) for tier in tiers.values()):
        return
    for name, tier in tiers.items():
        policy = tier.save_policy()
        for member in members_of(policy) if policy is not None else ():
            if isinstance(member, OnRequest) and member.file is None:
                error = ConfigError("on_request has no directory to look in", hint="Write on_request: {file: /a/path}.")
                raise located(error, name)


def _periods(policy: SavePolicy | None) -> set[int]:
    if isinstance(policy, EveryNSteps):
        return {policy.n}
    return set[int]().union(*map(_periods, policy.policies)) if isinstance(policy, AnyOf) else set()


# ---- pydantic's errors in a recipe's words

_KIND_OF = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
}
_MISSING = {
    "version": "Write version: 1.",
    "namespace": "Name the run, e.g. namespace: llama-7b-run3.",
    "tiers": "Name at least one: tiers: {memory: {kind: memory}}.",
    "uri": "Write uri: s3://bucket/prefix.",
    "path": "Name a directory that all ranks share.",
    "metric": "best needs metric: the name that is given with a save, e.g. val_loss.",
    "mode": "best needs mode: min or max.",
}


def _translated(errors: list[ErrorDetails], document: Document) -> RecipeError:
    told = [_told(error, document) for error in errors]
    told.sort(key=lambda entry: _order(document.places.get(entry[0])))
    path, message, hint = told[0]
    more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
    return document.error(message + more, path=path, hint=hint)


def _order(place: Place | None) -> tuple[float, int]:
    return (place.line or 0, place.column) if place else (math.inf, 0)


def _told(error: ErrorDetails, document: Document) -> tuple[Path, str, str | None]:
    """Path, message and what to do."""
    path, context, kind = _path(error["loc"]), error.get("ctx", {}), error["type"]
    value, inner = cast(object, error["input"]), context.get("error")
    if kind == "located":
        return (*path, context["key"]), context["text"], context["hint"] or None
    if isinstance(inner, TieredError):
        return path, inner.message, inner.hint
    if kind == "missing":
        return path[:-1], f"{path[-1]} is missing", _MISSING.get(str(path[-1]))
    if kind == "union_tag_not_found":
        return path, "kind is missing", f"One of {', '.join(_KINDS)}."
    if kind == "union_tag_invalid":
        given = cast("Mapping[str, object]", value)["kind"]
        guess = closest(given, _KINDS)
        choice = f"One of {', '.join(_KINDS)}."
        return (
            (*path, "kind"),
            f"{shown(given)} is no kind of tier",
            f"Did you mean '{guess}'? {choice}" if guess else choice,
        )
    if kind == "literal_error":
        wanted = str(context["expected"]).replace("True", "true")
        return path, f"must be {wanted}, got {shown(value)}", _why(value, path, document) or f"Choose {wanted}."
    wanted = _KIND_OF.get(kind, "a mapping" if kind.startswith(("model", "dict")) else str(error["msg"]))
    return path, f"must be {wanted}, got {shown(value)}", _why(value, path, document) or f"Give {wanted}."


def _path(loc: tuple[int | str, ...]) -> Path:
    """Where in the recipe: pydantic names the kind of a tier, and ways to write a value, as if they were keys."""
    path = loc[:2] + loc[3:] if loc[:1] == ("tiers",) and len(loc) > 2 else loc
    return tuple(part for part in path if not str(part).startswith("~"))


def _why(value: object, path: Path, document: Document) -> str | None:
    """Why YAML reads something else than what was meant."""
    place = document.places.get(path)
    text = place.text if place else None
    if isinstance(value, bool) and text is not None:
        return f"YAML reads {text} as {str(value).lower()}; quote it if text is meant."
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d[\d.]*[eE]\d+", value):
        return f"YAML 1.1 reads {value} as text; write the number out."
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d+)?", value):
        return f"Did you mean {value}, without quotes?"
    if isinstance(value, (int, float)) and text is not None:
        return f"Did you mean '{text}', in quotes?"
    return None
