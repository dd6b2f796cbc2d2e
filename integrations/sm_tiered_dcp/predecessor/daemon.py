"""Checkpoints of the predecessor's in the cluster's in-memory service: whole blobs, each with a checksum of its own."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO, TypeVar, cast

import xxhash

from sm_tiered.errors import CorruptPartError, KeyNotFoundError, TierUnavailableError
from sm_tiered.layout import MAX_STEP
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.hyperpod_service import HyperPodService, Slot
from sm_tiered.tiers.hyperpod_shares import SHARE_MAGIC
from sm_tiered.tiers.wrappers import retrying
from sm_tiered_dcp.predecessor.layout import metadata_slot
from sm_tiered_dcp.predecessor.reception import Reception
from sm_tiered_dcp.predecessor.shards import Shard
from sm_tiered_dcp.predecessor.sources import Listed
from sm_tiered_dcp.predecessor.temporary import using_temporary

__all__ = ["DaemonSource"]

_PICKLE = b"\x80"
"""What a pickle begins with, and no shard: nothing else tells in which slot metadata stands."""
_OURS = SHARE_MAGIC[:1]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _FileShard:
    """A shard that was received into a temporary file."""

    title: str
    size: int
    compared: bool
    file: IO[bytes] = field(repr=False)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self.file.fileno(), [buffer[done:]], offset + done)
            if not count:
                raise CorruptPartError(
                    f"{self.title}, received into TMPDIR, ends at byte {offset + done}, not at {self.size}",
                    hint="Does something cut files in TMPDIR? Import it again, with another one.",
                )
            done += count


class DaemonSource:
    """A namespace of the service; what we ourselves keep there is passed over."""

    def __init__(self, settings: HyperPodSettings, namespace: str) -> None:
        self._settings, self._namespace = settings, namespace
        self._service = HyperPodService(settings)
        self._reception = Reception(self._service, settings)
        self._metadata_at: dict[int, int] = {}
        self._slots = 0
        """How many the namespace has, those of ranks and that of metadata."""

    @property
    def title(self) -> str:
        """Where it is, for people."""
        return f"{self._settings.url}/{self._namespace}"

    def listed(self) -> Sequence[Listed]:
        """Return every step of which something is there, newest first."""
        namespace = self._again(lambda: self._service.describe(self._namespace))
        if namespace is None:
            return []
        self._metadata_at, self._slots = {}, namespace.ranks
        steps = [step for step in self._again(lambda: self._service.latest(namespace)) if step < MAX_STEP]
        found: list[Listed] = []
        for step in steps:
            is_ours, slot = self._whose(step, namespace.ranks)
            if slot is not None:
                self._metadata_at[step] = slot
            if not is_ours:
                found.append(Listed(step=step, name=f"step {step}", finished=slot is not None))
        return found

    def _whose(self, step: int, slots: int) -> tuple[bool, int | None]:
        """Return whether *step* is ours, and the slot of its metadata: its save may have been of fewer ranks than the
        namespace's first one.
        """
        first = metadata_slot(slots)
        for slot in (first, *(rank for rank in reversed(range(slots)) if rank != first)):
            begins = self._begins(slot, step)
            if begins == _PICKLE:
                return False, slot
            if begins == _OURS:
                return True, None
        return False, None

    def _begins(self, slot: int, step: int) -> bytes:
        """The first byte of what stands in *slot*, or none."""

        def look() -> bytes:
            try:
                body = self._service.open(self._slot(slot, step))
            except KeyNotFoundError:
                return b""
            try:
                return body.receive(1)
            finally:
                body.close()

        return self._again(look)

    def sizes(self, step: Listed) -> Mapping[int, int]:
        """Return the size, in bytes, of each shard that is there, by rank: whatever is not the metadata is one."""
        found: dict[int, int] = {}
        for rank in range(self._slots):
            if rank == self._metadata_at.get(step.step):
                continue
            size = self._again(lambda rank=rank: self._size(rank, step.step))
            if size is not None:
                found[rank] = size
        return found

    def _size(self, rank: int, step: int) -> int | None:
        try:
            body = self._service.open(self._slot(rank, step))
        except KeyNotFoundError:
            return None
        body.close()
        # One that was not announced is known when it was received.
        return sys.maxsize if body.size is None else body.size

    def identity(self, step: Listed, ends: Mapping[int, int], *, again: bool = False) -> str:
        """Return 32 hex digits that tell this save of *step* from any other: by the checksums that came with it.

        What came without one is received for that.
        """
        del again  # nothing is remembered
        found = xxhash.xxh3_128()
        for rank in (self._metadata_at.get(step.step), *sorted(ends)):
            if rank is not None:
                slot, end = self._slot(rank, step.step), ends.get(rank)
                told = self._again(lambda slot=slot, end=end: self._told(slot, end))
                found.update(f"{rank} {told}\n".encode())
        return found.hexdigest()

    def _told(self, slot: Slot, end: int | None) -> str:
        try:
            body = self._service.open(slot)
            body.close()
            if body.meta:
                return f"{body.size} {body.meta}"
            content = xxhash.xxh3_128()
            self._reception.receive(slot, content.update, end=end)
        except KeyNotFoundError:
            return "gone"
        return content.hexdigest()

    def metadata(self, step: Listed) -> bytes:
        """Return the pickled metadata, whose checksum is right."""
        if step.step not in self._metadata_at:
            raise KeyNotFoundError(
                f"{self.title}: step {step.step} has no metadata",
                hint="Its save never ended. Import another step.",
                step=step.step,
                tier=self._settings.name,
            )
        slot = self._slot(self._metadata_at[step.step], step.step)

        def receive() -> bytes:
            data = bytearray()
            self._reception.receive(slot, data.extend, end=None)
            return bytes(data)

        return self._again(receive)

    def shard(self, step: Listed, rank: int, *, end: int) -> AbstractContextManager[Shard]:
        """Receive the shard of *rank* into a temporary file; its checksum is right, and it ends soon behind *end*."""
        return self._received(self._slot(rank, step.step), end)

    @contextmanager
    def _received(self, slot: Slot, end: int) -> Generator[Shard, None, None]:
        with ExitStack() as stack:
            with using_temporary(str(slot), None):
                file = stack.enter_context(tempfile.TemporaryFile())

            def receive() -> tuple[int, bool]:
                file.seek(0)
                file.truncate()
                return self._reception.receive(slot, keep, end=end)

            def keep(piece: bytes) -> None:
                file.write(piece)
                file.flush()  # so that a disk that is full is met here

            size, compared = self._again(receive)
            title = f"{self._settings.url}/{slot}"
            yield _FileShard(title=title, size=size, compared=compared, file=cast("IO[bytes]", file))

    def close(self) -> None:
        """Close all connections."""
        self._service.close()

    def _slot(self, rank: int, step: int) -> Slot:
        return Slot(namespace=self._namespace, rank=rank, wire=step)

    def _again(self, work: Callable[[], _T]) -> _T:
        """Return what *work* returns; a service that does not answer is asked again, as often as its settings say.

        What differs from its checksum is asked for once more: perhaps it is so only on its way here.
        """
        silent = damaged = 0

        def worth(error: BaseException) -> bool:
            nonlocal silent, damaged
            silent += isinstance(error, TierUnavailableError)
            damaged += isinstance(error, CorruptPartError)
            kinds = (TierUnavailableError, CorruptPartError)
            return isinstance(error, kinds) and silent < self._settings.retry_attempts and damaged < 2

        return retrying(self._settings.retry_deadline_secs, worth)(work)
