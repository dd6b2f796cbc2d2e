"""What a checkpoint of the predecessor's would become, as far as its metadata and the sizes of its shards tell."""

from __future__ import annotations

from dataclasses import dataclass

from sm_tiered.errors import CheckpointNotFoundError, CorruptPartError
from sm_tiered.lineage import imported_attempt
from sm_tiered.records import CheckpointId
from sm_tiered.tiers.base import Tier
from sm_tiered_dcp.predecessor.metadata import Contents, read_contents
from sm_tiered_dcp.predecessor.receiving import Receiving
from sm_tiered_dcp.predecessor.sources import Listed, Source

__all__ = ["Imported", "check_undoubted", "doubt_about", "look_at", "named", "read_whole"]


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


def named(step: int, identity: str) -> CheckpointId:
    """Return what the save of *step* that has that *identity* is called among ours."""
    return CheckpointId(attempt=imported_attempt(step, identity), step=step)


def look_at(source: Source, step: Listed, tier: Tier, *, namespace: str) -> Imported:
    """Return what `import_step` to *tier* would make of *step*, as far as its metadata and its shards' sizes tell.

    Nothing is written, and the contents of the shards are not read.

    Raises:
        KeyExistsError: another import of that step is committed on *tier*, or a tombstone of this one stands there.
        TieredError: as `read_whole`; or *tier* did not answer.
    """
    contents = read_whole(source, step)
    checkpoint = named(step.step, source.identity(step, contents.ends))
    there = Receiving(tier=tier, namespace=namespace, checkpoint=checkpoint, contents=contents)
    return Imported(
        checkpoint=checkpoint,
        world=contents.world,
        tensors=len(contents.tensors),
        values=len(contents.values),
        bytes=contents.size,
        already=there.committed() is not None,
    )


def doubt_about(step: Listed) -> str | None:
    """Return why *step*, though complete, may be of two saves; None where nothing hints at that.

    The cluster's service tells no times, so there it is always None: of a step that was saved twice, the second save
    cut, the shards may be of both, each whole by its own checksum.
    """
    if not step.newer:
        return None
    ranks = ", ".join(map(str, step.newer[:8])) + (", …" if len(step.newer) > 8 else "")
    return (
        f"step {step.step}: the shard of rank {ranks} was written after the metadata. Where a step was saved twice and "
        "the second save was cut, the two are mixed, and nothing in them tells"
    )


def check_undoubted(step: Listed) -> None:
    """Refuse *step* where something hints that it is of two saves: for those who did not ask for this very step.

    Raises:
        CorruptPartError: `doubt_about` tells of it.
    """
    doubt = doubt_about(step)
    if doubt is not None:
        raise CorruptPartError(doubt, hint="Asked for by its number, it is taken all the same.")
