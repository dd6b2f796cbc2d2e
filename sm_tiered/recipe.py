"""Recipes: one YAML file that says where checkpoints live, when to save and what to keep.

A recipe is read strictly and resolved once: what it extends, what the environment sets and fills in, and absolute
paths, so that `Settings.text` means the same to every process. Every mistake is a `RecipeError` with its place.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, cast

from pydantic import AfterValidator, PrivateAttr, ValidationError, field_validator

from sm_tiered.errors import ConfigError, RecipeError
from sm_tiered.exchange import MOST_TIERS
from sm_tiered.layout import check_namespace
from sm_tiered.policies import AnyOf, EveryNSteps, OnRequest, SavePolicy, members_of
from sm_tiered.recipe_fields import shown
from sm_tiered.recipe_fill import fill
from sm_tiered.recipe_log import LogSection
from sm_tiered.recipe_messages import translated
from sm_tiered.recipe_models import LocalTier, MemoryTier, Tier
from sm_tiered.recipe_overrides import overridden
from sm_tiered.recipe_policies import Flag, Secs, Section, located
from sm_tiered.recipe_sources import read_recipe, with_bases
from sm_tiered.recipe_yaml import Document, FromEnvironment, parse_yaml
from sm_tiered.settings import Settings

__all__ = ["Recipe", "load_recipe"]

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
        **dict.fromkeys(("extend", "inherits", "include", "base", "defaults"), "Write extends: base.yaml."),
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
    log: LogSection | None = None

    _document: Document = PrivateAttr(default_factory=lambda: Document(source="recipe", value={}))

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
        if len(tiers) > MOST_TIERS:
            raise ConfigError(f"{len(tiers)} tiers, at most {MOST_TIERS}", hint="Leave out those that nothing needs.")
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
    def load(cls, path: str | os.PathLike[str], *, overrides: Iterable[str] = ()) -> Recipe:
        """Return the recipe in the YAML file at *path*, over what it extends and under what the environment sets.

        *overrides* go over all: each is a ``KEY.KEY=VALUE``, as behind ``--set`` on the command line.

        Raises:
            RecipeError: it can't be read or used; says where and what is allowed.
        """
        return cls._layered(read_recipe(path), overrides)

    @classmethod
    def parse(
        cls, text: str | Mapping[str, object], *, source: str = "recipe", overrides: Iterable[str] = ()
    ) -> Recipe:
        """Return the recipe that YAML *text*, or a mapping of its values, holds. *source* names it in messages.

        Raises:
            RecipeError: it can't be used.
        """
        document = parse_yaml(text, source) if isinstance(text, str) else Document(source=source, value=text)
        return cls._layered(document, overrides)

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
    def _layered(cls, document: Document, overrides: Iterable[str]) -> Recipe:
        whole = with_bases(document, environment=os.environ)
        return cls._validated(
            fill(overridden(whole, environment=os.environ, options=overrides), environment=os.environ)
        )

    @classmethod
    def _validated(cls, document: Document) -> Recipe:
        try:
            recipe = cls.model_validate(document.value)
        except ValidationError as error:
            raise translated(error.errors(include_url=False), document) from None
        recipe._document = document
        return recipe

    @property
    def document(self) -> Document:
        """The values that it was made of, with their places."""
        return self._document

    def values(self) -> dict[str, object]:
        """Return all that holds, defaults included, as plain values; what is absent is left out."""
        return self.model_dump(mode="json", exclude_none=True, by_alias=True)

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
            log=self.log.settings() if self.log else None,
            source=self._document.source,
            text=json.dumps(self.values(), separators=(",", ":")),
        )

    def warnings(self) -> list[str]:
        """Return what can be used but is hardly meant: durable saves at steps that memory is not saved at."""
        found: list[str] = []
        settings = self.settings()
        memory = settings.memory
        periods = _periods(memory.save) if memory else []
        for tier in settings.durable:
            for every in _periods(tier.save):
                if memory and periods and not any(_among(every, period) for period in periods):
                    where = f"{self._document.source}: tiers.{tier.name}.save"
                    found.append(
                        f"{where}: steps {_shown(every)} are no multiples of those of tier {memory.name!r} "
                        f"({', '.join(map(_shown, periods))}): each one is staged in memory too"
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


def _periods(policy: SavePolicy | None) -> list[EveryNSteps]:
    members = policy.policies if isinstance(policy, AnyOf) else [policy]
    found = {member for member in members if isinstance(member, EveryNSteps)}
    found.update(inner for member in members if isinstance(member, AnyOf) for inner in _periods(member))
    return sorted(found, key=lambda period: (period.n, period.offset, period.start, period.stop or 0))


def _among(every: EveryNSteps, period: EveryNSteps) -> bool:
    return every.n % period.n == 0 and (every.offset - period.offset) % period.n == 0


def _shown(period: EveryNSteps) -> str:
    return f"{period.n} + {period.offset}" if period.offset else str(period.n)
