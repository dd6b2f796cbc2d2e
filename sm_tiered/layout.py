"""Names and keys: the only file that knows what a key looks like.

Every name that comes from outside (a listing, a record, a user) is parsed here before it may build a path::

    <root>/<namespace>/
        step_<10 digits>-a<6 digits>-<UTC seconds>-<8 hex>/
            __<rank>_<n>.distcp  __<rank>_<n>.ckpt  record-<5 digits>.json  .metadata  index.json  manifest.json
            model.safetensors  rank_00001/loader.bin …  files-<5 digits>.json    what another program named
        attempts/<attempt>.json  pins/  request.json
        events/rank-<5 digits>-<UTC seconds>-<8 hex>.jsonl  drainer-<UTC seconds>-<8 hex>.jsonl  (.1, .2 …: older lines)
        .arena/  .queue/  .locks/  .restored/  .staging/       memory tier only
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import NamedTuple

from sm_tiered.errors import ConfigError, FormatError
from sm_tiered.records import Attempt, CheckpointId

__all__ = [
    "ARENA",
    "ATTEMPTS",
    "EVENTS",
    "INDEX",
    "LOCKS",
    "MANIFEST",
    "MAX_STEP",
    "MAX_WORLD",
    "METADATA",
    "PINS",
    "QUEUE",
    "REQUEST",
    "RESTORED",
    "STAGING",
    "EventFile",
    "PartName",
    "ack_counter",
    "attempt_key",
    "check_namespace",
    "check_part_name",
    "check_step",
    "checkpoint_dir",
    "event_file_name",
    "file_list_name",
    "in_dir",
    "is_named",
    "own_name",
    "parse_attempt",
    "parse_attempt_key",
    "parse_checkpoint_dir",
    "parse_event_file_name",
    "parse_file_list_name",
    "parse_own_name",
    "parse_part_name",
    "parse_pin_key",
    "parse_record_name",
    "part_name",
    "pin_key",
    "rank_of_key",
    "record_name",
]

MAX_STEP = 10**10
"""Steps are below this."""

MAX_WORLD = 10**5
"""Ranks are below this."""

MANIFEST = "manifest.json"
METADATA = ".metadata"
INDEX = "index.json"
ATTEMPTS = "attempts"
CONDITIONS = "conditions"
"""What a durable tier is tried with before an attempt's first commit; its content means nothing."""
EVENTS = "events"
PINS = "pins"
RESTORED = ".restored"
STAGING = ".staging"
"""These two: files of another program on their way out and in."""
ARENA = ".arena"
QUEUE = ".queue"
REQUEST = "request.json"
"""Asks a running job for a save."""
LOCKS = ".locks"

_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", re.ASCII)
_ATTEMPT = re.compile(r"a(\d{6})-(\d{1,12})-([0-9a-f]{8})", re.ASCII)
_CHECKPOINT = re.compile(r"step_(\d{10})-(a\d{6}-\d{1,12}-[0-9a-f]{8})", re.ASCII)
_RECORD = re.compile(r"record-(\d{5})\.json", re.ASCII)
_FILE_LIST = re.compile(r"files-(\d{5})\.json", re.ASCII)
_STOCK_PART = re.compile(r"__(\d{1,6})_(\d{1,6})\.(distcp|ckpt)", re.ASCII)
_ARENA_FILE = re.compile(r"(\d{1,6})-[0-9a-f]{8}", re.ASCII)
_OWN = re.compile(r"rank_(\d{5})/(.+)", re.ASCII | re.DOTALL)
_EVENT_FILE = re.compile(
    r"(?:rank-(\d{5})|drainer)(?:-(\d{1,12})-([0-9a-f]{8}))?\.jsonl(?:\.([1-9]\d{0,5}))?", re.ASCII
)
_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}"
_PART = re.compile(rf"(?:{_SEGMENT}/){{0,8}}(?:{_SEGMENT}|\.metadata)", re.ASCII)
_RESERVED = (MANIFEST, INDEX, METADATA)


