"""The limit of the list of files at the end of a zip file, which `zipfile` reads as a whole and turns into objects.

A zip file ends with its directory, an entry for each file, and a record that tells where the directory begins. A zip
file with sizes of 64 bits has a second record and its locator in between (APPNOTE.TXT 6.3.10, section 4.3).
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

ENTRY = struct.Struct('<4s24x3H12x')
"""An entry of the directory: its mark, and the sizes of the name, the extra field and the comment that follow it."""
ENTRY_MARK = b'PK\1\2'
END = struct.Struct('<4s8xI4xH')
"""The last record of a zip file: its mark, the size of the directory, and the size of the comment that follows it."""
END_MARK = b'PK\5\6'
MAX_COMMENT = 2**16
LOCATOR = struct.Struct('<4s4xQ4x')
"""The locator of the record of 64 bits: its mark, and the position of that record."""
LOCATOR_MARK = b'PK\6\7'
LARGE_END = struct.Struct('<4s36xQ8x')
"""The record of 64 bits: its mark, and the size of the directory."""
LARGE_END_MARK = b'PK\6\6'


def check_zip(file: BinaryIO, max_entries: int, max_bytes: int) -> None:
    """Raise `ValueError` if the directory of the zip `file` has more than `max_entries` entries or `max_bytes` bytes.

    The entries themselves are counted, because the number in the last record can be wrong. A file without a directory
    is left to `zipfile`. The position in the file is then its start.
    """
    file_size = file.seek(0, os.SEEK_END)
    tail_start = max(file_size - MAX_COMMENT - END.size - LOCATOR.size - LARGE_END.size, 0)
    file.seek(tail_start)
    tail = file.read(file_size - tail_start)
    file.seek(0)
    end = _find_end(tail)
    if end is None:
        return
    _, size, _ = END.unpack_from(tail, end)
    locator = end - LOCATOR.size
    if locator >= LARGE_END.size and tail.startswith(LOCATOR_MARK, locator):
        end = locator - LARGE_END.size
        _, position = LOCATOR.unpack_from(tail, locator)
        # Versions of `zipfile` look for the record in one of these two places.
        if position != tail_start + end or not tail.startswith(LARGE_END_MARK, end):
            raise ValueError('its records of 64 bits do not match')
        _, size = LARGE_END.unpack_from(tail, end)
    if size > max_bytes:
        raise ValueError(f'its directory of {size:,} bytes is over {max_bytes:,}')
    file.seek(max(tail_start + end - size, 0))
    count = _count_entries(file.read(size), max_entries)
    file.seek(0)
    if count > max_entries:
        raise ValueError(f'more than {max_entries:,} entries')


def _find_end(tail: bytes) -> int | None:
    """Return the position of the last record in the last bytes of a zip file, as `zipfile` finds it."""
    start = len(tail) - END.size
    if start >= 0 and tail.startswith(END_MARK, start) and tail.endswith(b'\0\0'):  # no comment
        return start
    start = tail.rfind(END_MARK, max(start - MAX_COMMENT, 0))
    return start if 0 <= start <= len(tail) - END.size else None


def _count_entries(directory: bytes, max_entries: int) -> int:
    """Return the number of entries up to the first damaged one, and at most `max_entries` + 1."""
    position = count = 0
    while position + ENTRY.size <= len(directory) and count <= max_entries:
        mark, *sizes = ENTRY.unpack_from(directory, position)
        if mark != ENTRY_MARK:
            break
        position += ENTRY.size + sum(sizes)
        count += 1
    return count
