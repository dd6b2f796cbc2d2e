"""What a zip stream says of itself is checked before torch reads it: nothing unfolds to more than was stored."""

from __future__ import annotations

import struct
import zipfile
from typing import IO

__all__ = ["check_zip"]

_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_BYTES, _END_64_BYTES, _LOCATOR_64_BYTES = 22, 56, 20


def check_zip(stream: IO[bytes], length: int) -> None:
    """Refuse a stream of *length* bytes that torch's reader would inflate, or take for longer than it is.

    Raises:
        ValueError: it is such a stream; we store without compression, so that it is forged.
        zipfile.BadZipFile: it is no zip.
    """
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
    tail = min(length, _END_BYTES + _LOCATOR_64_BYTES + _END_64_BYTES)
    stream.seek(length - tail)
    _check_directory(stream.read(tail), length - tail)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("a compressed entry")
    if sum(entry.file_size for entry in entries) > length:
        raise ValueError("its entries are longer than it is")


def _check_directory(tail: bytes, start: int) -> None:
    """Python's reader looks for the directory before its end, torch's where an offset says: both must find one.

    *tail* is the end of the stream, from byte *start* on.
    """
    end = len(tail) - _END_BYTES
    whole = tail[end : end + 4] == _END
    size, offset = struct.unpack_from("<II", tail, end + 12)
    locator = end - _LOCATOR_64_BYTES
    if locator >= _END_64_BYTES and tail[locator : locator + 4] == _LOCATOR_64:
        (said,) = struct.unpack_from("<Q", tail, locator + 8)
        end = locator - _END_64_BYTES
        whole = whole and said == start + end and tail[end : end + 4] == _END_64
        size, offset = struct.unpack_from("<QQ", tail, end + 40)
    if not whole or offset + size != start + end:
        raise ValueError("its directory is not at its end")
