"""Where the predecessor puts things: its keys in S3, in two layouts, and its slots in the cluster's service.

By default ``{base}/{namespace}/rank_{R}/step_{N}/checkpoint.pt``, inside Ray ``{base}/{namespace}/step_{N}/rank_{R}/``.
The metadata, ``metadata.metadata``, stands beside the shard of the rank that coordinated the save, which is rank 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sm_tiered import layout

__all__ = ["METADATA", "SHARD", "Place", "is_rank_dir", "is_step_dir", "metadata_slot", "parse_key"]

SHARD = "checkpoint.pt"
METADATA = "metadata.metadata"

_NUMBER = r"(0|[1-9]\d{0,9})"
_RANK_DIR = re.compile(rf"rank_{_NUMBER}", re.ASCII)
_STEP_DIR = re.compile(rf"step_{_NUMBER}", re.ASCII)
_BY_RANK = re.compile(rf"rank_{_NUMBER}/step_{_NUMBER}/(checkpoint\.pt|metadata\.metadata)", re.ASCII)
_BY_STEP = re.compile(rf"step_{_NUMBER}/rank_{_NUMBER}/(checkpoint\.pt|metadata\.metadata)", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Place:
    """One file of the predecessor's, by what its key says."""

    step: int
    by_step: bool
    """Whether it is of the layout that Ray is given: steps first, then ranks."""
    rank: int
    name: str
    """`SHARD` or `METADATA`."""


def is_rank_dir(name: str) -> bool:
    """Whether *name*, directly below the namespace, is a rank's directory of the default layout."""
    return _RANK_DIR.fullmatch(name) is not None


def is_step_dir(name: str) -> bool:
    """Whether *name*, directly below the namespace, is a step's directory of the layout for Ray."""
    return _STEP_DIR.fullmatch(name) is not None


def parse_key(key: str) -> Place | None:
    """Return what *key*, relative to the namespace, says; None when the predecessor makes no such key."""
    found = _BY_RANK.fullmatch(key)
    if found:
        rank, step, by_step = int(found[1]), int(found[2]), False
    else:
        found = _BY_STEP.fullmatch(key)
        if not found:
            return None
        step, rank, by_step = int(found[1]), int(found[2]), True
    if rank >= layout.MAX_WORLD or step >= layout.MAX_STEP:
        return None
    return Place(step=step, by_step=by_step, rank=rank, name=found[3])


def metadata_slot(num_ranks: int) -> int:
    """Return the slot of the cluster's service that holds the metadata, in a namespace of *num_ranks* slots.

    One slot more than there were ranks when the namespace was made; a rank's shard is in the slot of its number.
    """
    return num_ranks - 1
