"""Limits of the headers of picture files, which are checked before Pillow opens them.

Every function walks the structure of the format as its reader does, and raises `ImageError` E_TRUNCATED where that is
damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.jpeg_header import START, check_jpeg, count_further_scans, count_scans
from cxr_fastai.images.limits import (
    MAX_CHUNKS,
    MAX_PIXELS,
    MAX_SCANNED_PIXELS,
    MAX_STRIPS,
    check_amount,
    check_pixels,
)
from cxr_fastai.images.tiff_header import BIG_ENDIAN_BIG_TIFF, MAGIC, Directory, check_exif, read_directory

PNG_START = 8
IMAGE_WIDTH, IMAGE_LENGTH, COMPRESSION, ROWS_PER_STRIP = 256, 257, 259, 278
"""TIFF tags: numbers that describe the pixels."""
STRIP_OFFSETS, STRIP_BYTES, TILE_OFFSETS, TILE_BYTES = 273, 279, 324, 325
"""TIFF tags: the positions and sizes of the compressed pixels."""
TILE_WIDTH, TILE_LENGTH = 322, 323
"""TIFF tags: the size of a tile, for which the decoder reserves memory."""
OLD_JPEG, JPEG = 6, 7
"""TIFF compressions."""
JPEG_START, JPEG_BYTES = 513, 514
"""TIFF tags: the position and the size of the header of the compression `OLD_JPEG`."""


class Chunk(NamedTuple):
    """A chunk of a PNG file: its name and its contents."""

    kind: bytes
    body: memoryview


def check_metadata(data: bytes) -> None:
    """Raise `ImageError` E_TOO_LARGE for a JPEG, PNG or TIFF file with more metadata than any picture needs.

    Pillow would copy, join or inflate them before it tells the size of the picture. Raises E_TIMEOUT for JPEG pictures
    in a TIFF file with too many scans.
    """
    if data.startswith(START):
        check_jpeg(data)
    elif data.startswith(b'\x89PNG'):
        _check_png(data)
    elif data.startswith(BIG_ENDIAN_BIG_TIFF):
        raise ImageError('BigTIFF in big-endian byte order is not supported. Save the image as PNG', 'E_FORMAT')
    elif data.startswith(MAGIC):
        _check_tiff(data)


def _check_png(data: bytes) -> None:
    total = count = 0
    for number, chunk in enumerate(png_chunks(data)):
        if number > MAX_CHUNKS:
            raise ImageError(f'more than {MAX_CHUNKS:,} chunks', 'E_TOO_LARGE')
        if chunk.kind == b'IDAT':
            continue
        count += 1
        total += len(chunk.body)
        check_amount(total, count)
        if chunk.kind == b'eXIf':
            check_exif(bytes(chunk.body))


def png_chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the chunks of a PNG file."""
    view = memoryview(data)
    position = PNG_START
    while position + 8 <= len(data):
        length = int.from_bytes(view[position : position + 4], 'big')
        kind = bytes(view[position + 4 : position + 8])
        yield Chunk(kind, view[position + 8 : position + 8 + length])
        if kind == b'IEND':
            return
        position += 12 + length


def _check_tiff(data: bytes) -> None:
    directory = read_directory(data)
    check_amount(directory.size, len(directory.entries))
    width, length = directory.number(TILE_WIDTH, 0), directory.number(TILE_LENGTH, 0)
    if width * length > MAX_PIXELS:
        raise ImageError(f'tiles of {width}x{length} are over {MAX_PIXELS:,} pixels', 'E_TOO_LARGE')
    compression = directory.number(COMPRESSION, 1)
    if compression in (OLD_JPEG, JPEG):
        _check_jpeg_in_tiff(directory, compression == OLD_JPEG)


def _check_jpeg_in_tiff(directory: Directory, is_old: bool) -> None:
    """Raise `ImageError` E_TIMEOUT if the JPEG pictures of the strips or tiles have too many scans.

    `is_old`: the strips contain only the pixels of a picture, which libtiff completes.
    """
    n_pixels = _strip_pixels(directory)
    scanned = segments = 0
    for start, stop in _strips(directory):
        if is_old:
            scans, more_segments = count_further_scans(directory.data, start, stop)
            scans += 1
        else:
            scans, more_segments = count_scans(directory.data, start, stop)
        scanned += scans * n_pixels
        segments += more_segments
        if scanned > MAX_SCANNED_PIXELS:
            raise ImageError(f'the JPEG scans of {scanned:,} pixels would take too long to decode', 'E_TIMEOUT')
        if segments > MAX_CHUNKS:
            raise ImageError(f'more than {MAX_CHUNKS:,} segments of JPEG pictures', 'E_TOO_LARGE')


def _strip_pixels(directory: Directory) -> int:
    """Return the number of pixels of a strip or tile."""
    width, height = directory.number(IMAGE_WIDTH, 0), directory.number(IMAGE_LENGTH, 0)
    check_pixels(width, height)
    if TILE_WIDTH in directory or TILE_LENGTH in directory:
        return directory.number(TILE_WIDTH, 0) * directory.number(TILE_LENGTH, 0)
    return width * min(directory.number(ROWS_PER_STRIP, height), height)


def _strips(directory: Directory) -> list[tuple[int, int]]:
    """Return start and end of each strip or tile. Raises `ImageError` if they share bytes, or lie outside the file."""
    offsets = directory.numbers(STRIP_OFFSETS) or directory.numbers(TILE_OFFSETS)
    sizes = directory.numbers(STRIP_BYTES) or directory.numbers(TILE_BYTES)
    if len(offsets) > MAX_STRIPS:
        raise ImageError(f'{len(offsets):,} strips with JPEG compression are over {MAX_STRIPS:,}', 'E_TOO_LARGE')
    is_ambiguous = STRIP_OFFSETS in directory and TILE_OFFSETS in directory
    if is_ambiguous or len(sizes) != len(offsets):
        raise ImageError('truncated or damaged: sizes and positions of the strips do not match', 'E_TRUNCATED')
    strips = [(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)]
    if sum(sizes) > len(directory.data) or any(stop > len(directory.data) for _, stop in strips):
        raise ImageError('truncated or damaged: strips share bytes or end behind the file', 'E_TRUNCATED')
    return strips
