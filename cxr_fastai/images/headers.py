"""Headers of picture files as far as the limits need them: segments, chunks, directories and codestreams.

Every function walks the structure of the format, and raises `ImageError` E_TRUNCATED where that is damaged.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.limits import MAX_CHUNKS, MAX_METADATA, MAX_PARTS, MAX_PIXELS, MAX_TAGS

EXIF = b'Exif\0\0'
"""Start of the JPEG segment APP1 with EXIF data."""
APPLICATION_SEGMENTS = range(0xE0, 0xF0)
COMMENT = 0xFE
START_OF_SCAN = 0xDA
END_OF_IMAGE = 0xD9
WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD9))
"""JPEG markers that stand alone."""
PNG_START = 8
SIZ = b'\xff\x4f\xff\x51'
"""Start of a JPEG 2000 codestream."""
J2K_SIZE = struct.Struct('>4x2xH8IHBBB')
"""The segment SIZ up to its first component."""
SOF55 = 0xF7
"""JPEG-LS: the frame header."""
JPEGLS_FRAME = struct.Struct('>BHHB')
TIFF_TYPE_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
"""Number of bytes of a value of each type in a TIFF directory."""
BIG_TIFF = 43
TILE_WIDTH, TILE_LENGTH = 322, 323
"""TIFF tags: the size of a tile, for which the decoder reserves memory."""


class CodestreamHeader(NamedTuple):
    """What a JPEG 2000 or JPEG-LS codestream says of itself."""

    width: int
    height: int
    components: int
    bits: int
    tiles: int = 1


class Part(NamedTuple):
    """A segment of a JPEG file, or a chunk of a PNG file: its marker or name, and its contents."""

    kind: int | bytes
    body: memoryview


def check_metadata(data: bytes) -> None:
    """Raise `ImageError` E_TOO_LARGE for a JPEG, PNG or TIFF file with more metadata than any picture needs.

    Pillow would copy, join or inflate them before it tells the size of the picture.
    """
    if data.startswith(b'\xff\xd8'):
        _check_jpeg(data)
    elif data.startswith(b'\x89PNG'):
        _check_png(data)
    elif data[:2] in (b'II', b'MM'):
        _check_tiff(data)


def _check_jpeg(data: bytes) -> None:
    total = 0
    exif = bytearray()
    for number, segment in enumerate(jpeg_segments(data), 1):
        if segment.kind in APPLICATION_SEGMENTS or segment.kind == COMMENT:
            total += len(segment.body)
            if segment.body[: len(EXIF)] == EXIF:  # Pillow joins the EXIF data of several segments
                exif += segment.body[len(EXIF) :]
        _check_amount(total, number)
    check_exif(exif)


def _check_amount(size: int, parts: int) -> None:
    if size > MAX_METADATA:
        raise ImageError(f'{size:,} bytes of metadata are over {MAX_METADATA:,}', 'E_TOO_LARGE')
    if parts > MAX_PARTS:
        raise ImageError(f'more than {MAX_PARTS:,} parts before or between the pixels', 'E_TOO_LARGE')


def check_exif(exif: bytes | bytearray) -> None:
    """Raise `ImageError` E_TOO_LARGE for EXIF data that grow when they are read. Damaged ones are ignored later.

    Thousands of tags can share the same bytes, of which a reader makes a copy for each.
    """
    exif = exif.removeprefix(EXIF)
    if not exif:
        return
    try:
        values = directory_values(exif)
    except ImageError as error:
        if error.code == 'E_TOO_LARGE':
            raise
        return
    _check_amount(sum(size for size, _ in values.values()), len(values))


def _check_png(data: bytes) -> None:
    total = count = 0
    for number, chunk in enumerate(png_chunks(data)):
        if number > MAX_CHUNKS:
            raise ImageError(f'more than {MAX_CHUNKS:,} chunks', 'E_TOO_LARGE')
        if chunk.kind == b'IDAT':
            continue
        count += 1
        total += len(chunk.body)
        _check_amount(total, count)
        if chunk.kind == b'eXIf':
            check_exif(bytes(chunk.body))


def _check_tiff(data: bytes) -> None:
    values = directory_values(data)
    _check_amount(sum(size for size, _ in values.values()), len(values))
    _, width = values.get(TILE_WIDTH, (0, 0))
    _, length = values.get(TILE_LENGTH, (0, 0))
    if width * length > MAX_PIXELS:
        raise ImageError(f'tiles of {width}x{length} are over {MAX_PIXELS:,} pixels', 'E_TOO_LARGE')


def jpeg_segments(data: bytes) -> Iterator[Part]:
    """Yield the segments of a JPEG file up to its first scan."""
    view = memoryview(data)
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            raise ImageError('truncated or damaged: no JPEG marker where one is due', 'E_TRUNCATED')
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in (START_OF_SCAN, END_OF_IMAGE):
            return
        if marker in WITHOUT_LENGTH:
            position += 2
            continue
        length = int.from_bytes(view[position + 2 : position + 4], 'big')
        yield Part(marker, view[position + 4 : position + 2 + length])
        position += 2 + max(length, 2)


def png_chunks(data: bytes) -> Iterator[Part]:
    """Yield the chunks of a PNG file."""
    view = memoryview(data)
    position = PNG_START
    while position + 8 <= len(data):
        length = int.from_bytes(view[position : position + 4], 'big')
        kind = bytes(view[position + 4 : position + 8])
        yield Part(kind, view[position + 8 : position + 8 + length])
        if kind == b'IEND':
            return
        position += 12 + length


def directory_values(data: bytes | bytearray) -> dict[int, tuple[int, int]]:
    """Return the entries of the first directory of a TIFF file or of EXIF data: tag to (bytes of values, first value).

    The bytes of a value are counted for every entry, although entries may share them. The first value is that of a
    single number that the entry itself holds, otherwise 0.
    """
    order = '<' if bytes(data[:2]) == b'II' else '>'
    try:
        (version,) = struct.unpack_from(f'{order}H', data, 2)
        if version == BIG_TIFF:
            (start,) = struct.unpack_from(f'{order}Q', data, 8)
            (count,) = struct.unpack_from(f'{order}Q', data, start)
            entry, start = struct.Struct(f'{order}HHQ8s'), start + 8
        else:
            (start,) = struct.unpack_from(f'{order}I', data, 4)
            (count,) = struct.unpack_from(f'{order}H', data, start)
            entry, start = struct.Struct(f'{order}HHI4s'), start + 2
        if count > MAX_TAGS:
            raise ImageError(f'{count:,} tags are over {MAX_TAGS:,}', 'E_TOO_LARGE')
        sizes: dict[int, tuple[int, int]] = {}
        for index in range(count):
            tag, kind, number, field = entry.unpack_from(data, start + index * entry.size)
            width = TIFF_TYPE_BYTES[kind] if kind < len(TIFF_TYPE_BYTES) else 0
            single = int.from_bytes(field[:width], 'little' if order == '<' else 'big') if number == 1 else 0
            previous, _ = sizes.get(tag, (0, 0))
            sizes[tag] = previous + width * number, single
    except (struct.error, OverflowError) as error:
        raise ImageError('truncated or damaged: a directory of tags ends early', 'E_TRUNCATED') from error
    return sizes


def read_j2k_header(data: bytes) -> CodestreamHeader:
    """Return the header of a JPEG 2000 picture, with or without the boxes of a JP2 file around it."""
    start = 0 if data.startswith(SIZ) else _find_codestream(data)
    try:
        _, right, bottom, left, top, tile_width, tile_height, _, _, components, depth, *_ = J2K_SIZE.unpack_from(
            data, start
        )
    except struct.error as error:
        raise ImageError('truncated or damaged: no JPEG 2000 header', 'E_TRUNCATED') from error
    if not (tile_width and tile_height):
        raise ImageError('truncated or damaged: JPEG 2000 tiles without size', 'E_TRUNCATED')
    tiles = -(-right // tile_width) * -(-bottom // tile_height)
    return CodestreamHeader(right - left, bottom - top, components, (depth & 0x7F) + 1, tiles)


def _find_codestream(data: bytes) -> int:
    """Return the position of the codestream among the boxes of a JP2 file."""
    position = 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from('>I4s', data, position)
        if kind == b'jp2c':
            return position + (16 if length == 1 else 8)
        if length < 8:
            break
        position += length
    raise ImageError('truncated or damaged: no JPEG 2000 codestream', 'E_TRUNCATED')


def read_jpegls_header(data: bytes) -> CodestreamHeader:
    """Return the header of a JPEG-LS picture."""
    for segment in jpeg_segments(data):
        if segment.kind == SOF55 and len(segment.body) >= JPEGLS_FRAME.size:
            bits, height, width, components = JPEGLS_FRAME.unpack_from(segment.body)
            return CodestreamHeader(width, height, components, bits)
    raise ImageError('truncated or damaged: no JPEG-LS header', 'E_TRUNCATED')
