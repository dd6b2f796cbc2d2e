"""What a zip stream says of itself is checked before torch reads it: nothing unfolds to more than was stored."""

from __future__ import annotations

import io
import struct
import zipfile

__all__ = ["check_zip"]

_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_BYTES, _END_64_BYTES, _LOCATOR_64_BYTES = 22, 56, 20


def check_zip(stored: bytes) -> None:
    """Refuse a stream that torch's reader would inflate, or take for longer than *stored*.

    Raises:
        ValueError: it is such a stream; we store without compression, so that it is forged.
        zipfile.BadZipFile: it is no zip.
    """
    with zipfile.ZipFile(io.BytesIO(stored)) as archive:
        entries = archive.infolist()
    _check_directory(stored)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("a compressed entry")
    if sum(entry.file_size for entry in entries) > len(stored):
        raise ValueError("its entries are longer than it is")


def _check_directory(stored: bytes) -> None:
    """Python's reader looks for the directory before its end, torch's where an offset says: both must find one."""
    end = len(stored) - _END_BYTES
    whole = stored[end : end + 4] == _END
    size, offset = struct.unpack_from("<II", stored, end + 12)
    locator = end - _LOCATOR_64_BYTES
    if locator >= _END_64_BYTES and stored[locator : locator + 4] == _LOCATOR_64:
        (said,) = struct.unpack_from("<Q", stored, locator + 8)
        end = locator - _END_64_BYTES
        whole = whole and said == end and stored[end : end + 4] == _END_64
        size, offset = struct.unpack_from("<QQ", stored, end + 40)
    if not whole or offset + size != end:
        raise ValueError("its directory is not at its end")
