"""Save and keep policies as a recipe writes them, and what all sections have in common (pydantic models)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from sm_tiered.errors import ConfigError, PolicyError
from sm_tiered.policies import (
    AllOf,
    AllOfKeep,
    AnyOf,
    AnyOfKeep,
    AtSteps,
    Best,
    EveryNEpochs,
    EveryNSteps,
    EverySecs,
    KeepAtSteps,
    KeepEveryNSteps,
    KeepPolicy,
    Latest,
    MaxOverhead,
    NewerThanSecs,
    Not,
    NotKeep,
    OnEnd,
    OnException,
    OnPreemption,
    OnRequest,
    Optimal,
    SavePolicy,
    WhenImproved,
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

    @classmethod
    def known(cls) -> dict[str, FieldInfo]:
        """Return the fields by the names that a recipe writes."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}

    def __repr_args__(self) -> Iterable[tuple[str | None, object]]:
        return [(name, value) for name, value in super().__repr_args__() if value is not None]

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: object) -> object:
        data = cls.shape(data)
        if not isinstance(data, Mapping):
            return data
        found: dict[str, object] = {}
        known = cls.known()
        for key, value in cast("Mapping[str, object]", data).items():
            if key not in known:
                guess = closest(key, known)
                allowed = f"Known here: {', '.join(known)}."
                hint = cls.hints.get(key) or (f"Did you mean '{guess}'? {allowed}" if guess else allowed)
                raise located(ConfigError(f"unknown key {shown(key)}", hint=hint), key)
            if isinstance(value, FromEnvironment) and not value and not known[key].is_required():
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
            guess = closest(data, cls.known())
            start = f"'{guess}' needs its value. " if guess == data else f"Did you mean '{guess}'? " if guess else ""
            raise ConfigError(f"{shown(data)} is no policy", hint=start + hint)
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise ConfigError(f"must be a policy, got {shown(data)}", hint=hint)
        found = cast("Mapping[str, object]", data)
        if len(found) > 1 and set(found) <= set(cls.known()):
            members = ", ".join(key if key in cls.bare else f"{{{key}: …}}" for key in found)
            ways = " or ".join(f"{{{way}: [{members}]}}" for way in ("any", "all"))
            raise ConfigError(f"holds {len(found)} policies ({', '.join(found)})", hint=f"Combine them: {ways}.")
        return found

    def chosen(self) -> str:
        """The policy's name."""
        found = [
            field.alias or name for name, field in type(self).model_fields.items() if getattr(self, name) is not None
        ]
        if not found:
            raise PolicyError("names no policy", hint=f"Give one, e.g. {self.example}, or leave the key out.")
        return found[0]


class EveryNStepsSpec(Section):
    """Multiples of a number, and between which steps."""

    n: Whole
    offset: Whole = 0
    start: Whole = 0
    stop: Whole | None = None


class ImprovedSpec(Section):
    """Better by a metric."""

    metric: str
    mode: str
    min_delta: Number = 0.0


class RequestSpec(Section):
    """A file that asks for a save by being there."""

    file: Directory


class OptimalSpec(Section):
    """Against failures that are so far apart."""

    mtbf_secs: Secs
    observe: Flag = False


def _form(data: object) -> str:
    return "~fields" if isinstance(data, (Mapping, Section)) else "~plain"


_Form = Discriminator(_form)
_Plain, _Fields = Tag("~plain"), Tag("~fields")
"""A value or a section; no part of where it stands, so errors leave out what begins with ``~``."""


class SaveSpec(_PolicySpec):
    """When to save."""

    bare = ("on_end", "on_exception", "on_preemption", "on_request")
    example = (
        "{every_n_steps: 10}, {every_n_epochs: 1}, {every_secs: 600}, {at_steps: [1, 100]}, on_end, on_exception, "
        "on_preemption, on_request, {when_improved: {metric: val_loss, mode: min}}, {max_overhead: 0.01}, "
        "{optimal: {mtbf_secs: 21600}}, {any: […]}, {all: […]}, {not: …}"
    )
    hints = {"every": "Write every_n_steps: 10 or every_secs: 600."}

    every_n_steps: Annotated[Annotated[Whole, _Plain] | Annotated[EveryNStepsSpec, _Fields], _Form] | None = None
    every_n_epochs: Whole | None = None
    every_secs: Number | None = None
    at_steps: list[Whole] | None = None
    when_improved: ImprovedSpec | None = None
    max_overhead: Number | None = None
    optimal: OptimalSpec | None = None
    on_end: Yes | None = None
    on_exception: Yes | None = None
    on_preemption: Yes | None = None
    on_request: Annotated[Annotated[Yes, _Plain] | Annotated[RequestSpec, _Fields], _Form] | None = None
    any: list[SaveSpec] | None = None
    all: list[SaveSpec] | None = None
    inverted: SaveSpec | None = Field(default=None, alias="not")

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
        return self._combination() or self._by_measure() or self._by_counter()

    def _combination(self) -> SavePolicy | None:
        if self.any is not None:
            return AnyOf(spec.policy() for spec in self.any)
        if self.all is not None:
            return AllOf(spec.policy() for spec in self.all)
        return Not(self.inverted.policy()) if self.inverted is not None else None

    def _by_measure(self) -> SavePolicy | None:
        if self.when_improved is not None:
            better = self.when_improved
            return WhenImproved(better.metric, better.mode, better.min_delta)
        if self.max_overhead is not None:
            return MaxOverhead(self.max_overhead)
        if self.optimal is not None:
            return Optimal(self.optimal.mtbf_secs, self.optimal.observe)
        return EverySecs(self.every_secs) if self.every_secs is not None else None

    def _by_counter(self) -> SavePolicy:
        steps = self.every_n_steps
        if isinstance(steps, EveryNStepsSpec):
            return EveryNSteps(steps.n, steps.offset, steps.start, steps.stop)
        if steps is not None:
            return EveryNSteps(steps)
        if self.every_n_epochs is not None:
            return EveryNEpochs(self.every_n_epochs)
        if self.at_steps is not None:
            return AtSteps(self.at_steps)
        if isinstance(self.on_request, RequestSpec):
            return OnRequest(self.on_request.file)
        moments = {"on_end": OnEnd, "on_exception": OnException, "on_preemption": OnPreemption, "on_request": OnRequest}
        return moments[self.chosen()]()


class BestSpec(Section):
    """The best by a metric."""

    metric: str
    mode: str
    n: Whole = 1


class KeepSpec(_PolicySpec):
    """What to keep."""

    example = (
        "{latest: 3}, {every_n_steps: 1000}, {at_steps: [1000]}, {newer_than_secs: 86400}, "
        "{best: {metric: val_loss, mode: min, n: 2}}, {any: […]}, {all: […]}, {not: …}"
    )

    latest: Whole | None = None
    every_n_steps: Whole | None = None
    at_steps: list[Whole] | None = None
    newer_than_secs: Number | None = None
    best: BestSpec | None = None
    any: list[KeepSpec] | None = None
    all: list[KeepSpec] | None = None
    inverted: KeepSpec | None = Field(default=None, alias="not")

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
        if self.at_steps is not None:
            return KeepAtSteps(self.at_steps)
        if self.newer_than_secs is not None:
            return NewerThanSecs(self.newer_than_secs)
        if self.best is not None:
            return Best(self.best.metric, self.best.mode, self.best.n)
        if self.all is not None:
            return AllOfKeep(spec.policy() for spec in self.all)
        if self.inverted is not None:
            return NotKeep(self.inverted.policy())
        return AnyOfKeep(spec.policy() for spec in self.any or ())
