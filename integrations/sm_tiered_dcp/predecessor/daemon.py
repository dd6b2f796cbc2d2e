"""Checkpoints of the predecessor's in the cluster's in-memory service: whole blobs, each with a checksum of its own."""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar, cast

import xxhash

from sm_tiered.errors import CorruptPartError, KeyNotFoundError, TierUnavailableError
from sm_tiered.layout import MAX_STEP
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.hyperpod_client import Body
from sm_tiered.tiers.hyperpod_service import HyperPodService, Slot
from sm_tiered.tiers.hyperpod_shares import SHARE_MAGIC
from sm_tiered.tiers.wrappers import retrying
from sm_tiered_dcp.predecessor.layout import metadata_slot
from sm_tiered_dcp.predecessor.shards import Shard
from sm_tiered_dcp.predecessor.sources import Listed
from sm_tiered_dcp.predecessor.temporary import using_temporary
from sm_tiered_dcp.predecessor.unpickling import MAX_BYTES

__all__ = ["DaemonSource"]

_PICKLE = b"\x80"
"""What a pickle begins with, and no shard: nothing else tells in which slot metadata stands."""
_OURS = SHARE_MAGIC[:1]
_RECEIVE_BYTES = 1024 * 1024
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _FileShard:
    """A shard that was received into a temporary file."""

    title: str
    size: int
    file: IO[bytes] = field(repr=False)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self.file.fileno(), [buffer[done:]], offset + done)
            if not count:
                raise CorruptPartError(f"{self.title} ends at byte {offset + done}")
            done += count


class DaemonSource:
    """A namespace of the service; what we ourselves keep there is passed over."""

    def __init__(self, settings: HyperPodSettings, namespace: str) -> None:
        self._settings, self._namespace = settings, namespace
        self._service = HyperPodService(settings)
        self._metadata_at: dict[int, int] = {}

    @property
    def title(self) -> str:
        """Where it is, for people."""
        return f"{self._settings.url}/{self._namespace}"

    def listed(self) -> Sequence[Listed]:
        """Return every step of which something is there, newest first."""
        namespace = self._again(lambda: self._service.describe(self._namespace))
        if namespace is None:
            return []
        self._metadata_at = {}
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

    def sizes(self, step: Listed, ranks: Collection[int]) -> Mapping[int, int]:
        """Return the size, in bytes, of each shard of *ranks* that is there."""
        found: dict[int, int] = {}
        for rank in ranks:
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

    def identity(self, step: Listed, ranks: Collection[int], *, again: bool = False) -> str:
        """Return 32 hex digits that tell this save of *step* from any other: by the checksums that came with it.

        What came without one is received for that.
        """
        del again  # nothing is remembered
        found = xxhash.xxh3_128()
        for rank in (self._metadata_at.get(step.step), *sorted(ranks)):
            if rank is not None:
                slot = self._slot(rank, step.step)
                told = self._again(lambda slot=slot: self._told(slot))
                found.update(f"{rank} {told}\n".encode())
        return found.hexdigest()

    def _told(self, slot: Slot) -> str:
        try:
            body = self._service.open(slot)
            body.close()
            if body.meta:
                return f"{body.size} {body.meta}"
            content = xxhash.xxh3_128()
            self._receive(slot, content.update)
        except KeyNotFoundError:
            return "gone"
        return content.hexdigest()

    def metadata(self, step: Listed) -> bytes:
        """Return the pickled metadata, whose checksum is right."""
        if step.step not in self._metadata_at:
            raise KeyNotFoundError(f"{self.title}: step {step.step} has no metadata", tier=self._settings.name)
        slot = self._slot(self._metadata_at[step.step], step.step)

        def receive() -> bytes:
            data = bytearray()
            self._receive(slot, data.extend, most=MAX_BYTES)
            return bytes(data)

        return self._again(receive)

    def shard(self, step: Listed, rank: int) -> AbstractContextManager[Shard]:
        """Receive the shard of *rank* into a temporary file; its checksum is right."""
        return self._received(self._slot(rank, step.step))

    @contextmanager
    def _received(self, slot: Slot) -> Generator[Shard, None, None]:
        with ExitStack() as stack:
            with using_temporary(str(slot), None):
                file = stack.enter_context(tempfile.TemporaryFile())

            def receive() -> int:
                file.seek(0)
                file.truncate()
                return self._receive(slot, keep)

            def keep(piece: bytes) -> None:
                file.write(piece)
                file.flush()  # so that a disk that is full is met here

            size = self._again(receive)
            yield _FileShard(title=f"{self._settings.url}/{slot}", size=size, file=cast("IO[bytes]", file))

    def _receive(self, slot: Slot, take: Callable[[bytes], Any], most: int | None = None) -> int:
        """Give all that stands in *slot* to *take*; return its size.

        Raises:
            CorruptPartError: it differs from its checksum, or is longer than *most*.
        """
        body, found, size = self._service.open(slot), xxhash.xxh3_128(), 0
        try:
            while piece := body.receive(_RECEIVE_BYTES):
                size += len(piece)
                if most is not None and size > most:
                    raise CorruptPartError(f"{slot} is longer than {most} bytes", tier=self._settings.name)
                found.update(piece)
                with using_temporary(str(slot), body.size):
                    take(piece)
        finally:
            body.close()
        if body.size is not None and size != body.size:
            raise TierUnavailableError(f"{slot}: {size} of {body.size} bytes came", tier=self._settings.name)
        self._check(body, found.digest(), slot)
        return size

    def _check(self, body: Body, digest: bytes, slot: Slot) -> None:
        if not body.meta:
            return
        try:
            told = json.loads(body.meta)
            right = told["algorithm"] != "xxh3_128" or base64.b64decode(told["checksum"], validate=True) == digest
        except (ValueError, TypeError, KeyError, RecursionError):
            right = False
        if not right:
            raise CorruptPartError(
                f"{slot} differs from its checksum, {body.meta[:80]!r}",
                hint="Import an older step, or from S3.",
                tier=self._settings.name,
            )

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
