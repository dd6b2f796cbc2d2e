"""What a checkpoint of the predecessor's would become, as far as its metadata and the sizes of its shards tell."""

from __future__ import annotations

from dataclasses import dataclass

from sm_tiered.errors import CheckpointNotFoundError, CorruptPartError
from sm_tiered.records import Attempt, CheckpointId
from sm_tiered_dcp.predecessor.metadata import Contents, read_contents
from sm_tiered_dcp.predecessor.sources import Listed, Source

__all__ = ["ATTEMPT", "Imported", "doubt_about", "look_at", "read_whole"]

ATTEMPT = Attempt(ordinal=1, utc_secs=0, nonce="1a9047ed")
"""The attempt of all that is imported: ours are numbered from 1 too, and began later than 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What came of one step."""

    checkpoint: CheckpointId
    world: int
    """How many ranks had saved it."""
    tensors: int
    values: int
    bytes: int
    """As we store it."""
    already: bool
    """Whether it was there."""
    pickled: tuple[str, ...] = ()
    """Names of values that only a pickle can load: who restores it needs ``allow_pickle: true``."""


def read_whole(source: Source, step: Listed) -> Contents:
    """Return what *step* holds, when all that it needs is there.

    Raises:
        CheckpointNotFoundError: its save never ended.
        CorruptPartError: a shard is missing, or shorter than the metadata says.
        FormatError: its metadata can't be used.
        TierError: the place did not answer or refused.
    """
    where = f"{source.title}, {step.name}"
    if not step.finished:
        raise CheckpointNotFoundError(f"{where}: its metadata is missing: the save never ended", step=step.step)
    contents = read_contents(source.metadata(step), f"the metadata of {where}")
    sizes = source.sizes(step, contents.ends.keys())
    for rank, end in sorted(contents.ends.items()):
        size = sizes.get(rank)
        if size is None:
            raise CorruptPartError(f"{where}: the shard of rank {rank} is missing", step=step.step, rank=rank)
        if size < end:
            said = f"has {size} bytes, the metadata says {end}"
            raise CorruptPartError(f"{where}: the shard of rank {rank} {said}", step=step.step, rank=rank)
    return contents


def look_at(source: Source, step: Listed) -> Imported:
    """Return what `import_step` would make of *step*, as far as its metadata and its shards' sizes tell.

    Raises:
        TieredError: as `read_whole`.
    """
    contents = read_whole(source, step)
    return Imported(
        checkpoint=CheckpointId(attempt=ATTEMPT, step=step.step),
        world=contents.world,
        tensors=len(contents.tensors),
        values=len(contents.values),
        bytes=contents.size,
        already=False,
    )


def doubt_about(step: Listed) -> str | None:
    """Return why *step*, though complete, may be of two saves; None where nothing hints at that."""
    if not step.newer:
        return None
    ranks = ", ".join(map(str, step.newer[:8]))
    return (
        f"step {step.step}: the shard of rank {ranks} was written after the metadata. Where a step was saved twice and "
        "the second save was cut, the two are mixed, and nothing in them tells"
    )
