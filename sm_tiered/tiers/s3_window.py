"""How far an upload may run ahead of S3.

The CRT client takes whatever it is given and keeps it until S3 has it: where S3 is slower than memory, that is nearly
all of a part, in private memory. It doesn't tell how much that is. S3 does: it lists the parts that have arrived.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from sm_tiered.errors import TierRefusedError, TierUnavailableError
from sm_tiered.tiers.s3_client import S3Connection

__all__ = ["WINDOW_BYTES", "UploadWindow"]

WINDOW_BYTES = 128 * 1024 * 1024
"""How much the client may hold, about."""

_POLL_SECS = (0.005, 0.25)
_T = TypeVar("_T")
_log = logging.getLogger("sm_tiered")


class UploadWindow:
    """Holds one upload's writer back while S3 lacks more than `WINDOW_BYTES` of it. Make it before the upload."""

    def __init__(self, connection: S3Connection, key: str, part_bytes: int) -> None:
        self._connection, self._key, self._whole = connection, key, connection.whole(key)
        self._part_bytes, self._ahead = part_bytes, max(2, WINDOW_BYTES // part_bytes)
        self._id: str | None = None
        self._marker = 0
        """Part numbers up to here have all arrived."""
        self._arrived = 0
        self._usable = True
        self._earlier = frozenset[str | None](self._asked(self._unfinished) or ())

    def admit(self, written: int) -> None:
        """Return once S3 has all but the window of the *written* bytes.

        It gives up where S3 makes no progress: whether that is an error, the upload's own deadline decides.
        """
        pause, until = _POLL_SECS[0], time.monotonic() + self._connection.settings.request_timeout_secs
        while self._usable and written // self._part_bytes - self._arrived > self._ahead:
            known = self._arrived
            self._asked(self._look)
            if self._arrived > known:
                pause, until = _POLL_SECS[0], time.monotonic() + self._connection.settings.request_timeout_secs
            elif time.monotonic() > until:
                return
            else:
                time.sleep(pause)
                pause = min(2 * pause, _POLL_SECS[1])

    def _asked(self, question: Callable[[], _T]) -> _T | None:
        """What S3 answers; None when it doesn't just now. A store that never will is asked no more."""
        try:
            return question()
        except TierUnavailableError:
            return None
        except TierRefusedError as error:
            self._usable = False
            _log.info("sm_tiered: uploads to tier %s take unbounded memory: %s", self._connection.settings.name, error)
            return None

    def _unfinished(self) -> list[str]:
        page = self._connection.call(
            "ListMultipartUploads",
            self._key,
            lambda c: c.list_multipart_uploads(Bucket=self._connection.bucket, Prefix=self._whole),
        )
        found = [upload.get("UploadId") for upload in page.get("Uploads", ()) if upload.get("Key") == self._whole]
        return [upload for upload in found if upload is not None]

    def _look(self) -> None:
        if self._id is None:
            self._id = next((found for found in self._unfinished() if found not in self._earlier), None)
        upload, marker = self._id, self._marker
        if upload is None:
            return
        page = self._connection.call(
            "ListParts",
            self._key,
            lambda c: c.list_parts(
                Bucket=self._connection.bucket, Key=self._whole, UploadId=upload, PartNumberMarker=marker
            ),
        )
        listed = {part.get("PartNumber", 0) for part in page.get("Parts", ())}
        numbers = {number for number in listed if number > marker}
        self._arrived = marker + len(numbers)
        while self._marker + 1 in numbers:
            self._marker += 1
