"""Headers of JPEG 2000 pictures, and the limits of the work that they demand of a decoder.

The pixels are divided into tiles, components, resolutions, precincts and code blocks, and every layer of a precinct is
a packet. A header of a few bytes can declare billions of them, for which OpenJPEG reserves memory. The names are those
of ISO/IEC 15444-1, annexes A and B.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.jpeg_header import CodestreamHeader
from cxr_fastai.images.limits import (
    MAX_BLOCKS,
    MAX_BOXES,
    MAX_CODINGS,
    MAX_INCLUSIONS,
    MAX_MARKERS,
    MAX_PACKETS,
    MAX_PRECINCTS,
    MAX_TILES,
)

CODESTREAM = b'\xff\x4f\xff\x51'
"""First bytes of a codestream: the markers SOC and SIZ."""
JP2 = b'\0\0\0\x0cjP  '
"""First bytes of a JP2 file, whose boxes contain a codestream."""
SIZE = struct.Struct('>4x4x8IH')
"""The segment SIZ behind SOC, up to its first component."""
COMPONENT = struct.Struct('>B2x')
SOT, SOD, COD, COC, POC = 0xFF90, 0xFF93, 0xFF52, 0xFF53, 0xFF5F
SEGMENTS = frozenset(
    (SOT, COD, COC, POC, *range(0xFF50, 0xFF52), *range(0xFF55, 0xFF5A), 0xFF5C, 0xFF5D, 0xFF5E, 0xFF60, 0xFF61)
    + (0xFF63, 0xFF64, 0xFF74, 0xFF75, 0xFF77, 0xFF78)
)
"""Markers with a length. OpenJPEG skips others in steps of two bytes, so they are refused."""
TILE_PART = struct.Struct('>HI')
"""The segment SOT up to the length of the tile part, which counts from the marker."""
DEFAULT_PRECINCT = 15
"""Exponent of the width and height of precincts that are not declared."""
POC_BYTES = 7
"""Smallest number of bytes of a change of the order of packets."""


class Grid(NamedTuple):
    """The segment SIZ: the area of the picture and its tiles on the reference grid, and the number of components."""

    right: int
    bottom: int
    left: int
    top: int
    tile_width: int
    tile_height: int
    tile_left: int
    tile_top: int
    components: int

    @property
    def columns(self) -> np.ndarray:
        """First and last position, exclusive, of each column of tiles: int64 (2, n)."""
        return _divide(self.left, self.right, self.tile_left, self.tile_width)

    @property
    def rows(self) -> np.ndarray:
        """First and last position, exclusive, of each row of tiles: int64 (2, n)."""
        return _divide(self.top, self.bottom, self.tile_top, self.tile_height)


class Coding(NamedTuple):
    """A segment COD or COC: layers, levels of decomposition, exponents of the code blocks, exponents of the precincts.

    `precincts` are those of each resolution from the smallest on, width and height.
    """

    layers: int
    levels: int
    block: tuple[int, int]
    precincts: tuple[tuple[int, int], ...]


def read_j2k_header(data: bytes) -> CodestreamHeader:
    """Return the header of a JPEG 2000 picture, with or without the boxes of a JP2 file around it.

    The bits are the largest of all components. Raises `ImageError` E_TRUNCATED for a damaged one.
    """
    start = _find_codestream(data)
    grid = _read_grid(data, start)
    first = start + SIZE.size
    n_complete = min(grid.components, (len(data) - first) // COMPONENT.size)
    depths = [depth for (depth,) in COMPONENT.iter_unpack(data[first : first + n_complete * COMPONENT.size])]
    if not depths:
        raise ImageError('truncated or damaged: no JPEG 2000 components', 'E_TRUNCATED')
    bits = max((depth & 0x7F) + 1 for depth in depths)
    return CodestreamHeader(grid.right - grid.left, grid.bottom - grid.top, grid.components, bits)


def check_j2k(data: bytes) -> None:
    """Raise `ImageError` E_TOO_LARGE for more tiles, precincts, code blocks or packets than a picture needs.

    The settings of any tile or component are taken for those of all.
    """
    start = _find_codestream(data)
    grid = _read_grid(data, start)
    n_columns = -(-(grid.right - grid.tile_left) // grid.tile_width)
    n_rows = -(-(grid.bottom - grid.tile_top) // grid.tile_height)
    _check('tiles', n_columns * n_rows, MAX_TILES)
    codings: set[Coding] = set()
    orders = 1
    for marker, body in _segments(data, start):
        if marker == POC:
            orders += -(-len(body) // POC_BYTES)
        elif marker in (COD, COC):
            codings.add(_parse_coding(marker, body, grid.components))
        _check('settings of components', len(codings), MAX_CODINGS)
    layers = max((coding.layers for coding in codings), default=1)
    for coding in codings:
        _check_coding(coding, grid, layers, orders)


def _check(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise ImageError(f'{count:,} {what} are over {limit:,}', 'E_TOO_LARGE')


def _check_coding(coding: Coding, grid: Grid, layers: int, orders: int) -> None:
    """Raise `ImageError` E_TOO_LARGE if all components in this `coding` have too many parts."""
    columns, rows = grid.columns, grid.rows
    precincts = blocks = 0
    for resolution, (x, y) in enumerate(coding.precincts):
        shift = coding.levels - resolution
        precincts += _count(columns, shift, x) * _count(rows, shift, y)
        # All resolutions but the first have three bands, of half the size.
        bands, half = (3, 1) if resolution else (1, 0)
        block_x = max(min(coding.block[0], x - half), 0)
        block_y = max(min(coding.block[1], y - half), 0)
        blocks += bands * _count(columns, shift + half, block_x) * _count(rows, shift + half, block_y)
        _check('JPEG 2000 precincts', precincts * grid.components, MAX_PRECINCTS)
        _check('JPEG 2000 code blocks', blocks * grid.components, MAX_BLOCKS)
    _check('JPEG 2000 code blocks in all layers', blocks * layers * grid.components, MAX_INCLUSIONS)
    # OpenJPEG visits all positions at which any precinct may begin, for each component and resolution.
    shifts = [coding.levels - resolution for resolution in range(coding.levels + 1)]
    step_x = min(x + shift for (x, _), shift in zip(coding.precincts, shifts, strict=True))
    step_y = min(y + shift for (_, y), shift in zip(coding.precincts, shifts, strict=True))
    positions = _count(columns, 0, step_x) * _count(rows, 0, step_y) * len(shifts)
    _check('JPEG 2000 packets', (positions + precincts * layers) * grid.components * orders, MAX_PACKETS)


def _count(spans: np.ndarray, shift: int, exponent: int) -> int:
    """Return in how many parts of 2**`exponent` all `spans` (2, n) fall, after they are reduced by 2**`shift`."""
    first, last = -(-spans >> shift)
    parts = -(-last >> exponent) - (first >> exponent)
    return int(parts[last > first].sum())


def _divide(start: int, stop: int, origin: int, size: int) -> np.ndarray:
    """Return the spans of the tiles of `size` from `origin` on, within the picture from `start` to `stop`."""
    edges = np.arange(origin, stop, size, dtype=np.int64)
    return np.stack([np.maximum(edges, start), np.minimum(edges + size, stop)])


def _parse_coding(marker: int, body: bytes, components: int) -> Coding:
    """Return the contents of a segment COD or COC. Raises `ImageError` E_TRUNCATED for a damaged one."""
    try:
        if marker == COD:
            style, _, layers, _ = struct.unpack_from('>BBHB', body)
            start = 5
        else:
            start = 2 if components < 257 else 3
            style, layers = body[start - 1], 1
        levels, width, height, _, _ = struct.unpack_from('>5B', body, start)
    except (struct.error, IndexError) as error:
        raise ImageError('truncated or damaged: JPEG 2000 settings end early', 'E_TRUNCATED') from error
    start += 5
    precincts = [(DEFAULT_PRECINCT, DEFAULT_PRECINCT)] * (levels + 1)
    if style & 1:
        precincts = [(value & 0xF, value >> 4) for value in body[start : start + levels + 1]]
    if len(precincts) != levels + 1 or levels > 32:
        raise ImageError(f'truncated or damaged: JPEG 2000 precincts of {levels} levels', 'E_TRUNCATED')
    return Coding(layers, levels, ((width & 0xF) + 2, (height & 0xF) + 2), tuple(precincts))


def _segments(data: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield the marker and the contents of each segment in the main header and in the headers of all tile parts."""
    position = start + 2
    part_end = 0
    is_between_parts = False
    for _ in range(MAX_MARKERS):
        marker = int.from_bytes(data[position : position + 2], 'big')
        if position + 4 > len(data) or (is_between_parts and marker != SOT):
            return
        is_between_parts = marker == SOD
        if marker == SOD:
            if not part_end:
                return  # the last part
            position = max(part_end, position + 2)
            continue
        length = int.from_bytes(data[position + 2 : position + 4], 'big')
        if marker not in SEGMENTS or length < 2:
            raise ImageError(f'truncated or damaged: JPEG 2000 marker {marker:04x}', 'E_TRUNCATED')
        body = data[position + 4 : position + 2 + length]
        if marker == SOT and len(body) >= TILE_PART.size:
            _, part_length = TILE_PART.unpack_from(body)
            part_end = position + part_length if part_length else 0
        yield marker, body
        position += 2 + length
    raise ImageError(f'more than {MAX_MARKERS:,} JPEG 2000 segments', 'E_TOO_LARGE')


