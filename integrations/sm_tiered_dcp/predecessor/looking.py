"""What a checkpoint of the predecessor's would become, as far as its metadata and the sizes of its shards tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sm_tiered.errors import CheckpointNotFoundError, CorruptPartError, FormatError
from sm_tiered.lineage import imported_attempt
from sm_tiered.records import CheckpointId
from sm_tiered.tiers.base import Tier
from sm_tiered_dcp.predecessor.contents import Contents
from sm_tiered_dcp.predecessor.metadata import read_contents
from sm_tiered_dcp.predecessor.receiving import Receiving
from sm_tiered_dcp.predecessor.sources import Listed, Source

__all__ = ["MISSING", "Imported", "Whole", "doubt_about", "look_at", "named", "read_whole"]

_RANKS_A_SHARD = 256
"""More than the devices of any node: a save by one rank of each node names no more ranks than that for each shard."""

MISSING = "Import an older step, or from the other place that it was saved to, S3 or the cluster's service."
"""What to do about what isn't whole."""


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
    doubts: tuple[str, ...] = ()
    """Why it may be of two saves, though it is complete, a sentence each; it was asked for all the same."""
    compared: int = 0
    """How many of its tensors and values were compared with a checksum that their save left, as they were read; not
    counted is what was there already, or was brought by an earlier try."""
    bare: int = 0
    """How many have none: nothing tells whether they are what was saved."""
    unchecked: tuple[str, ...] = ()
    """Their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A checkpoint that is complete, as far as its metadata and the sizes of its shards tell."""

    contents: Contents
    doubts: tuple[str, ...]
    """See `Imported.doubts`."""


def read_whole(source: Source, step: Listed, *, asked: bool = True) -> Whole:
    """Return what *step* holds, when all that it needs is there. *asked*: for this very step, doubts and all.

    Raises:
        CheckpointNotFoundError: its save never ended.
        CorruptPartError: a shard is missing, or shorter than the metadata says; or not *asked*, and it may be of two
            saves.
        FormatError: its metadata can't be used, or tells of ranks that can't have been.
        TierError: the place did not answer or refused.
    """
    where = f"{source.title}, {step.name}"
    if not step.finished:
        raise CheckpointNotFoundError(
            f"{where}: its metadata is missing: the save never ended", hint=MISSING, step=step.step
        )
    doubts = list(filter(None, [doubt_about(step)]))
    _check_undoubted(doubts, step, asked=asked)
    contents = read_contents(source.metadata(step), f"the metadata of {where}")
    sizes = source.sizes(step)
    for rank, end in sorted(contents.ends.items()):
        size = sizes.get(rank)
        if size is None:
            said = f"{where}: the shard of rank {rank} is missing"
            raise CorruptPartError(said, hint=MISSING, step=step.step, rank=rank)
        if size < end:
            said = f"{where}: the shard of rank {rank} has {size} bytes, the metadata says {end}"
            raise CorruptPartError(said, hint=MISSING, step=step.step, rank=rank)
    _check_world(contents, sizes, where, step)
    doubts += filter(None, [_doubt_of_more(contents, sizes, step)])
    _check_undoubted(doubts, step, asked=asked)
    return Whole(contents=contents, doubts=tuple(doubts))


def _check_world(contents: Contents, sizes: Mapping[int, int], where: str, step: Listed) -> None:
    """Every rank that is told of gets a record of ours, whether it stored something or not: that has a bound.

    Each rank of a save leaves a shard, an empty one too. But a save may be of some ranks only, one of each node even,
    and then the others have none: so not each of them must be there, only one in so many.
    """
    if contents.world <= _RANKS_A_SHARD * len(sizes):
        return
    raise FormatError(
        f"{where}: the metadata tells of {contents.world} ranks, and shards of {len(sizes)} are listed: "
        f"{_few(sorted(sizes))}; allowed are {_RANKS_A_SHARD} ranks for each shard",
        hint="No save leaves that: somebody else may write to that place. Import an older step.",
        step=step.step,
        rank=contents.world - 1,
    )


def _doubt_of_more(contents: Contents, sizes: Mapping[int, int], step: Listed) -> str | None:
    """Who stored something is in the metadata; whoever is not saved that step another time.

    Where times are known they tell whether that was later (`Listed.newer`), and what is older does no harm.
    """
    more = sorted(rank for rank, size in sizes.items() if size and rank not in contents.ends)
    if not more or step.saved_at is not None:
        return None
    return (
        f"step {step.step}: the metadata tells of shards of {len(contents.ends)} ranks, and {len(sizes)} are listed: "
        f"that of rank {_few(more)} is of another save. Where that was the later one, and was cut, the two are mixed, "
        "and nothing in them tells"
    )


def _few(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")


def named(step: int, identity: str) -> CheckpointId:
    """Return what the save of *step* that has that *identity* is called among ours."""
    return CheckpointId(attempt=imported_attempt(step, identity), step=step)


def look_at(source: Source, step: Listed, tier: Tier, *, namespace: str, asked: bool = True) -> Imported:
    """Return what `import_step` to *tier* would make of *step*, as far as its metadata and its shards' sizes tell.

    Nothing is written, and the contents of the shards are not read.

    Raises:
        KeyExistsError: another import of that step is committed on *tier*, or a tombstone of this one stands there.
        TieredError: as `read_whole`; or *tier* did not answer.
    """
    whole = read_whole(source, step, asked=asked)
    contents = whole.contents
    checkpoint = named(step.step, source.identity(step, contents.ends))
    there = Receiving(tier=tier, namespace=namespace, checkpoint=checkpoint, contents=contents)
    return Imported(
        checkpoint=checkpoint,
        world=contents.world,
        tensors=len(contents.tensors),
        values=len(contents.values),
        bytes=contents.size,
        already=there.committed() is not None,
        doubts=whole.doubts,
    )


def doubt_about(step: Listed) -> str | None:
    """Return why *step*, though complete, may be of two saves; None where nothing hints at that.

    The cluster's service tells no times, so there it is always None: of a step that was saved twice, the second save
    cut, the shards may be of both, each whole by its own checksum.
    """
    if not step.newer:
        return None
    return (
        f"step {step.step}: the shard of rank {_few(step.newer)} was written after the metadata. Where a step was "
        "saved twice and the second save was cut, the two are mixed, and nothing in them tells"
    )


def _check_undoubted(doubts: Sequence[str], step: Listed, *, asked: bool) -> None:
    """Refuse *step* where something hints that it is of two saves, for those who did not ask for this very step."""
    if doubts and not asked:
        raise CorruptPartError(
            "; ".join(doubts),
            hint=f"Asked for by its number, it is taken all the same: --step {step.step}, or step={step.step} on the "
            "fly.",
            step=step.step,
        )
