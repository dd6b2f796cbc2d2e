"""`RetryingTier` for a tier that keeps shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from sm_tiered import layout
from sm_tiered.manifest import MAX_BYTES
from sm_tiered.records import CheckpointId
from sm_tiered.tiers.base import Blob, Entry
from sm_tiered.tiers.hyperpod_looks import LOOK_BYTES
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

    def list(self, prefix: str) -> list[Entry]:
        """See `Tier.list`."""
        return self._run("list", prefix, lambda: self._shares.list(prefix), size=self._looks("list", prefix))

    def list_dirs(self, prefix: str) -> Sequence[str]:
        """See `Tier.list_dirs`."""
        return self._run(
            "list_dirs", prefix, lambda: self._shares.list_dirs(prefix), size=self._looks("list_dirs", prefix)
        )

    def get(self, key: str, *, max_bytes: int = MAX_BYTES) -> Blob:
        """See `Tier.get`."""
        size = self._looks("get", key)
        return self._run("get", key, lambda: self._shares.get(key, max_bytes=max_bytes), size=size)

    def put_share(self, share: Share) -> None:
        """See `ShareTier.put_share`; its parts are asked for their bytes again at each try."""
        key = layout.in_dir(share.checkpoint, layout.record_name(share.rank))
        size = 2 * (len(share.record) + sum(part.size for part, _ in share.parts))  # hashed, then sent
        looks = self._looks("put_share", "")  # to know what may make room for it
        self._run("put_share", key, lambda: self._shares.put_share(share), size=size + looks)

    def confirm(self, checkpoint: CheckpointId, *, tell: bool = True) -> bool:
        """See `ShareTier.confirm`."""
        key = layout.checkpoint_dir(checkpoint)
        size = self._looks("confirm", key)
        return self._run("confirm", key, lambda: self._shares.confirm(checkpoint, tell=tell), size=size)

    def let_go(self) -> None:
        """See `ShareTier.let_go`."""
        self._shares.let_go()

    def asking_once(self) -> AbstractContextManager[None]:
        """See `ShareTier.asking_once`."""
        return self._shares.asking_once()

    def drop(self, checkpoint: CheckpointId) -> None:
        """See `ShareTier.drop`."""
        key = layout.checkpoint_dir(checkpoint)
        # Each is looked at, looked at once more, and deleted.
        self._run("drop", key, lambda: self._shares.drop(checkpoint), size=3 * self._looks("drop", key))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Tier.read_into`. What stands before the bytes in the share may have to be received too."""
        looks = self._looks("read_into", key)
        reach: Callable[[str], int] | None = getattr(self._shares, "reach", None)
        size = buffer.nbytes if reach is None else self._run("read_into", key, lambda: reach(key), size=looks)
        self._run("read_into", key, lambda: self._shares.read_into(key, offset, buffer), size=size + looks)

    def _looks(self, operation: str, key: str) -> int:
        """Return how many bytes the looks count as that a call on *key*, or on all keys, may take."""
        looks: Callable[[str], int] | None = getattr(self._shares, "looks", None)
        return 0 if looks is None else LOOK_BYTES * self._run(operation, key, lambda: looks(key))
