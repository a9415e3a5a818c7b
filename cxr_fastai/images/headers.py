"""Limits of the headers of picture files, which are checked before Pillow opens them.

Every function walks the structure of the format as its reader does, and raises `ImageError` E_TRUNCATED where that is
damaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.jpeg_header import JPEG_SIGNATURE, check_jpeg, count_further_scans, count_scans, jpeg_segments
from cxr_fastai.images.limits import (
    MAX_CHUNKS,
    MAX_PADDED_PIXELS,
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
SAMPLES_PER_PIXEL, PLANAR_CONFIGURATION, SEPARATE = 277, 284, 2
"""TIFF tags: the number of samples, and whether they are in separate planes, each with strips or tiles of its own."""
RAW, OLD_JPEG, JPEG = 1, 6, 7
"""TIFF compressions."""
JPEG_START, JPEG_BYTES = 513, 514
"""TIFF tags: the position and the size of the header of a picture with the compression `OLD_JPEG`."""


class Chunk(NamedTuple):
    """A chunk of a PNG file: its name and its contents."""

    kind: bytes
    body: memoryview


def check_metadata(data: bytes) -> None:
    """Raise `ImageError` E_TOO_LARGE for a JPEG, PNG or TIFF file with more metadata than any picture needs.

    Pillow would copy, join or inflate them before it tells the size of the picture. Raises E_TIMEOUT for JPEG pictures
    in a TIFF file with too many scans.
    """
    if data.startswith(JPEG_SIGNATURE):
        check_jpeg(data)
    elif data.startswith(b'\x89PNG'):
        _check_png(data)
    elif data.startswith(BIG_ENDIAN_BIG_TIFF):
        raise ImageError('BigTIFF in big-endian byte order is not supported. Save the image as PNG', 'E_FORMAT')
    elif data.startswith(MAGIC):
        _check_tiff(data)


def _check_png(data: bytes) -> None:
    total = count = profiles = 0
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
        elif chunk.kind == b'iCCP':
            profiles += 1
            if profiles > 1:  # the standard allows one, and Pillow inflates each
                raise ImageError('truncated or damaged: more than one colour profile (chunk iCCP)', 'E_TRUNCATED')


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
    _check_parts(directory)
    compression = directory.number(COMPRESSION, RAW)
    if compression == JPEG:
        _check_jpeg_strips(directory)
    elif compression == OLD_JPEG:
        _check_old_jpeg(directory)


def _check_parts(directory: Directory) -> None:
    """Raise `ImageError` if the strips or tiles have more pixels than any picture needs, or are more than fit in it.

    The decoder decodes each as a whole, with the pixels that lie outside the picture, and strips can share their bytes.
    """
    width, height = _size(directory)
    is_raw = directory.number(COMPRESSION, RAW) == RAW
    planes = 1
    if directory.number(PLANAR_CONFIGURATION, 1) == SEPARATE:
        planes = directory.number(SAMPLES_PER_PIXEL, 1)
    if TILE_WIDTH in directory or TILE_LENGTH in directory:
        tile_width, tile_length = directory.number(TILE_WIDTH, 0), directory.number(TILE_LENGTH, 0)
        if tile_width * tile_length > MAX_PIXELS:
            raise ImageError(f'tiles of {tile_width}x{tile_length} are over {MAX_PIXELS:,} pixels', 'E_TOO_LARGE')
        listed = len(directory.numbers(TILE_OFFSETS))
        _check_grid((width, height), (tile_width, tile_length), planes, listed, is_raw)
    if STRIP_OFFSETS in directory:  # Pillow prefers them to tiles
        rows = min(directory.number(ROWS_PER_STRIP, height), height)
        listed = len(directory.numbers(STRIP_OFFSETS))
        _check_grid((width, height), (width, rows), planes, listed, is_raw)


def _check_grid(size: tuple[int, int], part: tuple[int, int], planes: int, listed: int, is_raw: bool) -> None:
    """Raise `ImageError` for a picture of `size` in `listed` parts of the size `part`; both are width and height.

    Pillow reads raw parts itself, all that are listed. libtiff reads those that the picture has.
    """
    if 0 in size or 0 in part:
        raise ImageError('truncated or damaged: the picture, or a strip or tile of it, has no pixels', 'E_TRUNCATED')
    across, down = math.ceil(size[0] / part[0]), math.ceil(size[1] / part[1])
    n_parts = across * down * planes
    n_pixels = n_parts * part[0] * part[1]
    if n_pixels > MAX_PADDED_PIXELS:
        raise ImageError(
            f'strips or tiles of {n_pixels:,} pixels in total are over {MAX_PADDED_PIXELS:,}', 'E_TOO_LARGE'
        )
    if n_parts > MAX_CHUNKS or listed > MAX_CHUNKS:
        raise ImageError(f'{max(n_parts, listed):,} strips or tiles are over {MAX_CHUNKS:,}', 'E_TOO_LARGE')
    if is_raw and listed > n_parts > planes:  # where each part covers the picture, Pillow reads the last
        raise ImageError(
            f'truncated or damaged: {listed:,} strips or tiles are listed; the picture has {n_parts:,}', 'E_TRUNCATED'
        )


def _check_jpeg_strips(directory: Directory) -> None:
    """Raise `ImageError` if the JPEG pictures, one in each strip or tile, have too many scans or segments."""
    width, height = _size(directory)
    if TILE_WIDTH in directory or TILE_LENGTH in directory:
        n_pixels = directory.number(TILE_WIDTH, 0) * directory.number(TILE_LENGTH, 0)
    else:
        n_pixels = width * min(directory.number(ROWS_PER_STRIP, height), height)
    scans = segments = 0
    for start, stop in _strips(directory):
        more_scans, more_segments = count_scans(directory.data, start, stop)
        scans += more_scans
        segments += more_segments
        _check_work(scans * n_pixels, segments)


def _check_old_jpeg(directory: Directory) -> None:
    """Raise `ImageError` if the only JPEG picture, whose pixels are spread over the strips, has too many scans."""
    width, height = _size(directory)
    data = directory.data
    start = min(directory.number(JPEG_START, 0), len(data))
    if start >= len(JPEG_SIGNATURE):
        stop = min(start + (directory.number(JPEG_BYTES, 0) or len(data)), len(data))
        for _ in jpeg_segments(data, start - len(JPEG_SIGNATURE), stop):
            pass  # the limits are checked on the way
    scans, segments = 1, 0
    for start, stop in _strips(directory):
        more_scans, more_segments = count_further_scans(data, start, stop)
        scans += more_scans
        segments += more_segments
        _check_work(scans * width * height, segments)


def _check_work(n_pixels: int, segments: int) -> None:
    if n_pixels > MAX_SCANNED_PIXELS:
        raise ImageError(f'JPEG scans of {n_pixels:,} pixels in total would take too long to decode', 'E_TIMEOUT')
    if segments > MAX_CHUNKS:
        raise ImageError(f'more than {MAX_CHUNKS:,} segments of JPEG pictures', 'E_TOO_LARGE')


def _size(directory: Directory) -> tuple[int, int]:
    width, height = directory.number(IMAGE_WIDTH, 0), directory.number(IMAGE_LENGTH, 0)
    check_pixels(width, height)
    return width, height


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
