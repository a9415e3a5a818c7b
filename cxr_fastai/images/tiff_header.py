"""The first directory of tags of a TIFF file, or of the EXIF data in another file, and the limits of its values."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.limits import MAX_TAGS, check_amount

EXIF = b'Exif\0\0'
"""Start of EXIF data, before their TIFF header. It may be repeated."""
BIG_ENDIAN_BIG_TIFF = b'MM\0+'
"""First bytes of a BigTIFF file in big-endian byte order. Pillow reads its directory as that of an ordinary file."""
MAGIC = (b'II*\0', b'MM\0*', b'II+\0', BIG_ENDIAN_BIG_TIFF, b'MM*\0', b'II\0*')
"""First bytes of a file that Pillow accepts as TIFF. The last two are errors in the files of some programs."""
BIG_TIFF = 43
TYPE_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
"""Number of bytes of a value of each type."""
WHOLE_NUMBERS = {1: 'u1', 3: 'u2', 4: 'u4', 6: 'u1', 8: 'u2', 9: 'u4', 13: 'u4', 16: 'u8', 17: 'u8'}
"""Type of whole numbers to NumPy's. No negative number is valid where a size or a position is expected."""


class Entry(NamedTuple):
    """An entry of a directory: its type, the number of values, and the position of the values in the file."""

    kind: int
    values: int
    position: int

    @property
    def size(self) -> int:
        """Number of bytes of the values."""
        return self.values * (TYPE_BYTES[self.kind] if self.kind < len(TYPE_BYTES) else 0)


@dataclass(frozen=True)
class Directory:
    """The entries of a directory in the file `data`. `order` is the byte order, `<` or `>`."""

    data: bytes
    order: str
    entries: dict[int, list[Entry]]

    @property
    def size(self) -> int:
        """Number of bytes of all values, counted for every entry, although entries may share them."""
        return sum(entry.size for entries in self.entries.values() for entry in entries)

    def __contains__(self, tag: int) -> bool:
        return tag in self.entries

    def numbers(self, tag: int) -> list[int]:
        """Return the whole numbers of `tag`, empty if it is missing.

        Raises `ImageError` E_TRUNCATED if they are no whole numbers, if the file ends before them, or if the tag occurs
        several times, because readers disagree about which entry counts.
        """
        entries = self.entries.get(tag, [])
        if not entries:
            return []
        if len(entries) > 1 or entries[0].kind not in WHOLE_NUMBERS:
            raise ImageError(f'truncated or damaged: tag {tag} occurs twice or is no number', 'E_TRUNCATED')
        [entry] = entries
        dtype = np.dtype(self.order + WHOLE_NUMBERS[entry.kind])
        try:
            return np.frombuffer(self.data, dtype, entry.values, entry.position).tolist() if entry.values else []
        except (ValueError, OverflowError) as error:
            raise ImageError(f'truncated or damaged: the values of tag {tag} are missing', 'E_TRUNCATED') from error

    def number(self, tag: int, default: int) -> int:
        """Return the first number of `tag`, `default` if there is none. Raises what `numbers` raises."""
        numbers = self.numbers(tag)
        return numbers[0] if numbers else default


def read_directory(data: bytes) -> Directory:
    """Return the first directory of a TIFF file or of EXIF data.

    Raises `ImageError` E_FORMAT if `data` are neither, E_TRUNCATED if the directory ends early, and E_TOO_LARGE if it
    has more than `MAX_TAGS` entries.
    """
    if len(data) < 4:
        raise ImageError('truncated or damaged: the file ends within its first bytes', 'E_TRUNCATED')
    if data[:4] not in MAGIC:
        raise ImageError(f'the bytes {data[:4].hex(" ")} do not begin a TIFF file', 'E_FORMAT')
    order = '<' if data.startswith(b'II') else '>'
    is_big = data[2] == BIG_TIFF
    head = struct.Struct(f'{order}8xQ' if is_big else f'{order}4xI')
    number = struct.Struct(f'{order}Q' if is_big else f'{order}H')
    entry = struct.Struct(f'{order}HHQQ' if is_big else f'{order}HHII')
    entries: dict[int, list[Entry]] = {}
    try:
        (start,) = head.unpack_from(data)
        (count,) = number.unpack_from(data, start)
        if count > MAX_TAGS:
            raise ImageError(f'{count:,} tags are over {MAX_TAGS:,}', 'E_TOO_LARGE')
        end = start + number.size
        field_bytes = 8 if is_big else 4
        for _ in range(count):
            tag, kind, values, offset = entry.unpack_from(data, end)
            end += entry.size
            inside = Entry(kind, values, end - field_bytes)
            is_inside = inside.size <= field_bytes
            entries.setdefault(tag, []).append(inside if is_inside else inside._replace(position=offset))
    except (struct.error, OverflowError) as error:
        raise ImageError('truncated or damaged: a directory of tags ends early', 'E_TRUNCATED') from error
    return Directory(data, order, entries)


def check_exif(exif: bytes | bytearray) -> None:
    """Raise `ImageError` E_TOO_LARGE for EXIF data that grow when they are read. Damaged ones are ignored later.

    Thousands of tags can share the same bytes, of which a reader makes a copy for each.
    """
    exif = bytes(exif)
    while exif.startswith(EXIF):
        exif = exif.removeprefix(EXIF)
    if not exif:
        return
    try:
        directory = read_directory(exif)
    except ImageError as error:
        if error.code == 'E_TOO_LARGE':
            raise
        return
    check_amount(directory.size, len(directory.entries))
