"""Bytes of a checkpoint's parts on one tier: each one is compared with its digest before anything may use it.

A part is read in the chunks that have digests (8 MiB), each once for all who want something of it at about the same
time; only a few are kept, so that memory stays bounded whatever is read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future

from sm_tiered import checksum, layout
from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import CheckpointNotFoundError, CorruptPartError
from sm_tiered.inventory import read_holding
from sm_tiered.records import CheckpointId, Part, Record
from sm_tiered.tiers.base import Tier
from sm_tiered.verify_chunks import check_chunk, chunk_length

__all__ = ["VerifiedChunks"]


class VerifiedChunks:
    """The parts of one checkpoint on one tier, for any number of threads."""

    def __init__(
        self, tier: Tier, checkpoint: CheckpointId, records: Iterable[Record], *, durable: bool, room: int = 8
    ) -> None:
        """Read those parts that *records* name; keep the *room* chunks that were used last."""
        self.checkpoint, self.tier = checkpoint, tier.name
        self.bytes_read = 0
        """How many bytes were asked of the tier."""
        self._tier, self._durable, self._room = tier, durable, room
        self._parts = {part.name: part for record in records for part in record.parts}
        self._held: OrderedDict[tuple[str, int], Future[memoryview]] = OrderedDict()
        self._lock = threading.Lock()

    def part(self, name: str) -> Part:
        """Return the part called *name*."""
        return self._parts[name]

    def read_into(self, part: str, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* with the bytes of *part* from *offset* on.

        Raises:
            CorruptPartError: what is stored is not what was saved, or is gone.
            CheckpointNotFoundError: a running job deleted or recycled the checkpoint meanwhile.
            TierError: the tier did not answer or refused.
        """
        done = 0
        for index in checksum.chunk_range(offset, len(buffer)):
            inside = offset + done - index * CHUNK_BYTES
            view = self._chunk(part, index)[inside : inside + len(buffer) - done]
            buffer[done : done + len(view)] = view
            done += len(view)

    def _chunk(self, part: str, index: int) -> memoryview:
        key = (part, index)
        with self._lock:
            found = self._held.get(key)
            mine = found is None
            if found is None:
                found = self._held[key] = Future()
                while len(self._held) > self._room:
                    self._held.popitem(last=False)
            else:
                self._held.move_to_end(key)
        if mine:
            try:
                found.set_result(self._fetch(self._parts[part], index))
            except BaseException as error:
                found.set_exception(error)
                raise
        return found.result()

    def _fetch(self, part: Part, index: int) -> memoryview:
        view = memoryview(bytearray(chunk_length(part, index)))
        key = layout.in_dir(self.checkpoint, part.name)
        problem = check_chunk(self._tier, key, part, index, view).problem
        if problem is not None and self._gone():
            raise CheckpointNotFoundError(
                f"step {self.checkpoint.step} was deleted while it was being read",
                hint="Its job went on and took the room: read it from a tier that keeps more, or pin it.",
                tier=self.tier,
            )
        if problem is not None:
            message = f"{part.name}: chunk {index} {problem}"
            hint = "Take it from another tier; `sm-tiered verify` tells which are whole."
            raise CorruptPartError(message, hint=hint, step=self.checkpoint.step, tier=self.tier, key=key)
        with self._lock:
            self.bytes_read += len(view)
        return view

    def _gone(self) -> bool:
        """Whether nothing says any more that it is a checkpoint: then it is no damaged one."""
        now = read_holding(self._tier, self.checkpoint, durable=self._durable)
        if self._durable:
            return not now.damaged and (now.manifest is None or now.manifest.tombstone)
        return not now.damaged and now.problem is not None
