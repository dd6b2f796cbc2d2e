"""What verifying a checkpoint found, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sm_tiered.records import CheckpointId

__all__ = ["Problem", "Report", "State"]


class State(Enum):
    """What verifying found."""

    WHOLE = "whole"
    PARTIAL = "partial"
    """In memory: what is here is right; other ranks' shares are on other nodes, still being written, or failed."""
    UNCOMMITTED = "uncommitted"
    """Nothing says that it is a checkpoint: a save is under way, or was given up."""
    DELETED = "deleted"
    CHANGING = "changing"
    """It did not hold still for as long as reading it takes."""
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong, and where."""

    tier: str
    checkpoint: CheckpointId
    what: str
    rank: int | None = None
    part: str | None = None
    """Name of the file."""
    chunk: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What verifying one checkpoint on one tier found."""

    tier: str
    checkpoint: CheckpointId
    state: State
    note: str | None = None
    """Why it is neither whole nor damaged."""
    problems: tuple[Problem, ...] = ()
    parts: int = 0
    """How many were looked at."""
    chunks: int = 0
    """How many were read."""
    bytes_read: int = 0
    rereads: int = 0
    """Chunks that were wrong once and right the second time: the way to them is bad, not they."""
