"""Reading shares out of the HyperPod service, which knows no ranges: a cursor goes forward through each.

Who reads in order receives a share once. Who goes back and forth begins anew each time; when a share was received
twice that way, it goes to a temporary file without a name. So does one that was left in the middle because others were
read meanwhile, as soon as it is read again. Who looked at a share because it is to be read leaves it open here.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import OrderedDict
from typing import IO

from sm_tiered import checksum, deadline
from sm_tiered.errors import CorruptPartError, TierError, TierUnavailableError
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.files import pread_full
from sm_tiered.tiers.hyperpod_client import Body
from sm_tiered.tiers.hyperpod_service import HyperPodService, Slot
from sm_tiered.tiers.hyperpod_shares import FIRST_BYTES, Head

__all__ = ["ShareReader"]

_OPEN = 4
"""As many shares are being received at once."""

_KNOWN = 256
"""Of as many it is known how often they were received, and their files are kept."""

_PIECE_BYTES = 1024 * 1024


class _Cursor:
    """One share, being received. Threads take turns."""

    def __init__(self, service: HyperPodService, settings: HyperPodSettings, slot: Slot, head: Head) -> None:
        self._service, self._settings, self._slot, self.head = service, settings, slot, head
        self._lock = threading.Lock()
        self._body: Body | None = None
        self._at = 0
        self._received = 0
        self._interrupted = False
        self._is_unread = False
        self._file: IO[bytes] | None = None
        self._no_file = False

    def read(self, offset: int, view: memoryview) -> None:
        """Fill *view* from byte *offset* of the share on."""
        with self._lock:
            self._is_unread = False
            again = self._interrupted or self._received > 2 * self.head.size
            if self._file is None and self._begins_anew(offset) and again:
                self._spool()
            if self._file is not None:
                pread_full(self._file.fileno(), offset, view, tier=self._service.tier, key=str(self._slot))
                return
            anew = self._begins_anew(offset)
            ahead = offset if anew else offset - self._at
            with deadline.within(self._settings.retry_deadline_secs + deadline.allowance(ahead + len(view))):
                try:
                    self._receive(offset, view)
                except BaseException:
                    self._leave()
                    raise
                if self._at == self.head.size:  # whoever reads on begins anew
                    self._leave()

    def adopt(self, body: Body) -> None:
        """Go on with *body*, of which header and record were received, unless the share is being read already."""
        at = self.head.record.offset + self.head.record.size
        if not self._lock.acquire(blocking=False):
            body.close()
            return
        try:
            if self._body is not None or self._file is not None or at == self.head.size:
                body.close()
                return
            self._body, self._at, self._is_unread = body, at, True
            self._received += at
        finally:
            self._lock.release()

    def rest(self, *, unread: bool = False) -> None:
        """Let go of the connection: others are read. One that is being read is left alone.

        *unread*: only where nothing was read since the look at the share.
        """
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._body is not None and (self._is_unread or not unread):
                self._interrupted |= not self._is_unread
                self._leave()
        finally:
            self._lock.release()

    def close(self) -> None:
        """Let go of the connection and the file."""
        with self._lock:
            self._leave()
            if self._file is not None:
                self._file.close()
                self._file = None

    def _begins_anew(self, offset: int) -> bool:
        return self._body is None or offset < self._at

    def _receive(self, offset: int, view: memoryview) -> None:
        if self._begins_anew(offset):
            self._begin()
        body = self._body
        assert body is not None
        while self._at < offset:
            self._step(len(self._next(body, min(offset - self._at, _PIECE_BYTES))))
        done = 0
        while done < len(view):
            data = self._next(body, len(view) - done)
            view[done : done + len(data)] = data
            done += len(data)
            self._step(len(data))

    def _begin(self) -> None:
        """Open the share and make sure that it is still the one that was looked at."""
        self._leave()
        body = self._body = self._service.open(self._slot)
        if body.size is not None and body.size != self.head.size:
            raise self._another(f"it is {body.size} bytes long, {self.head.size} were sent")
        length = self.head.record.offset
        first = body.take(length)
        if checksum.digest(first[FIRST_BYTES:]) != self.head.seal:
            raise self._another("its header is another one than a moment ago")
        self._at, self._received = length, self._received + length

    def _next(self, body: Body, limit: int) -> bytes:
        data = body.receive(limit)
        if not data:
            raise self._another(f"it ends at byte {self._at} of {self.head.size}")
        if deadline.remaining(1.0) <= 0:
            raise TierUnavailableError(f"{self._slot}: too slow: the deadline passed", tier=self._service.tier)
        return data

    def _step(self, size: int) -> None:
        self._at += size
        self._received += size

    def _another(self, how: str) -> CorruptPartError:
        return CorruptPartError(f"share {self._slot}: {how}", tier=self._service.tier)

    def _spool(self) -> None:
        """Bring the whole share to a file. Where there is no room for it, reading goes on without."""
        if self._no_file:
            return
        try:
            file = tempfile.TemporaryFile(prefix="sm_tiered-share-")  # noqa: SIM115 - as long as the cursor
        except OSError:
            self._no_file = True
            return
        try:
            with deadline.within(self._settings.retry_deadline_secs + deadline.allowance(self.head.size)):
                self._copy(file)
        except OSError as error:
            file.close()
            self._leave()
            if isinstance(error, TierError):  # some of ours are those too
                raise
            self._no_file = True
        except BaseException:
            file.close()
            self._leave()
            raise
        else:
            self._leave()
            self._file = file

    def _copy(self, file: IO[bytes]) -> None:
        self._begin()
        body = self._body
        assert body is not None
        os.ftruncate(file.fileno(), self._at)
        file.seek(self._at)
        while self._at < self.head.size:
            data = self._next(body, min(self.head.size - self._at, _PIECE_BYTES))
            file.write(data)
            self._step(len(data))
        file.flush()

    def _leave(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.close()


class ShareReader:
    """Reads anywhere in shares; those used last stay open."""

    def __init__(self, service: HyperPodService, settings: HyperPodSettings) -> None:
        self._service, self._settings = service, settings
        self._forget_parent()

    def _forget_parent(self) -> None:
        """Connections are not shared with the process that this one was forked from."""
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._cursors: OrderedDict[Slot, _Cursor] = OrderedDict()

    def read(self, slot: Slot, head: Head, offset: int, view: memoryview) -> None:
        """Fill *view* from byte *offset* of the share in *slot* on, which *head* was read of.

        Raises:
            KeyNotFoundError: it is gone.
            CorruptPartError: another one stands there, or it ends early.
        """
        self._cursor(slot, head).read(offset, view)

    def adopt(self, slot: Slot, head: Head, body: Body) -> None:
        """Keep *body*, of which header and record were received, for the read that is about to come."""
        self._cursor(slot, head).adopt(body)

    def let_go(self) -> None:
        """Let go of what was left open for a read that did not come: the service holds a whole share for it."""
        if self._pid != os.getpid():
            self._forget_parent()
        with self._lock:
            cursors = list(self._cursors.values())
        for cursor in cursors:
            cursor.rest(unread=True)

    def close(self) -> None:
        """Let go of all connections and files; the next read begins anew."""
        if self._pid != os.getpid():
            self._forget_parent()
        with self._lock:
            cursors, self._cursors = list(self._cursors.values()), OrderedDict()
        for cursor in cursors:
            cursor.close()

    def _cursor(self, slot: Slot, head: Head) -> _Cursor:
        gone: list[_Cursor] = []
        if self._pid != os.getpid():
            self._forget_parent()
        with self._lock:
            found = self._cursors.pop(slot, None)
            if found is not None and found.head.seal != head.seal:
                gone.append(found)
                found = None
            found = self._cursors[slot] = found or _Cursor(self._service, self._settings, slot, head)
            while len(self._cursors) > _KNOWN:
                gone.append(self._cursors.popitem(last=False)[1])
            resting = list(self._cursors.values())[:-_OPEN]
        for cursor in gone:
            cursor.close()
        for cursor in resting:
            cursor.rest()
        return found
