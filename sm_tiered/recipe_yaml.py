"""Recipe text → plain values with their places. Knows YAML, not what a recipe means.

YAML 1.1 as PyYAML's safe loader reads it, without what surprises (duplicate keys, octal numbers, tags, merge keys)
and without what attacks (objects, expanding aliases).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import yaml

from sm_tiered.errors import RecipeError
from sm_tiered.recipe_fields import shown

__all__ = [
    "ABSENT",
    "MAX_BYTES",
    "MAX_DEPTH",
    "MAX_VALUES",
    "NO_SECRETS",
    "Document",
    "Filled",
    "FromEnvironment",
    "Path",
    "Place",
    "looks_secret",
    "name_of",
    "on_one_line",
    "parse_value",
    "parse_yaml",
]

MAX_BYTES = 1024 * 1024
"""Longer text is refused."""

MAX_VALUES, MAX_DEPTH = 10_000, 32
NO_SECRETS = "Secrets are not accepted here: credentials come from AWS's own chain (role, profile, environment)."
_MAX_ALIASES = 100
_BEGIN = "Begin with version: 1, namespace and tiers."
_SECRET = re.compile(r"secret|accesskey|password|passwd|credential|apikey|privatekey|tokens?$")
_ODD_INT = re.compile(r"[-+]?(0[0-7_]+|.*:.*)")

Path = tuple[str | int, ...]
"""Where a value stands: keys and indices from the root."""


class FromEnvironment(str):
    """Text in which a ``${NAME}`` was filled in: where a number is wanted it may be one."""

    __slots__ = ()


ABSENT = FromEnvironment("")
"""As good as no value, where one is optional."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a value was written."""

    source: str
    """A file, ``environment NAME`` or ``--set KEY``."""
    line: int | None = None
    """From 1; None: the source is no text of several lines."""
    column: int = 0
    text: str | None = None
    """A scalar as it was written."""

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}, line {self.line}, col {self.column}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """A ``${NAME}`` that was filled in."""

    name: str
    default: bool
    """Whether it was not set, so that the default was taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A recipe's values, before anybody knows what they mean."""

    source: str
    value: Mapping[str, object]
    places: Mapping[Path, Place] = field(default_factory=dict[Path, Place])
    """Of each value. A place without a value: a null there removed it."""
    files: tuple[str, ...] = ()
    """Those that it was read from, what extends before what it extends."""
    layers: int = 1
    """How many documents were laid over each other."""
    filled: Mapping[Path, tuple[Filled, ...]] = field(default_factory=dict[Path, "tuple[Filled, ...]"])

    def place(self, path: Path) -> Place | None:
        """Return the nearest place that is known of what stands at *path*."""
        return next((self.places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.places), None)

    def error(self, message: str, *, path: Path = (), hint: str | None = None) -> RecipeError:
        """Return the error about what stands at *path*."""
        where, name = str(self.place(path) or self.source), name_of(path)
        told = not name or where == f"--set {name}"
        return RecipeError(f"{where}: {'' if told else f'{name}: '}{message}", hint=hint)


def parse_yaml(text: str, source: str) -> Document:
    """Return the values of one YAML document whose root is a mapping.

    Raises:
        RecipeError: it is none, or holds what a recipe may not; with line and column.
    """
    empty = Document(source=source, value={})
    found = _composed(text, source)
    if found is None:
        raise empty.error("empty recipe", hint=_BEGIN)
    value, places = found
    if not isinstance(value, dict):
        raise empty.error(f"expected a mapping, got {shown(value)}", hint=_BEGIN)
    return Document(source=source, value=cast("dict[str, object]", value), places=places)


def parse_value(text: str, source: str) -> object:
    """Return the value that YAML *text* stands for, e.g. ``10`` or ``{every_n_steps: 10}``; None for no text, too.

    Raises:
        RecipeError: it is no YAML, or holds what a recipe may not.
    """
    found = _composed(text, source)
    return None if found is None else found[0]


def on_one_line(value: object) -> str:
    """Return *value*, which is plain, as YAML for what stands behind a key."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=MAX_BYTES)
    return text.removesuffix("...\n").strip()


def looks_secret(key: str) -> bool:
    """Return whether what stands under *key* is likely a secret."""
    words = re.split(r"[^a-z0-9]+", key.lower())
    return "token" in words or _SECRET.search("".join(words)) is not None


def name_of(path: Path) -> str:
    """Return *path* for people, such as ``tiers.s3.save.any[0]``."""
    parts = [
        f"[{part}]" if isinstance(part, int) else f".{part if part.isidentifier() else shown(part)}" for part in path
    ]
    return "".join(parts).removeprefix(".")


def _composed(text: str, source: str) -> tuple[object, dict[Path, Place]] | None:
    empty = Document(source=source, value={})
    if len(text) > MAX_BYTES:
        raise empty.error(f"longer than {MAX_BYTES} bytes", hint="A recipe is a few dozen lines.")
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except _TooMuchError as error:
        raise _at(source, error.mark, error.message, hint=error.hint) from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(source, text, error) from None
    except yaml.YAMLError as error:  # a ReaderError: it knows an offset only
        character, position = getattr(error, "character", "?"), getattr(error, "position", 0)
        raise empty.error(f"character {character!r} at {position} is not allowed in YAML") from None
    if root is None:
        return None
    builder = _Builder(source, loader)
    return builder.build(root, ()), builder.places


class _TooMuchError(Exception):
    """Raised out of PyYAML's composer before anything is built."""

    def __init__(self, mark: yaml.Mark, message: str, hint: str) -> None:
        super().__init__(message)
        self.mark, self.message, self.hint = mark, message, hint


