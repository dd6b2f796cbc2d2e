"""`RetryingTier` for a tier that keeps shares."""

from __future__ import annotations

from collections.abc import Callable

from sm_tiered import layout
from sm_tiered.records import CheckpointId
from sm_tiered.tiers.shares import Share, ShareTier
from sm_tiered.tiers.wrappers import Retry, RetryingTier

__all__ = ["RetryingShareTier"]


class RetryingShareTier(RetryingTier):
    """A `ShareTier` that repeats what failed with `TierUnavailableError`; see `RetryingTier`."""

    def __init__(
        self,
        tier: ShareTier,
        *,
        attempts: int = 3,
        deadline_secs: float = 10.0,
        on_retry: Callable[[Retry], None] | None = None,
    ) -> None:
        super().__init__(tier, attempts=attempts, deadline_secs=deadline_secs, on_retry=on_retry)
        self._shares = tier

    def put_share(self, share: Share) -> None:
        """See `ShareTier.put_share`; its parts are asked for their bytes again at each try."""
        key = layout.in_dir(share.checkpoint, layout.record_name(share.rank))
        size = len(share.record) + sum(part.size for part, _ in share.parts)
        self._run("put_share", key, lambda: self._shares.put_share(share), size=2 * size)  # hashed, then sent

    def drop(self, checkpoint: CheckpointId) -> None:
        """See `ShareTier.drop`."""
        self._run("drop", layout.checkpoint_dir(checkpoint), lambda: self._shares.drop(checkpoint))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Tier.read_into`. What stands before the bytes in the share may have to be received too."""
        reach: Callable[[str], int] | None = getattr(self._shares, "reach", None)
        size = buffer.nbytes if reach is None else self._run("read_into", key, lambda: reach(key))
        self._run("read_into", key, lambda: self._shares.read_into(key, offset, buffer), size=size)