def check_namespace(value: object) -> str:
    """Return *value* when it can be a namespace.

    Raises:
        ConfigError: otherwise; the message names the first character that is not allowed.
    """
    rule = "use 1 to 128 of A-Z a-z 0-9 _ -, beginning with a letter or digit, e.g. 'llama-7b-run3'"
    if not isinstance(value, str):
        raise ConfigError(f"namespace must be str, got {type(value).__name__} {value!r}", hint=rule)
    if not value:
        raise ConfigError("namespace is empty", hint=rule)
    if len(value) > 128:
        raise ConfigError(f"namespace is too long: {len(value)} > 128 characters ({value[:40]!r}…)", hint=rule)
    if not _NAMESPACE.fullmatch(value):
        bad = next((i for i, c in enumerate(value) if not re.match(r"[A-Za-z0-9_-]", c, re.ASCII)), 0)
        raise ConfigError(f"namespace {value!r} has an illegal character {value[bad]!r} at {bad}", hint=rule)
    return value


def check_step(value: object, *, name: str = "step") -> int:
    """Return *value* as a step: an int (a 0-dim integer tensor or NumPy integer counts), ``0 <= step < 10**10``.

    Raises:
        ConfigError: otherwise.
    """
    step = value
    if not isinstance(value, (int, float, str, bytes)) and hasattr(value, "__index__"):
        # A tensor or an array has it whether or not it is one integer; a bool is none.
        with suppress(TypeError):
            step = value if "bool" in str(getattr(value, "dtype", "")) else value.__index__()  # type: ignore[operator]
    if isinstance(step, bool) or not isinstance(step, int):
        hint = f"Did you mean {step}?" if isinstance(step, str) and step.isdigit() else "Pass the training counter."
        shown = " ".join(repr(value).split())[:80]
        raise ConfigError(f"{name} must be an int, got {type(value).__name__} {shown}", hint=hint)
    if not 0 <= step < MAX_STEP:
        raise ConfigError(f"{name} {step} is out of range", hint="Allowed: 0 <= step < 10**10; None means latest.")
    return step


def check_part_name(value: str) -> str:
    """Return *value* when it can be the name of a part: a relative path, hidden nowhere but as DCP's ``.metadata``.

    Raises:
        FormatError: otherwise.
    """
    if not _PART.fullmatch(value) or value in _RESERVED or _RECORD.fullmatch(value) or _FILE_LIST.fullmatch(value):
        raise FormatError(
            f"{value[:240]!r} can't be the name of a part",
            hint="Use A-Z a-z 0-9 _ . - in up to 9 segments of 200 characters, none beginning with a dot.",
        )
    return value


def is_named(part: str) -> bool:
    """Whether *part* bears a name that another program gave it, and that does not tell whose it is."""
    return _STOCK_PART.fullmatch(part) is None


class PartName(NamedTuple):
    """What the name of a stock part says."""

    rank: int
    number: int
    kind: str
    """``distcp``: DCP's own format; ``ckpt``: one ``torch.save`` file."""


def part_name(rank: int, index: int, kind: str = "distcp") -> str:
    """Return the name of the *index*-th stock part of *rank*."""
    return f"__{rank}_{index}.{kind}"


def parse_part_name(name: str) -> PartName | None:
    """Return what *name* says, or None when it is none that `part_name` gives."""
    found = _STOCK_PART.fullmatch(name)
    return PartName(int(found[1]), int(found[2]), found[3]) if found else None


def record_name(rank: int) -> str:
    """Return the name of the record of *rank*."""
    return f"record-{rank:05d}.json"


def parse_record_name(name: str) -> int | None:
    """Return the rank that *name* is the record of, or None when it is no record."""
    found = _RECORD.fullmatch(name)
    return int(found[1]) if found else None


def own_name(rank: int, name: str) -> str:
    """Return the name of the part that is *rank*'s own of what all ranks call *name*; rank 0's has the plain name."""
    return f"rank_{rank:05d}/{name}" if rank else name


def parse_own_name(part: str) -> tuple[int, str] | None:
    """Return the rank and the name that `own_name` made *part* of, or None when it is none."""
    found = _OWN.fullmatch(part)
    return (int(found[1]), found[2]) if found else None


def file_list_name(rank: int) -> str:
    """Return the name of the list of what *rank* writes under names that do not tell."""
    return f"files-{rank:05d}.json"


def parse_file_list_name(name: str) -> int | None:
    """Return the rank whose file list *name* is, or None when it is none."""
    found = _FILE_LIST.fullmatch(name)
    return int(found[1]) if found else None


