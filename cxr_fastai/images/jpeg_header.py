"""Segments of JPEG and JPEG-LS pictures, and the limits of what stands before and between their scans.

Pillow and libjpeg read a picture by the same steps as this module: a part of the file counts as what they take it for.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.limits import (
    MAX_EXIF_PARTS,
    MAX_PARTS,
    MAX_SCANNED_PIXELS,
    MAX_STRUCTURE,
    check_amount,
)
from cxr_fastai.images.tiff_header import EXIF, check_exif, read_directory

JPEG_SIGNATURE = b'\xff\xd8'
"""First bytes of a picture."""
END = b'\xff\xd9'
"""Last bytes of a picture, which may be followed by zeros."""
MARKER = re.compile(rb'\xff[\xc0-\xcf\xd8-\xfe]')
"""A marker of a segment. Everything else before it is skipped: fill bytes, restart markers, `FF 00`, pixels."""
MARKER_BYTES = 2
FILL_BYTES = b'\xff' * (MAX_STRUCTURE + 1)
"""A run of fill bytes that is too long."""
LONE = frozenset((0xC8, 0xD8, 0xD9, *range(0xF0, 0xFE)))
"""Markers that Pillow reads without a length. libjpeg refuses them, except for the end of the picture."""
LONE_IN_JPEGLS = frozenset((0xD8, 0xD9))
START_OF_SCAN = 0xDA
END_OF_PICTURE = 0xD9
APP1, APP2, COMMENT = 0xE1, 0xE2, 0xFE
METADATA = (*range(0xE0, 0xF0), COMMENT)
"""Markers of application data and comments."""
FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
"""Markers of frame headers, SOF0 to SOF15."""
SOF55 = 0xF7
"""Marker of the frame header of JPEG-LS."""
FRAME = struct.Struct('>BHHB')
"""A frame header: bits per sample, height, width, number of components."""
MPF = b'MPF\0'
"""Start of the APP2 segment that lists several pictures in a file."""


class Segment(NamedTuple):
    """A segment of a picture: its marker, its contents, and its end in the file.

    `skipped` is the number of bytes between the segment before and this one.
    """

    kind: int
    body: memoryview
    end: int
    skipped: int


class CodestreamHeader(NamedTuple):
    """What a compressed picture says of itself: width and height in pixels, components, and bits per sample."""

    width: int
    height: int
    components: int
    bits: int


def check_jpeg(data: bytes) -> None:
    """Raise `ImageError` E_TOO_LARGE for a JPEG file with more metadata or tables than any picture needs.

    Pillow would copy and join them before it tells the size of the picture.
    """
    exif = bytearray()
    exif_parts = 0
    for segment in jpeg_segments(data):
        if segment.kind == APP1 and segment.body[: len(EXIF)] == EXIF:
            exif_parts += 1
            exif += segment.body[len(EXIF) :]  # Pillow joins them
        elif segment.kind == APP2 and segment.body[: len(MPF)] == MPF:
            _check_picture_list(bytes(segment.body[len(MPF) :]))
        if exif_parts > MAX_EXIF_PARTS:
            raise ImageError(f'EXIF data in more than {MAX_EXIF_PARTS} segments', 'E_TOO_LARGE')
    check_exif(exif)


def _check_picture_list(data: bytes) -> None:
    """Raise `ImageError` E_TOO_LARGE if the tags of a list of pictures share bytes; Pillow converts all of them."""
    try:
        directory = read_directory(data)
    except ImageError as error:
        if error.code == 'E_TOO_LARGE':
            raise
        return
    if directory.size > len(data):
        raise ImageError(f'a list of pictures with {directory.size:,} bytes in {len(data):,}', 'E_TOO_LARGE')


def check_scans(data: bytes, width: int, height: int) -> None:
    """Raise `ImageError` E_TIMEOUT for a JPEG with so many scans that decoding it would take minutes.

    `width` and `height` are in pixels. Raises E_TOO_LARGE for too many segments between the scans, and for a long run
    of fill bytes, which Pillow gives to libjpeg again with every block of the file that it reads.
    """
    if FILL_BYTES in data:
        raise ImageError(f'more than {MAX_STRUCTURE:,} fill bytes in a run', 'E_TOO_LARGE')
    max_scans = MAX_SCANNED_PIXELS // max(width * height, 1)
    scans, _ = count_scans(data, max_scans=max_scans)
    if scans > max_scans:
        raise ImageError(
            f'more than {max_scans:,} progressive scans of {width}x{height} would take too long to decode', 'E_TIMEOUT'
        )


def count_scans(data: bytes, start: int = 0, stop: int | None = None, max_scans: int = MAX_PARTS) -> tuple[int, int]:
    """Return the number of scans of the picture from `start` to `stop`, and that of its segments.

    Counting ends at more than `max_scans` scans. Raises `ImageError` E_TOO_LARGE for too many other segments, or too
    many bytes of them before the first scan.
    """
    stop = len(data) if stop is None else stop
    segments = list(jpeg_segments(data, start, stop))
    if not segments or segments[-1].kind != START_OF_SCAN:
        return 0, len(segments)
    scans, further_segments = count_further_scans(data, segments[-1].end, stop, max_scans - 1)
    return 1 + scans, len(segments) + further_segments


def count_further_scans(data: bytes, start: int, stop: int, max_scans: int = MAX_PARTS) -> tuple[int, int]:
    """Return the number of scans and of segments from `start`, within the pixels of a scan, to the end of the picture.

    Counting ends at more than `max_scans` scans. Raises `ImageError` E_TOO_LARGE for too many other segments.
    """
    scans = segments = 0
    segment = _find_segment(data, start, stop)
    while segment is not None and segment.kind != END_OF_PICTURE and scans <= max_scans:
        segments += 1
        scans += segment.kind == START_OF_SCAN
        check_amount(0, segments - scans)
        segment = _find_segment(data, segment.end, stop)
    return scans, segments


def jpeg_segments(
    data: bytes, start: int = 0, stop: int | None = None, lone: frozenset[int] = LONE
) -> Iterator[Segment]:
    """Yield the segments of the picture from `start` to `stop` up to the header of its first scan.

    `lone` are the markers without a length. Raises `ImageError` E_TOO_LARGE for more segments, metadata or other bytes
    than any picture needs.
    """
    stop = len(data) if stop is None else stop
    position = start + len(JPEG_SIGNATURE)
    metadata = structure = 0
    for number in range(1, MAX_PARTS + 2):
        segment = _find_segment(data, position, stop, MAX_STRUCTURE, lone)
        if segment is None:
            return
        size = segment.end - position - segment.skipped
        is_metadata = segment.kind in METADATA
        metadata += size if is_metadata else 0
        structure += segment.skipped + (0 if is_metadata else size)
        check_amount(metadata, number)
        _check_structure(structure)
        yield segment
        if segment.kind == START_OF_SCAN:
            return
        position = segment.end


def _find_segment(
    data: bytes, position: int, stop: int, max_skipped: int | None = None, lone: frozenset[int] = LONE
) -> Segment | None:
    """Return the first segment from `position` on, None if there is none before `stop`.

    Raises `ImageError` E_TOO_LARGE if there are more than `max_skipped` bytes before it.
    """
    end = stop if max_skipped is None else min(stop, position + max_skipped + MARKER_BYTES)
    match = MARKER.search(data, position, end)
    if match is None:
        if max_skipped is not None:
            _check_structure(stop - position)
        return None
    kind = data[match.start() + 1]
    begin = end = match.end()
    if kind not in lone:
        end += max(int.from_bytes(data[begin : begin + 2], 'big'), 2)
        begin += 2
    return Segment(kind, memoryview(data)[begin : min(end, stop)], end, match.start() - position)


def _check_structure(size: int) -> None:
    if size > MAX_STRUCTURE:
        raise ImageError(f'{size:,} bytes of tables and fill bytes are over {MAX_STRUCTURE:,}', 'E_TOO_LARGE')


def read_jpeg_header(data: bytes) -> CodestreamHeader:
    """Return the frame header of a JPEG picture. Raises `ImageError` E_TRUNCATED unless it has exactly one."""
    frames = [segment for segment in jpeg_segments(data) if segment.kind in FRAMES]
    if len(frames) != 1 or len(frames[0].body) < FRAME.size:
        raise ImageError('truncated or damaged: not one JPEG header', 'E_TRUNCATED')
    return _parse_frame(frames[0])


def read_jpegls_header(data: bytes) -> CodestreamHeader:
    """Return the frame header of a JPEG-LS picture.

    Raises `ImageError` E_TRUNCATED if the header or the end is missing. CharLS searches for seconds behind the end of
    the memory if no marker ends the pixels.
    """
    if not data.rstrip(b'\0').endswith(END):
        raise ImageError('truncated or damaged: the JPEG-LS picture has no end', 'E_TRUNCATED')
    for segment in jpeg_segments(data, lone=LONE_IN_JPEGLS):
        if segment.kind == SOF55 and len(segment.body) >= FRAME.size:
            return _parse_frame(segment)
    raise ImageError('truncated or damaged: no JPEG-LS header', 'E_TRUNCATED')


def _parse_frame(segment: Segment) -> CodestreamHeader:
    bits, height, width, components = FRAME.unpack_from(segment.body)
    return CodestreamHeader(width, height, components, bits)
