"""A place that no tier of the recipe is: what is asked of it fails with words about that place, not about a tier."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from sm_tiered.errors import TieredError
from sm_tiered_dcp.predecessor.shards import Shard
from sm_tiered_dcp.predecessor.sources import Listed, Source

__all__ = ["Outside"]

_WORDS = {
    "Allow s3:PutObject, s3:GetObject, s3:DeleteObject and s3:AbortMultipartUpload on the prefix, and s3:ListBucket on "
    "the bucket.": "Allow s3:GetObject below that path, and s3:ListBucket on the bucket.",
    "Create the bucket, or correct the tier's `uri`.": "Correct the bucket's name in --from.",
    "Set the tier's `region` to": "Set the `region` of the recipe's S3 tier, or AWS_REGION, to",
    "the tier's `profile`": "the `profile` of the recipe's S3 tier",
    "the tier's `url`": "--from",
    ", or take this tier out of the recipe.": ", and import in one of its pods.",
}
"""What hints say of a tier, and what that is for somebody who imports."""


class Outside:
    """A `Source` that tells what *source* tells, for a place that was given by ``--from``."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def title(self) -> str:
        """See `Source.title`."""
        return self._source.title

    def listed(self) -> Sequence[Listed]:
        """See `Source.listed`."""
        with _said_of_it():
            return self._source.listed()

    def sizes(self, step: Listed) -> Mapping[int, int]:
        """See `Source.sizes`."""
        with _said_of_it():
            return self._source.sizes(step)

    def identity(self, step: Listed, ends: Mapping[int, int], *, again: bool = False) -> str:
        """See `Source.identity`."""
        with _said_of_it():
            return self._source.identity(step, ends, again=again)

    def metadata(self, step: Listed) -> bytes:
        """See `Source.metadata`."""
        with _said_of_it():
            return self._source.metadata(step)

    def shard(self, step: Listed, rank: int, *, end: int) -> AbstractContextManager[Shard]:
        """See `Source.shard`."""
        with _said_of_it():
            return _opened(self._source.shard(step, rank, end=end))

    def close(self) -> None:
        """See `Source.close`."""
        self._source.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """A shard of such a place."""

    title: str
    size: int
    compared: bool
    shard: Shard = field(repr=False)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        with _said_of_it():
            self.shard.read_into(offset, buffer)


@contextmanager
def _opened(shard: AbstractContextManager[Shard]) -> Generator[Shard, None, None]:
    # What fails between is not of this place: it may be the tier that is written to.
    with _said_of_it():
        found = shard.__enter__()
    try:
        yield _Shard(title=found.title, size=found.size, compared=found.compared, shard=found)
    finally:
        shard.__exit__(None, None, None)


@contextmanager
def _said_of_it() -> Generator[None, None, None]:
    try:
        yield
    except TieredError as error:
        error.tier = None
        for tiers, here in _WORDS.items():
            error.hint = error.hint and error.hint.replace(tiers, here)
        raise
