"""Which checkpoints on the HyperPod service are whole: the shares of all ranks, and the manifest that follows.

Where a manifest stands by itself it is asked for first, which is one small look instead of one at each share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from sm_tiered import layout
from sm_tiered.errors import CorruptPartError, FormatError, KeyNotFoundError
from sm_tiered.manifest import compose_manifest, manifest_to_json, record_from_json
from sm_tiered.records import CheckpointId
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.hyperpod_commits import Commits
from sm_tiered.tiers.hyperpod_index import Index
from sm_tiered.tiers.hyperpod_looks import each
from sm_tiered.tiers.hyperpod_shares import Head
from sm_tiered.tiers.hyperpod_slots import Found

__all__ = ["Whole"]


class Whole:
    """Puts together what *index* finds. Threads may share it."""

    def __init__(self, index: Index, commits: Commits, settings: HyperPodSettings, namespace: str) -> None:
        self._commits = commits
        self._index, self._settings, self._namespace = index, settings, namespace
        self._manifests: dict[CheckpointId, tuple[list[str], bytes]] = {}

    def shares(self, checkpoint: CheckpointId) -> list[Found]:
        """Return the shares that stand, damaged ones too, by rank."""
        zero = self._index.find(checkpoint, 0)
        if not self._index.stands(checkpoint):
            return []
        most = zero.head.world if zero is not None and zero.head is not None else self._index.most_ranks()
        found = {0: zero, **self._find(checkpoint, range(1, most), stop=False)}
        shares = [share for _, share in sorted(found.items()) if share is not None]
        # What is behind the last rank is another's, that stands at the same step.
        world = next((share.head.world for share in shares if share.head is not None), most)
        return [share for share in shares if share.slot.rank < world]

    def manifest(self, checkpoint: CheckpointId) -> bytes:
        """Return the manifest as it stands by itself, which says that all was whole once, else see `by_shares`."""
        told = self._index.manifest(checkpoint, fresh=True)
        if told is not None and told.commit is not None:
            return told.commit.data
        return self.by_shares(checkpoint)

    def by_shares(self, checkpoint: CheckpointId, shares: Sequence[Found] | None = None) -> bytes:
        """Return the manifest that follows from the records of all ranks; *shares*: what `shares` has just returned.

        Raises:
            KeyNotFoundError: not all of them stand there, or one tells of a failure: it is not committed.
            CorruptPartError: a share is damaged, or they do not make one checkpoint.
        """
        if shares is not None:
            return self._manifest(checkpoint, {share.slot.rank: share for share in shares})
        before = self._index.peek(checkpoint, 0)
        zero = before or self._index.find(checkpoint, 0, fresh=True)
        if zero is None:
            return self._manifest(checkpoint, {})
        world = self._index.slots.sound(zero).world
        found = {0: zero, **self._find(checkpoint, range(1, world), stop=True)}
        if before is not None and None not in found.values():
            found[0] = self._index.find(checkpoint, 0, fresh=True)
        return self._manifest(checkpoint, found)

    def confirm(self, checkpoint: CheckpointId, *, tell: bool) -> bool:
        """See `ShareTier.confirm`."""
        self._index.refresh()
        found = self._anew(checkpoint)
        try:
            data = None if found is None else self._manifest(checkpoint, found)
        except KeyNotFoundError:
            data = None
        if found is None or data is None:
            if tell:
                self._commits.take_back(checkpoint)
            return False
        if tell:
            self._commits.write({rank: share for rank, share in found.items() if share is not None}, data)
        return True

    def _anew(self, checkpoint: CheckpointId) -> dict[int, Found | None] | None:
        """Ask for the shares of all ranks, once each; None: one is missing."""
        before = self._index.peek(checkpoint, 0)
        zero = before or self._index.find(checkpoint, 0, fresh=True)
        if zero is None:
            return None
        ranks = range(self._index.slots.sound(zero).world)
        # What was never seen is what may be missing: where it is, the others need not be asked for each time.
        unseen = [rank for rank in ranks if self._index.peek(checkpoint, rank) is None]
        found = self._find(checkpoint, unseen, stop=True)
        if None in found.values():
            return None
        if before is None:
            found[0] = zero
        seen = [rank for rank in ranks if rank not in found]
        return {**found, **self._find(checkpoint, seen, stop=True, fresh=True)}

    def _find(
        self, checkpoint: CheckpointId, ranks: Sequence[int], *, stop: bool, fresh: bool = False
    ) -> dict[int, Found | None]:
        """Return the shares of *ranks*, up to about the first that is missing where that is to *stop* it."""
        found: dict[int, Found | None] = {}
        if not fresh:
            known = {rank: self._index.peek(checkpoint, rank) for rank in ranks}
            found = {rank: share for rank, share in known.items() if share is not None}
        asked = each(
            lambda rank: (rank, self._index.find(checkpoint, rank, fresh=fresh)),
            [rank for rank in ranks if rank not in found],
            secs=2 * self._index.slots.look_secs,  # it may stand in one of two places
            enough=(lambda pair: pair[1] is None) if stop else None,
        )
        return {**found, **dict(asked)}

    def _manifest(self, checkpoint: CheckpointId, found: Mapping[int, Found | None]) -> bytes:
        shares = {rank: share for rank, share in sorted(found.items()) if share is not None}
        missing = next((rank for rank, share in sorted(found.items()) if share is None), None)
        if 0 not in shares:
            self._manifests.pop(checkpoint, None)
        if missing is None:
            world = self._index.slots.sound(shares[0]).world if 0 in shares else 1
            missing = next((rank for rank in range(world) if rank not in shares), None)
        if missing is not None:
            raise self._none(checkpoint, f"the share of rank {missing} is not there")
        heads = list(map(self._index.slots.sound, shares.values()))
        seals, known = [head.seal for head in heads], self._manifests.get(checkpoint)
        if known is not None and known[0] == seals:
            return known[1]
        records = each(self._index.slots.record, list(shares.values()), secs=self._index.slots.look_secs)
        data = self._composed(checkpoint, heads, dict(zip(shares, records, strict=True)))
        standing = {one: known for one, known in list(self._manifests.items()) if self._index.stands(one)}
        self._manifests = {**standing, checkpoint: (seals, data)}
        return data

    def _composed(self, checkpoint: CheckpointId, heads: list[Head], records: dict[int, bytes]) -> bytes:
        tier = self._settings.name
        try:
            manifest = compose_manifest(records)
        except FormatError as error:
            with suppress(FormatError):
                if any(record_from_json(data).failed for data in records.values()):
                    raise self._none(checkpoint, "a rank failed") from error
            raise CorruptPartError(error.message, step=checkpoint.step, tier=tier) from error
        parts = {name: place.size for head in heads for name, place in head.parts.items()}
        if manifest.parts != parts or manifest.checkpoint != checkpoint or manifest.namespace != self._namespace:
            message = f"the shares of {checkpoint} do not hold the parts that their records tell of"
            raise CorruptPartError(message, step=checkpoint.step, tier=tier)
        return manifest_to_json(manifest)

    def _none(self, checkpoint: CheckpointId, how: str) -> KeyNotFoundError:
        key = layout.in_dir(checkpoint, layout.MANIFEST)
        return KeyNotFoundError(f"{checkpoint} is not committed: {how}", tier=self._settings.name, key=key)
