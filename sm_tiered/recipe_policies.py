"""Save and keep policies as a recipe writes them, and what all sections have in common (pydantic models)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from sm_tiered.errors import ConfigError, PolicyError
from sm_tiered.policies.keep import AnyOfKeep, Best, KeepEveryNSteps, KeepPolicy, Latest, NewerThanSecs
from sm_tiered.policies.save import (
    AllOf,
    AnyOf,
    AtSteps,
    EveryNEpochs,
    EveryNSteps,
    EverySecs,
    OnEnd,
    OnPreemption,
    SavePolicy,
)
from sm_tiered.recipe_fields import check_path, check_positive, closest, parse_size, shown
from sm_tiered.recipe_yaml import FromEnvironment

__all__ = ["Directory", "Flag", "KeepSpec", "Number", "SaveSpec", "Secs", "Section", "Size", "Whole", "located"]


def located(error: ConfigError, key: str | int) -> PydanticCustomError:
    """Return *error* as one about *key* inside the section that is being validated."""
    return PydanticCustomError("located", "{text}", {"text": error.message, "hint": error.hint or "", "key": key})


def _whole(value: object) -> object:
    """Text that the environment filled in is a number where one is wanted; text that the recipe quotes is not."""
    is_one = isinstance(value, FromEnvironment) and re.fullmatch(r"-?(0|[1-9]\d{0,17})", value, re.ASCII)
    return int(cast(str, value)) if is_one else value


def _number(value: object) -> object:
    is_one = isinstance(value, FromEnvironment) and re.fullmatch(r"-?\d{1,18}(\.\d{1,18})?", value, re.ASCII)
    return float(cast(str, value)) if is_one else value


def _flag(value: object) -> object:
    is_one = isinstance(value, FromEnvironment) and value in ("true", "false")
    return value == "true" if is_one else value


def _size(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        parse_size(str(value))
    if isinstance(value, str):
        parse_size(value)
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Yes = Annotated[Literal[True], BeforeValidator(_flag)]
Secs = Annotated[Number, AfterValidator(check_positive)]
Size = Annotated[str, BeforeValidator(_size)]
Directory = Annotated[str, AfterValidator(check_path)]


class Section(BaseModel):
    """Part of a recipe: frozen, strict, and without a key that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    hints: ClassVar[Mapping[str, str]] = {}
    """What to do about keys that people try."""

    @classmethod
    def shape(cls, data: object) -> object:
        """Return *data* with shorthand written out."""
        return data

    def __repr_args__(self) -> Iterable[tuple[str | None, object]]:
        return [(name, value) for name, value in super().__repr_args__() if value is not None]

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: object) -> object:
        data = cls.shape(data)
        if not isinstance(data, Mapping):
            return data
        found: dict[str, object] = {}
        for key, value in cast("Mapping[str, object]", data).items():
            if key not in cls.model_fields:
                guess = closest(key, cls.model_fields)
                allowed = f"Known here: {', '.join(cls.model_fields)}."
                hint = cls.hints.get(key) or (f"Did you mean '{guess}'? {allowed}" if guess else allowed)
                raise located(ConfigError(f"unknown key {shown(key)}", hint=hint), key)
            if isinstance(value, FromEnvironment) and not value and not cls.model_fields[key].is_required():
                continue  # `${NAME:-}` is how a recipe makes an optional value depend on the environment
            found[key] = value
        return found


class _PolicySpec(Section):
    """Exactly one policy; its name is the key."""

    bare: ClassVar[tuple[str, ...]] = ()
    """Those that can stand alone, as text."""
    example: ClassVar[str] = ""

    @classmethod
    def shape(cls, data: object) -> object:
        """Return ``on_end`` as ``{on_end: true}``; refuse what is not one policy."""
        hint = f"Give one, e.g. {cls.example}."
        if isinstance(data, str):
            if data in cls.bare:
                return {str(data): True}
            guess = closest(data, cls.model_fields)
            raise ConfigError(f"{shown(data)} is no policy", hint=f"Did you mean '{guess}'? {hint}" if guess else hint)
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise ConfigError(f"must be a policy, got {shown(data)}", hint=hint)
        found = cast("Mapping[str, object]", data)
        if len(found) > 1 and set(found) <= set(cls.model_fields):
            members = ", ".join(key if key in cls.bare else f"{{{key}: …}}" for key in found)
            ways = " or ".join(f"{{{way}: [{members}]}}" for way in ("any", "all") if way in cls.model_fields)
            raise ConfigError(f"holds {len(found)} policies ({', '.join(found)})", hint=f"Combine them: {ways}.")
        return found

    def chosen(self) -> str:
        """The policy's name."""
        found = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if not found:
            raise PolicyError("names no policy", hint=f"Give one, e.g. {self.example}, or leave the key out.")
        return found[0]


class SaveSpec(_PolicySpec):
    """When to save."""

    bare = ("on_end", "on_preemption")
    example = (
        "{every_n_steps: 10}, {every_n_epochs: 1}, {every_secs: 600}, {at_steps: [1, 100]}, on_end, on_preemption, "
        "{any: […]}, {all: […]}"
    )
    hints = {"every": "Write every_n_steps: 10 or every_secs: 600."}

    every_n_steps: Whole | None = None
    every_n_epochs: Whole | None = None
    every_secs: Number | None = None
    at_steps: list[Whole] | None = None
    on_end: Yes | None = None
    on_preemption: Yes | None = None
    any: list[SaveSpec] | None = None
    all: list[SaveSpec] | None = None

    @model_validator(mode="after")
    def _can_be_built(self) -> SaveSpec:
        name = self.chosen()
        try:
            self.policy()
        except PolicyError as error:
            raise located(error, name) from error
        return self

    def policy(self) -> SavePolicy:
        """The policy that this stands for."""
        if self.every_n_steps is not None:
            return EveryNSteps(self.every_n_steps)
        if self.every_n_epochs is not None:
            return EveryNEpochs(self.every_n_epochs)
        if self.every_secs is not None:
            return EverySecs(self.every_secs)
        if self.at_steps is not None:
            return AtSteps(self.at_steps)
        if self.any is not None:
            return AnyOf(spec.policy() for spec in self.any)
        if self.all is not None:
            return AllOf(spec.policy() for spec in self.all)
        return OnEnd() if self.on_end else OnPreemption()


class BestSpec(Section):
    """The best by a metric."""

    metric: str
    mode: str
    n: Whole = 1


class KeepSpec(_PolicySpec):
    """What to keep."""

    example = (
        "{latest: 3}, {every_n_steps: 1000}, {newer_than_secs: 86400}, "
        "{best: {metric: val_loss, mode: min, n: 2}}, {any: […]}"
    )
    hints = {"all": "Keep policies combine with any: what one of them keeps stays."}

    latest: Whole | None = None
    every_n_steps: Whole | None = None
    newer_than_secs: Number | None = None
    best: BestSpec | None = None
    any: list[KeepSpec] | None = None

    @model_validator(mode="after")
    def _can_be_built(self) -> KeepSpec:
        name = self.chosen()
        try:
            self.policy()
        except PolicyError as error:
            raise located(error, name) from error
        return self

    def policy(self) -> KeepPolicy:
        """The policy that this stands for."""
        if self.latest is not None:
            return Latest(self.latest)
        if self.every_n_steps is not None:
            return KeepEveryNSteps(self.every_n_steps)
        if self.newer_than_secs is not None:
            return NewerThanSecs(self.newer_than_secs)
        if self.best is not None:
            return Best(self.best.metric, self.best.mode, self.best.n)
        return AnyOfKeep(spec.policy() for spec in self.any or ())
