"""Every error that sm_tiered raises, as one tree.

::

    TieredError
    ├── ConfigError (ValueError)                  a setting can't be used
    │   ├── RecipeError                           ... and it stands in a recipe
    │   └── PolicyError                           ... and it belongs to a policy
    ├── SaveError                                 a save did not happen, or not everywhere
    │   ├── StructureError                        what was given can't be one checkpoint
    │   ├── UnsafeValueError                      a value that only a pickle could store
    │   ├── SaveSkippedError                      no room, or a newer save took its place
    │   └── RankFailedError                       another rank failed; this one is well
    ├── RestoreError                              nothing was loaded
    │   ├── CheckpointNotFoundError (FileNotFoundError)   the step asked for is not there
    │   ├── NothingRestorableError                checkpoints exist and none is whole
    │   ├── MismatchError                         the state and the checkpoint do not fit
    │   └── RestoreIncompleteError                bytes were placed: the state must not be used
    ├── TierError                                 one tier could not do what it was asked
    │   ├── TierUnavailableError                  throttled, restarting, unreachable: worth a retry
    │   ├── TierRefusedError (PermissionError)    a retry would change nothing
    │   ├── TierFullError                         no room
    │   ├── KeyNotFoundError (FileNotFoundError)
    │   ├── KeyExistsError (FileExistsError)      put-if-absent came second
    │   └── CorruptPartError                      bytes differ from their digest: use another tier
    ├── FormatError                               not a record or manifest, or a newer one
    ├── NamespaceInUseError                       another job's trainers are alive here
    └── DeadlineExceededError (TimeoutError)

Whether a failure is worth a retry is its type, never its text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

__all__ = [
    "CheckpointNotFoundError",
    "ConfigError",
    "CorruptPartError",
    "DeadlineExceededError",
    "FormatError",
    "KeyExistsError",
    "KeyNotFoundError",
    "MismatchError",
    "NamespaceInUseError",
    "NothingRestorableError",
    "PolicyError",
    "RankFailedError",
    "RecipeError",
    "RestoreError",
    "RestoreIncompleteError",
    "SaveError",
    "SaveSkippedError",
    "StructureError",
    "TierError",
    "TierFullError",
    "TierRefusedError",
    "TierUnavailableError",
    "TieredError",
    "UnsafeValueError",
    "error_from_json",
    "error_to_json",
    "typed",
]


class TieredError(Exception):
    """The root. *hint* says what to do next; the other facts are None where they do not apply."""

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        step: int | None = None,
        tier: str | None = None,
        rank: int | None = None,
        key: str | None = None,
    ) -> None:
        self.message, self.hint = message, hint
        self.step, self.tier, self.rank, self.key = step, tier, rank, key
        super().__init__(message)

    def facts(self) -> dict[str, int | str]:
        """Where it happened: those of step, tier, rank and key that are known."""
        found = {"step": self.step, "tier": self.tier, "rank": self.rank, "key": self.key}
        return {name: value for name, value in found.items() if value is not None}

    def __str__(self) -> str:
        where = ", ".join(f"{name} {value}" for name, value in self.facts().items())
        text = self.message + (f" ({where})" if where else "")
        return f"{text}. {self.hint}" if self.hint else text


class ConfigError(TieredError, ValueError):
    """A setting can't be used."""


class RecipeError(ConfigError):
    """A recipe can't be used; the message names the place inside it."""


class PolicyError(ConfigError):
    """A policy can't be used, or failed while it was asked."""


class SaveError(TieredError):
    """A save did not happen, or not on every tier it was due for."""


class StructureError(SaveError):
    """What was given can't be one checkpoint: ranks disagree, a name stands twice, nothing to save."""


class UnsafeValueError(SaveError):
    """A value that only a pickle could store."""


class SaveSkippedError(SaveError):
    """The save was left out on all ranks alike: no room, or a newer one took its place."""


class RankFailedError(SaveError):
    """Another rank failed; *rank* is the one."""


class RestoreError(TieredError):
    """Nothing was loaded; the state is as it was."""


class CheckpointNotFoundError(RestoreError, FileNotFoundError):
    """The step asked for is on no tier."""


class NothingRestorableError(RestoreError):
    """Checkpoints exist, and none of them is whole and reachable for every rank."""


class MismatchError(RestoreError):
    """The state and the checkpoint do not fit: names, shapes, dtypes, world size."""


class RestoreIncompleteError(RestoreError):
    """Bytes were placed and no candidate is left: the state must not be used."""


class TierError(TieredError):
    """One tier could not do what it was asked."""


class TierUnavailableError(TierError):
    """Throttled, restarting or unreachable: worth a retry."""


class TierRefusedError(TierError, PermissionError):
    """No permission, a foreign owner, an open mode, a wrong kind of file: a retry changes nothing."""


class TierFullError(TierError):
    """No room on the tier."""


class KeyNotFoundError(TierError, FileNotFoundError):
    """Nothing stands under that key."""


class KeyExistsError(TierError, FileExistsError):
    """A conditional put came second: something else stands under that key."""


class CorruptPartError(TierError):
    """Bytes differ from their digest. Never retried on the same copy: use another tier."""


class FormatError(TieredError):
    """Not a record or a manifest, or one of a newer release."""


class NamespaceInUseError(TieredError):
    """Trainers of another attempt are alive in this memory directory; *pids* are theirs."""

    def __init__(self, message: str, *, pids: tuple[int, ...] = (), hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.pids = pids


class DeadlineExceededError(TieredError, TimeoutError):
    """It was not done in time. It may still be done later."""


def typed(error: Exception) -> TieredError:
    """Return *error* as one of the tree."""
    if isinstance(error, TieredError):
        return error
    made = SaveError(f"{type(error).__name__}: {error}"[:500])
    made.__cause__ = error
    return made


def error_to_json(error: BaseException) -> dict[str, object]:
    """Return *error* as plain values, for other processes."""
    if isinstance(error, TieredError):
        pids = {"pids": list(error.pids)} if isinstance(error, NamespaceInUseError) else {}
        return {"kind": type(error).__name__, "message": error.message, "hint": error.hint, **error.facts(), **pids}
    return {"kind": "TieredError", "message": f"{type(error).__name__}: {error}"[:500]}


def error_from_json(facts: Mapping[str, object]) -> TieredError:
    """Return the error that `error_to_json` described; an unknown kind becomes a TieredError."""
    kind = globals().get(str(facts.get("kind")))
    known = kind if isinstance(kind, type) and issubclass(kind, TieredError) else TieredError
    hint, step, tier = facts.get("hint"), facts.get("step"), facts.get("tier")
    rank, key = facts.get("rank"), facts.get("key")
    error = known.__new__(known)
    TieredError.__init__(
        error,
        str(facts.get("message", "")),
        hint=hint if isinstance(hint, str) else None,
        step=step if isinstance(step, int) else None,
        tier=tier if isinstance(tier, str) else None,
        rank=rank if isinstance(rank, int) else None,
        key=key if isinstance(key, str) else None,
    )
    if isinstance(error, NamespaceInUseError):
        pids = facts.get("pids")
        error.pids = tuple(pid for pid in cast("list[object]", pids) if isinstance(pid, int)) if pids else ()
    return error