class _Loader(yaml.SafeLoader):
    """Composes nodes only, and stops where text wants more than a recipe can need."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._aliases = self._nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = cast("yaml.Event", self.peek_event())  # pyright: ignore[reportUnknownMemberType]
        mark = cast("yaml.Mark", event.start_mark)
        self._nodes += 1
        self._aliases += isinstance(event, yaml.AliasEvent)
        if self._aliases > _MAX_ALIASES:
            raise _TooMuchError(mark, f"more than {_MAX_ALIASES} aliases", "Write the values out.")
        if self._nodes > 2 * MAX_VALUES or self._depth > MAX_DEPTH:
            raise _TooMuchError(mark, "too many or too deeply nested values", "A recipe is a few dozen lines.")
        tag = cast("str | None", getattr(event, "tag", None))
        if tag is not None:
            raise _TooMuchError(
                mark, f"tag {shown(tag)} is not permitted", "Write a plain value; nothing was executed."
            )
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Builder:
    """Builds values from nodes, and remembers where they stood."""

    def __init__(self, source: str, loader: _Loader) -> None:
        self._source, self._loader, self._values = source, loader, 0
        self.places: dict[Path, Place] = {}

    def build(self, node: yaml.Node, path: Path) -> object:
        mark = cast("yaml.Mark", node.start_mark)
        self._values += 1
        if self._values > MAX_VALUES or len(path) > MAX_DEPTH:  # what aliases repeat counts each time
            raise _at(self._source, mark, "aliases stand for too many values", hint="Write the values out.")
        text = cast(str, node.value) if isinstance(node, yaml.ScalarNode) else None
        self.places.setdefault(path, Place(source=self._source, line=mark.line + 1, column=mark.column + 1, text=text))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            children = cast("list[yaml.Node]", node.value)
            return [self.build(child, (*path, index)) for index, child in enumerate(children)]
        return self._scalar(cast("yaml.ScalarNode", node))

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, object]:
        found: dict[str, object] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
            mark = cast("yaml.Mark", key_node.start_mark)
            key = self._key(key_node)
            if key in lines:
                message = f"{shown(key)} twice, lines {lines[key]} and {mark.line + 1}"
                raise _at(self._source, mark, message, hint="Keep one of them.")
            lines[key] = mark.line + 1
            text = cast(str, value_node.value) if isinstance(value_node, yaml.ScalarNode) else None
            self.places[(*path, key)] = Place(
                source=self._source, line=mark.line + 1, column=mark.column + 1, text=text
            )
            found[key] = self.build(value_node, (*path, key))
        return found

    def _key(self, node: yaml.Node) -> str:
        mark = cast("yaml.Mark", node.start_mark)
        if node.tag == "tag:yaml.org,2002:merge":
            raise _at(self._source, mark, "merge keys (<<) are not supported", hint="Write the keys out.")
        if not isinstance(node, yaml.ScalarNode):
            raise _at(self._source, mark, "a key must be text")
        key = self._scalar(node)
        if not isinstance(key, str):
            message = f"a key must be text, YAML reads {shown(node.value)} as {key!r}"
            raise _at(self._source, mark, message, hint="Quote it.")
        if looks_secret(key):
            raise _at(self._source, mark, f"key {shown(key)} looks like a secret", hint=NO_SECRETS)
        return key

    def _scalar(self, node: yaml.ScalarNode) -> object:
        text, kind = cast(str, node.value), node.tag.rpartition(":")[2]
        mark = cast("yaml.Mark", node.start_mark)
        if kind == "int" and _ODD_INT.fullmatch(text):
            what = "a base-60 number" if ":" in text else "octal"
            hint = "Write it without leading zeros and colons, or quote it if it is text."
            raise _at(self._source, mark, f"YAML reads {shown(text)} as {what}", hint=hint)
        if kind not in ("null", "bool", "int", "float"):
            return text  # dates too: no field takes one, a namespace may look like one
        try:
            return cast(object, self._loader.construct_object(node))  # pyright: ignore[reportUnknownMemberType]
        except ValueError:
            raise _at(self._source, mark, f"{shown(text)} is no {kind}", hint="Quote it if it is text.") from None


def _at(source: str, mark: yaml.Mark | None, message: str, *, hint: str | None = None) -> RecipeError:
    where = f"{source}, line {mark.line + 1}, col {mark.column + 1}" if mark else source
    return RecipeError(f"{where}: {message}", hint=hint)


def _syntax_error(source: str, text: str, error: yaml.MarkedYAMLError) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    line = (text.splitlines()[mark.line :] or [""])[0] if mark else ""
    if re.match(r"\s*\t", line):
        return _at(source, mark, "tabs are not allowed for indentation", hint="Use spaces.")
    problem = ", ".join(text for text in (error.context, error.problem) if text)
    return _at(source, mark, f"not YAML: {problem}", hint="Look at this line and the one above.")