def _read_grid(data: bytes, start: int) -> Grid:
    try:
        grid = Grid(*SIZE.unpack_from(data, start))
    except struct.error as error:
        raise ImageError('truncated or damaged: no JPEG 2000 header', 'E_TRUNCATED') from error
    has_pixels = grid.tile_left <= grid.left < grid.right and grid.tile_top <= grid.top < grid.bottom
    if not (has_pixels and grid.tile_width and grid.tile_height):
        raise ImageError('truncated or damaged: JPEG 2000 tiles without pixels', 'E_TRUNCATED')
    return grid


def _find_codestream(data: bytes) -> int:
    """Return the position of the codestream, which may be in a box of a JP2 file.

    Raises `ImageError` E_TRUNCATED if there is none, E_TOO_LARGE for many boxes, and E_DICOM_CORRUPT for a palette,
    which would multiply the components.
    """
    if data.startswith(CODESTREAM):
        return 0
    for kind, start, stop in _boxes(data, 0, len(data)):
        if kind == b'jp2h' and any(kind == b'pclr' for kind, _, _ in _boxes(data, start, stop)):
            raise ImageError('a JPEG 2000 picture with a palette is not supported', 'E_DICOM_CORRUPT')
        if kind == b'jp2c' and data.startswith(CODESTREAM, start):
            return start
    raise ImageError('truncated or damaged: no JPEG 2000 codestream', 'E_TRUNCATED')


def _boxes(data: bytes, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind of each box from `start` to `stop`, and the start and the end of its contents."""
    for _ in range(MAX_BOXES):
        if start + 8 > stop:
            return
        length, kind = struct.unpack_from('>I4s', data, start)
        head = 8
        if length == 1:
            head = 16
            length = int.from_bytes(data[start + 8 : start + head], 'big')
        end = start + length if length else stop
        if end < start + head:
            return
        yield kind, start + head, min(end, stop)
        start = end
    raise ImageError(f'more than {MAX_BOXES:,} JPEG 2000 boxes', 'E_TOO_LARGE')
