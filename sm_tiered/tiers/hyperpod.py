"""The in-memory checkpoint service of a SageMaker HyperPod cluster as a tier of shares.

It keeps one blob for each namespace, rank and step, and nothing else: no listing by name, no ranges, no conditions.
What a directory would hold (records, parts, records of attempts) is shown out of the shares. A checkpoint is committed
once all of them stand there; a manifest, written to a slot of its own then, spares those who ask the look at each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from secrets import randbelow, token_bytes

from sm_tiered import layout
from sm_tiered.errors import KeyNotFoundError, TierRefusedError
from sm_tiered.manifest import MAX_BYTES
from sm_tiered.records import Attempt, CheckpointId
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.base import Blob, Chunks, Entry
from sm_tiered.tiers.hyperpod_commits import Commits
from sm_tiered.tiers.hyperpod_index import Index
from sm_tiered.tiers.hyperpod_looks import asking_once
from sm_tiered.tiers.hyperpod_read import ShareReader
from sm_tiered.tiers.hyperpod_service import HyperPodService, Namespace, Slot
from sm_tiered.tiers.hyperpod_view import View
from sm_tiered.tiers.hyperpod_whole import Whole
from sm_tiered.tiers.hyperpod_write import Writer
from sm_tiered.tiers.shares import Share

__all__ = ["HyperPodTier"]


class HyperPodTier:
    """A `ShareTier`. It repeats nothing itself: wrap it in `RetryingShareTier`."""

    def __init__(self, settings: HyperPodSettings, namespace: str) -> None:
        self._settings, self._namespace = settings, layout.check_namespace(namespace)
        self._service = HyperPodService(settings)
        self._index = Index(self._service, settings, self._namespace)
        self._reader = ShareReader(self._service, settings)
        commits = Commits(self._service, self._index)
        self._whole = Whole(self._index, commits, settings, self._namespace)
        self._writer = Writer(self._service, self._index, commits, self._whole, settings, self._namespace)
        self._view = View(self._index, self._whole, self._reader, tier=settings.name)

    @property
    def name(self) -> str:
        """What the recipe calls it."""
        return self._settings.name

    def list(self, prefix: str) -> list[Entry]:
        """See `Tier.list`; times are those of who sent a share, by its clock."""
        self._reader.let_go()
        return self._view.list(prefix)

    def list_dirs(self, prefix: str) -> Sequence[str]:
        """See `Tier.list_dirs`."""
        self._reader.let_go()
        return self._view.list_dirs(prefix)

    def get(self, key: str, *, max_bytes: int = MAX_BYTES) -> Blob:
        """See `Tier.get`. It also raises `CorruptPartError` where a share that *key* comes from is damaged."""
        return self._view.get(key, max_bytes=max_bytes)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Tier.read_into`. The service has no ranges: reading in order is what it is good at."""
        self._view.read_into(key, offset, buffer)

    def reach(self, key: str) -> int:
        """Return how many bytes may have to be received to read under *key*."""
        return self._view.reach(key)

    def looks(self, key: str) -> int:
        """Return how many shares a call on *key*, or on all keys, may have to look at."""
        return self._index.most_looks(one=layout.parse_checkpoint_dir(key.partition("/")[0]) is not None)

    def put_share(self, share: Share) -> None:
        """See `ShareTier.put_share`. Shares of older checkpoints that were never whole make room for it."""
        self._reader.let_go()
        self._writer.put_share(share)

    def confirm(self, checkpoint: CheckpointId, *, tell: bool = True) -> bool:
        """See `ShareTier.confirm`."""
        self._reader.let_go()
        return self._whole.confirm(checkpoint, tell=tell)

    def let_go(self) -> None:
        """See `ShareTier.let_go`."""
        self._reader.let_go()

    def asking_once(self) -> AbstractContextManager[None]:
        """See `ShareTier.asking_once`."""
        return asking_once()

    def drop(self, checkpoint: CheckpointId) -> None:
        """See `ShareTier.drop`."""
        self._reader.let_go()
        self._writer.drop(checkpoint)

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Write the record of an attempt, or that of a rank that failed; see `Tier.put_if_absent`."""
        attempt = self._attempt_of(key)
        if attempt is not None:
            self._writer.attempts.put(key, attempt, data)
            return
        try:
            checkpoint, name = self._view.split(key)
        except KeyNotFoundError:
            raise self._refusal("put_if_absent", key) from None
        rank = layout.parse_record_name(name)
        if rank is None:
            raise self._refusal("put_if_absent", key)
        self._writer.put_record(key, checkpoint, rank, data)

    def put(self, key: str, data: bytes) -> None:
        """Refuse: see `ShareTier`."""
        raise self._refusal("put", key)

    def replace(self, key: str, data: bytes, *, version: str) -> None:
        """Refuse: see `ShareTier`."""
        raise self._refusal("replace", key)

    def put_part(self, key: str, chunks: Chunks, size: int) -> None:
        """Refuse: see `ShareTier`."""
        raise self._refusal("put_part", key)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete records of attempts: where no share tells of one, it is forgotten. Everything else is refused."""
        doomed = [(key, self._attempt_of(key)) for key in keys]
        for key, attempt in doomed:
            if attempt is None:
                raise self._refusal("delete", key)
        for _, attempt in doomed:
            if attempt is not None:
                self._writer.attempts.delete(attempt)

    def _attempt_of(self, key: str) -> Attempt | None:
        return layout.parse_attempt_key(key) if key.startswith(f"{layout.ATTEMPTS}/") else None

    def _refusal(self, what: str, key: str) -> TierRefusedError:
        hint = "It takes shares, records of attempts and records of ranks that failed; shares are dropped as a whole."
        return TierRefusedError(f"{what} {key[:200]}: this tier can't", hint=hint, tier=self.name, key=key[:200])

    def probe(self) -> None:
        """Write a small blob to a namespace of its own, read it back, and delete both.

        Raises:
            TierUnavailableError: nothing answers: tiered storage may not be enabled on the cluster.
            TierRefusedError: something else answers, or gives back other bytes.
        """
        namespace = Namespace(name=f"sm-tiered-probe-{token_bytes(8).hex()}", ranks=2, kept=self._settings.slots)
        self._service.create(namespace.name, ranks=namespace.ranks, kept=namespace.kept)
        try:
            self._probe(namespace, Slot(namespace=namespace.name, rank=0, wire=randbelow(1000)))
        finally:
            self._service.remove(namespace.name)

    def _probe(self, namespace: Namespace, slot: Slot) -> None:
        data = token_bytes(1024)
        self._service.put_small(slot, data)
        body = self._service.open(slot)
        try:
            found = body.take(len(data) + 1)
        finally:
            body.close()
        if found != data or self._service.latest(namespace) != [slot.wire]:
            message = f"{self._settings.url} gives back something else than was written, or does not list it"
            raise TierRefusedError(message, hint="The tier's `url` must be the checkpoint service.", tier=self.name)
        self._service.delete(slot)

    def close(self) -> None:
        """Free connections and temporary files; a later call makes new ones."""
        self._reader.close()
        self._service.close()
