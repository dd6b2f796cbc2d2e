"""What stands on the HyperPod service, shown as the keys that a directory would have."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Sequence

from sm_tiered import checksum, layout
from sm_tiered.errors import CorruptPartError, KeyNotFoundError
from sm_tiered.records import Attempt, CheckpointId
from sm_tiered.tiers.base import Blob, Entry
from sm_tiered.tiers.hyperpod_index import Index
from sm_tiered.tiers.hyperpod_manifests import Commit
from sm_tiered.tiers.hyperpod_read import ShareReader
from sm_tiered.tiers.hyperpod_shares import Place
from sm_tiered.tiers.hyperpod_slots import Found
from sm_tiered.tiers.hyperpod_whole import Whole

__all__ = ["View"]


class View:
    """Reads by key."""

    def __init__(self, index: Index, whole: Whole, reader: ShareReader, *, tier: str) -> None:
        self._index, self._whole, self._reader, self._name = index, whole, reader, tier

    def list(self, prefix: str) -> builtins.list[Entry]:
        """Return the keys that begin with *prefix*; times are those of who sent the share, by its clock.

        Of a checkpoint whose manifest stands by itself, each is that of its last share.
        """
        found = builtins.list[Entry]()
        attempts, steps = _may_begin(prefix, f"{layout.ATTEMPTS}/"), _may_begin(prefix, "step_")
        if not attempts and not steps:  # it is of what such a tier has none of, pins and files of events
            return []
        self._index.refresh()
        one = layout.parse_checkpoint_dir(prefix.partition("/")[0]) if "/" in prefix else None
        firsts = self._index.firsts() if one is None else []
        if attempts:
            found += [
                Entry(key=layout.attempt_key(attempt), size=len(data), modified_at=float(attempt.utc_secs))
                for attempt, data in {**self._index.waiting, **self._index.attempts(firsts)}.items()
            ]
        for checkpoint in [one] if one is not None else self._index.checkpoints(firsts) if steps else ():
            if _may_begin(prefix, f"{layout.checkpoint_dir(checkpoint)}/"):
                found += self._entries(checkpoint)
        return sorted((entry for entry in found if entry.key.startswith(prefix)), key=lambda entry: entry.key)

    def list_dirs(self, prefix: str) -> Sequence[str]:
        """Return the names directly below *prefix* that have keys below them."""
        if prefix:
            rest = (entry.key[len(prefix) :] for entry in self.list(prefix))
            return sorted({name.partition("/")[0] for name in rest if "/" in name})
        self._index.refresh()
        firsts = self._index.firsts()
        found = builtins.list(map(layout.checkpoint_dir, self._index.checkpoints(firsts)))
        return sorted([*found, layout.ATTEMPTS] if self._index.waiting or self._index.attempts(firsts) else found)

    def _entries(self, checkpoint: CheckpointId) -> Sequence[Entry]:
        told = self._index.told(checkpoint)
        return self._seen(checkpoint) if told is None else _told(told)

    def _seen(self, checkpoint: CheckpointId) -> Sequence[Entry]:
        """Return the keys of *checkpoint* as its shares tell them."""
        found = builtins.list[Entry]()
        newest, shares = 0.0, self._whole.shares(checkpoint)
        for share in shares:
            head = share.head
            places = dict(head.parts) if head is not None else {}
            places[layout.record_name(share.slot.rank)] = head.record if head is not None else Place(offset=0, size=0)
            at = head.sent_at if head is not None else 0.0
            newest = max(newest, at)
            found += [
                Entry(key=layout.in_dir(checkpoint, name), size=place.size, modified_at=at)
                for name, place in places.items()
            ]
        try:
            size = len(self._whole.by_shares(checkpoint, shares))
        except KeyNotFoundError:
            return found
        except CorruptPartError:
            size = 0  # it was committed: what is damaged is not what was never there
        return [*found, Entry(key=layout.in_dir(checkpoint, layout.MANIFEST), size=size, modified_at=newest)]

    def get(self, key: str, *, max_bytes: int) -> Blob:
        """Return a small object; the version is its digest.

        Raises:
            CorruptPartError: also where a share that it comes from is damaged.
        """
        data = self._get(key)
        if data is None:
            share, place = self._place(key)
            if place.size <= max_bytes:
                buffer = bytearray(place.size)
                self._read(share, place.offset, memoryview(buffer))
                data = bytes(buffer)
        if data is None or len(data) > max_bytes:
            raise CorruptPartError(f"{key} is longer than {max_bytes} bytes", tier=self._name, key=key)
        return Blob(data=data, version=checksum.digest(data))

    def _get(self, key: str) -> bytes | None:
        """Return what stands under *key* where that is not a part."""
        attempt = layout.parse_attempt_key(key) if key.startswith(f"{layout.ATTEMPTS}/") else None
        if attempt is not None:
            return self._attempt(attempt, key)
        checkpoint, name = self.split(key)
        if name == layout.MANIFEST:
            return self._whole.manifest(checkpoint)
        rank = layout.parse_record_name(name)
        if rank is None:
            return None
        # Who asks for the records is rank 0, most likely, and reads its own share next.
        found = self._index.find(checkpoint, rank, leave=self._reader.adopt if rank == 0 else None)
        if found is None:
            raise self._absent(key)
        return self._index.slots.record(found)

    def _attempt(self, attempt: Attempt, key: str) -> bytes:
        data = self._index.attempt(attempt) or self._index.waiting.get(attempt)
        if data is None:
            self._index.refresh()
            data = self._index.attempts(self._index.firsts()).get(attempt)
        if data is None:
            raise self._absent(key)
        return data

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* with the bytes from *offset* on."""
        view = buffer.cast("B")
        data = self._get(key)
        share, place = (None, Place(offset=0, size=len(data))) if data is not None else self._place(key)
        if offset + len(view) > place.size:
            message = f"{key} ends at {place.size}, {offset + len(view)} bytes were expected"
            raise CorruptPartError(message, tier=self._name, key=key)
        if data is not None:
            view[:] = data[offset : offset + len(view)]
        elif share is not None and view:
            self._read(share, place.offset + offset, view)

    def reach(self, key: str) -> int:
        """Return how many bytes may have to be received to read under *key*."""
        if self._get(key) is not None:
            return 0
        share, _ = self._place(key)
        return self._index.slots.sound(share).size

    def _read(self, share: Found, offset: int, view: memoryview) -> None:
        try:
            self._reader.read(share.slot, self._index.slots.sound(share), offset, view)
        except (KeyNotFoundError, CorruptPartError):
            self._index.slots.forget(share.slot)
            raise

    def _place(self, key: str) -> tuple[Found, Place]:
        """Return the share that holds the part under *key*, and where in it."""
        checkpoint, name = self.split(key)
        told, damaged = layout.rank_of_key(key), None
        rank = _likely_rank(name) if told is None else told
        likely = self._index.find(checkpoint, rank, leave=self._reader.adopt)
        for share in self._candidates(checkpoint, likely, only=told is not None):
            if share.head is not None and name in share.head.parts:
                return share, share.head.parts[name]
            damaged = share if share.head is None else damaged
        if damaged is not None:
            self._index.slots.sound(damaged)
        raise self._absent(key)

    def _candidates(self, checkpoint: CheckpointId, likely: Found | None, *, only: bool) -> Iterator[Found]:
        """Yield the share that most likely holds a part, and unless it is the *only* one, all."""
        if likely is not None:
            yield likely
        if likely is None or not only:
            yield from self._whole.shares(checkpoint)

    def split(self, key: str) -> tuple[CheckpointId, str]:
        """Return the checkpoint and the name in its directory that *key* stands for.

        Raises:
            KeyNotFoundError: it stands for none.
        """
        directory, _, name = key.partition("/")
        checkpoint = layout.parse_checkpoint_dir(directory)
        if checkpoint is None or not name:
            raise self._absent(key)
        return checkpoint, name

    def _absent(self, key: str) -> KeyNotFoundError:
        return KeyNotFoundError(f"{key[:200]} is not there", tier=self._name, key=key[:200])


def _told(commit: Commit) -> Sequence[Entry]:
    """Return the keys of a checkpoint as its manifest tells them."""
    sizes = dict(commit.manifest.parts)
    sizes.update({layout.record_name(rank): size for rank, size in enumerate(commit.head.records)})
    sizes[layout.MANIFEST] = len(commit.data)
    return [
        Entry(key=layout.in_dir(commit.checkpoint, name), size=size, modified_at=commit.head.sent_at)
        for name, size in sizes.items()
    ]


def _likely_rank(name: str) -> int:
    """Return the rank that most likely wrote the part *name*, which another program named."""
    own = layout.parse_own_name(name)
    return own[0] if own is not None else 0


def _may_begin(prefix: str, head: str) -> bool:
    """Whether a key that begins with *head* may begin with *prefix*."""
    return prefix.startswith(head) or head.startswith(prefix)