class EventFile(NamedTuple):
    """What the name of a file of events says."""

    rank: int | None
    """None: the drainer's."""
    utc_secs: int
    """When it was begun, by its node's clock; 0 in names of releases that had one file for all launches."""
    nonce: str
    """8 hex digits: of the launch, or the drainer's own; empty in such names."""
    piece: int = 0
    """Above 0: full, and put aside; the lines of a higher one are newer, and those of 0 the newest."""

    @property
    def stem(self) -> str:
        """What all pieces of one file share."""
        return event_file_name(self._replace(piece=0)).removesuffix(".jsonl")


def event_file_name(file: EventFile) -> str:
    """Return the name of a file of events: those of a rank, or of drainers, in the order in which they were begun."""
    whose = "drainer" if file.rank is None else f"rank-{file.rank:05d}"
    begun = f"-{file.utc_secs:010d}-{file.nonce}" if file.nonce else ""
    return f"{whose}{begun}.jsonl" + (f".{file.piece}" if file.piece else "")


def parse_event_file_name(name: str) -> EventFile | None:
    """Return what *name* says, or None when it is none of ours."""
    found = _EVENT_FILE.fullmatch(name)
    if found is None:
        return None
    rank = int(found[1]) if found[1] else None
    return EventFile(rank, int(found[2] or 0), found[3] or "", int(found[4] or 0))


def checkpoint_dir(checkpoint: CheckpointId) -> str:
    """Return the directory of *checkpoint*, relative to the namespace."""
    return f"step_{checkpoint.step:010d}-{checkpoint.attempt}"


def in_dir(checkpoint: CheckpointId, name: str) -> str:
    """Return the key of the file *name* of *checkpoint*, relative to the namespace."""
    return f"{checkpoint_dir(checkpoint)}/{name}"


def ack_counter(checkpoint: CheckpointId) -> str:
    """Return the name of the counter of *checkpoint* in the job's store."""
    return f"ack/{checkpoint_dir(checkpoint)}"


def parse_checkpoint_dir(name: str) -> CheckpointId | None:
    """Return the checkpoint whose directory is called *name*, or None when it is none of ours."""
    found = _CHECKPOINT.fullmatch(name.rstrip("/"))
    if not found:
        return None
    return CheckpointId(attempt=parse_attempt(found[2]), step=int(found[1]))


def rank_of_key(key: str) -> int | None:
    """Return the rank whose arena file, stock part, record or file list stands under *key*; None: it does not tell.

    What stands in a directory of its own has a name that does not tell.
    """
    head, _, name = key.rpartition("/")
    if "/" in head:
        return None
    for form in (_STOCK_PART, _RECORD, _FILE_LIST, _ARENA_FILE):
        found = form.fullmatch(name)
        if found:
            return int(found[1])
    return None


def parse_attempt(text: str) -> Attempt:
    """Return the attempt that *text* names.

    Raises:
        FormatError: *text* names none.
    """
    found = _ATTEMPT.fullmatch(text)
    if not found:
        raise FormatError(f"{text[:80]!r} is no attempt: a<6 digits>-<UTC seconds>-<8 hex> was expected")
    return Attempt(ordinal=int(found[1]), utc_secs=int(found[2]), nonce=found[3])


def attempt_key(attempt: Attempt) -> str:
    """Return the key of the attempt's own record, relative to the namespace."""
    return f"{ATTEMPTS}/{attempt}.json"


def parse_attempt_key(key: str) -> Attempt | None:
    """Return the attempt whose record stands under *key*, or None when it is none of ours."""
    name = key.removeprefix(f"{ATTEMPTS}/").removesuffix(".json")
    return parse_attempt(name) if _ATTEMPT.fullmatch(name) else None


def pin_key(checkpoint: CheckpointId) -> str:
    """Return the key whose presence keeps *checkpoint* from being given up, relative to the namespace."""
    return f"{PINS}/{checkpoint_dir(checkpoint)}.json"


def parse_pin_key(key: str) -> CheckpointId | None:
    """Return the checkpoint that *key* pins, or None when it is no pin of ours."""
    return parse_checkpoint_dir(key.removeprefix(f"{PINS}/").removesuffix(".json"))
