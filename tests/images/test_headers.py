"""Strips and tiles of TIFF files are bounded, and directories are read as Pillow reads them."""

import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from imagefiles import DEEP, GREY, encoded, header_code, progressive_with, within
from PIL import Image

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.decode import decode_image

Value = int | Callable[[int], int]
"""The value of a tag, or a function of the position of the data behind the directory."""
SIDE = 2000
OLD_JPEG, JPEG = 6, 7


def tiff(tags: dict[int, tuple[int, int, Value]], blob: bytes, order: str = '<') -> bytes:
    """Return a TIFF file with the data `blob` behind its directory. A tag has a type, a count and a value."""
    start = 8 + 2 + 12 * len(tags) + 4
    head = (b'II' if order == '<' else b'MM') + struct.pack(f'{order}HIH', 42, 8, len(tags))
    entries = b''.join(_entry(tag, *fields, start, order) for tag, fields in sorted(tags.items()))
    return head + entries + bytes(4) + blob


def _entry(tag: int, kind: int, count: int, value: Value, start: int, order: str) -> bytes:
    number = value if isinstance(value, int) else value(start)
    field = struct.pack(f'{order}HH', number, 0) if kind == 3 and count == 1 else struct.pack(f'{order}I', number)
    return struct.pack(f'{order}HHI', tag, kind, count) + field


def picture_tags(width: int, height: int, compression: int) -> dict[int, tuple[int, int, Value]]:
    return {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, 1, 8),
        259: (3, 1, compression),
        262: (3, 1, 1),
        277: (3, 1, 1),
    }


def striped(strips: list[bytes], width: int, height: int, rows: int, order: str = '<', **more) -> bytes:
    """Return a TIFF file whose strips are JPEG pictures."""
    offsets = np.cumsum([0, *[len(strip) for strip in strips[:-1]]])
    blob = b''.join(strips)
    n = len(strips)
    tags = picture_tags(width, height, JPEG) | {278: (4, 1, rows)}
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    if n == 1:
        return tiff(tags | {273: (4, 1, start), 279: (4, 1, len(blob))}, blob, order)
    places = struct.pack(f'{order}{n}I', *(offsets + start + 8 * n))
    sizes = struct.pack(f'{order}{n}I', *[len(strip) for strip in strips])
    tags |= {273: (4, n, start), 279: (4, n, start + 4 * n)}
    return tiff(tags, places + sizes + blob, order)


def tiled(tiles: list[bytes], width: int, height: int, side: int) -> bytes:
    """Return a TIFF file whose tiles are JPEG pictures."""
    n = len(tiles)
    offsets = np.cumsum([0, *[len(tile) for tile in tiles[:-1]]])
    tags = picture_tags(width, height, JPEG) | {322: (4, 1, side), 323: (4, 1, side)}
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    places = struct.pack(f'<{n}I', *(offsets + start + 8 * n))
    sizes = struct.pack(f'<{n}I', *[len(tile) for tile in tiles])
    return tiff(tags | {324: (4, n, start), 325: (4, n, start + 4 * n)}, places + sizes + b''.join(tiles))


def old_jpeg(jpeg: bytes, extra: bytes = b'') -> bytes:
    """Return a TIFF file with the obsolete compression, which has one colour JPEG; `extra` follows its pixels."""
    scan = jpeg.index(b'\xff\xda')
    scan += 2 + int.from_bytes(jpeg[scan + 2 : scan + 4], 'big')
    tags = picture_tags(80, 96, OLD_JPEG) | {
        262: (3, 1, 6),
        273: (4, 1, lambda start: start + scan),
        277: (3, 1, 3),
        278: (4, 1, 96),
        279: (4, 1, len(jpeg) - scan + len(extra)),
        513: (4, 1, lambda start: start),
        514: (4, 1, len(jpeg)),
        530: (3, 2, 1 | 1 << 16),
    }
    return tiff(tags, jpeg + extra)


COLOUR = encoded(Image.fromarray(GREY).convert('RGB'), 'JPEG', subsampling=0)


def test_the_scans_of_strips_and_tiles_are_bounded():
    scans = progressive_with(60, 80)
    plain = progressive_with(0, 80)
    assert header_code(striped([progressive_with(100, SIDE)], SIDE, SIDE, SIDE)) == 'E_TIMEOUT'
    assert header_code(striped([progressive_with(5, SIDE)], SIDE, SIDE, SIDE)) == 'ok'
    assert header_code(striped([plain] * 100, 80, 8000, 80)) == 'ok'
    # Each strip is within the limit of a picture, but not all of them together.
    assert header_code(striped([scans] * 1000, 80, 80_000, 80)) == 'E_TIMEOUT'
    assert header_code(tiled([scans] * 1000, 2560, 2560, 80)) == 'E_TIMEOUT'
    assert header_code(tiled([plain] * 1000, 2560, 2560, 80)) == 'ok'


def test_the_bytes_of_a_scan_marker_in_the_metadata_of_a_strip_are_no_scan():
    comment = b'\xff\xfe' + struct.pack('>H', 60_002) + b'\xff\xda' * 30_000
    jpeg = encoded(GREY, 'JPEG')
    assert header_code(striped([jpeg[:2] + comment + jpeg[2:]], 80, 96, 96)) == 'ok'


@pytest.mark.parametrize('order', ['<', '>'])
def test_usual_strips_are_decoded(order):
    parts = [encoded(GREY[row : row + 32], 'JPEG', quality=95) for row in (0, 32, 64)]
    for data in (striped(parts, 80, 96, 32, order), striped([encoded(GREY, 'JPEG', quality=95)], 80, 96, 96, order)):
        assert within(8, decode_image(data).pixels, GREY)


@pytest.mark.parametrize('options', [{}, {'quality': 90}, {'strip_size': 2000}])
def test_files_of_pillow_are_decoded(options):
    assert within(40, decode_image(encoded(GREY, 'TIFF', compression='jpeg', **options)).pixels, GREY)


def test_strips_that_share_bytes_or_leave_the_file_are_refused():
    jpeg = encoded(GREY, 'JPEG')
    data = bytearray(striped([jpeg] * 4, 80, 384, 96))
    n = data.index(struct.pack('<HHI', 279, 4, 4))
    (sizes,) = struct.unpack_from('<I', data, n + 8)
    for size in (len(jpeg) * 4, 2**31, 2**32 - 1):
        changed = data[:sizes] + struct.pack('<4I', *[size] * 4) + data[sizes + 16 :]
        assert header_code(bytes(changed)) == 'E_TRUNCATED'
    missing = data[:n] + struct.pack('<H', 65_000) + data[n + 2 :]
    assert header_code(bytes(missing)) == 'E_TRUNCATED'


def test_many_strips_and_many_segments_are_refused():
    tags = picture_tags(80, 96, JPEG) | {278: (4, 1, 1), 273: (1, 60_000, 8), 279: (1, 60_000, 8)}
    assert header_code(tiff(tags, bytes(60_000))) == 'E_TOO_LARGE'
    jpeg = encoded(np.zeros((8, 8), np.uint8), 'JPEG')
    filled = jpeg[:2] + b'\xff\xfe\0\2' * 1900 + jpeg[2:]
    assert header_code(striped([filled] * 200, 8, 1600, 8)) == 'E_TOO_LARGE'


def test_the_obsolete_jpeg_compression_is_bounded_too():
    assert decode_image(old_jpeg(COLOUR)).mode == 'RGB'
    scan = COLOUR[COLOUR.index(b'\xff\xda') :].removesuffix(b'\xff\xd9')
    pixels = COLOUR.removesuffix(b'\xff\xd9')
    assert header_code(old_jpeg(pixels, scan * 3)) == 'ok'
    data = old_jpeg(pixels, b'\xff\xda\0\2' * 1000)
    large = bytearray(data)
    for tag in (256, 257):
        place = data.index(struct.pack('<HHI', tag, 4, 1)) + 8
        large[place : place + 4] = struct.pack('<I', SIDE)
    assert header_code(bytes(large)) == 'E_TIMEOUT'
    assert header_code(old_jpeg(COLOUR[:2] + b'\xff\xfe\0\2' * 3000 + COLOUR[2:])) == 'E_TOO_LARGE'
    assert header_code(old_jpeg(pixels, b'\xff\xfe\0\2' * 3000)) == 'E_TOO_LARGE'


@pytest.mark.parametrize('tag', [256, 257, 259, 273, 279, 278])
def test_a_tag_that_occurs_twice_is_refused_where_it_decides(tag):
    data = striped([encoded(GREY, 'JPEG')], 80, 96, 96)
    (count,) = struct.unpack_from('<H', data, 8)
    place = next(10 + 12 * i for i in range(count) if struct.unpack_from('<H', data, 10 + 12 * i) == (tag,))
    entry = data[place : place + 12]
    changed = data[:8] + struct.pack('<H', count + 1) + data[10:place] + entry + data[place:]
    assert header_code(changed) == 'E_TRUNCATED'


DEFLATE, SEPARATE = 8, 2


def parts_code(size: tuple[int, int], compression: int = DEFLATE, **tags: int) -> str:
    """Return the error code of the header of a TIFF file with the tags `t...`, whose parts share their bytes."""
    more = {int(name[1:]): (4, 1, value) for name, value in tags.items()}
    return header_code(tiff(picture_tags(*size, compression) | more, b''))


@pytest.mark.parametrize('compression', [1, DEFLATE])
@pytest.mark.parametrize(
    ('size', 'tags', 'code'),
    [
        ((12_640, 3160), {'t322': 16, 't323': 2_499_999}, 'E_TOO_LARGE'),
        ((3160, 12_640), {'t322': 2_499_999, 't323': 16}, 'E_TOO_LARGE'),
        ((12_640, 3160), {'t322': 16, 't323': 16}, 'ok'),
        ((12_640, 3160), {'t322': 1, 't323': 1}, 'E_TOO_LARGE'),
        ((6300, 6300), {'t322': 6299, 't323': 6299}, 'ok'),
        ((6300, 6300), {'t278': 6299, 't273': 8}, 'ok'),
        ((6300, 6300), {'t278': 2**32 - 1, 't273': 8}, 'ok'),
        ((6300, 6300), {'t278': 1, 't273': 8, 't284': SEPARATE, 't277': 3}, 'ok'),
        ((6300, 6300), {'t278': 1, 't273': 8, 't284': SEPARATE, 't277': 60_000}, 'E_TOO_LARGE'),
        ((512, 512), {'t322': 16, 't323': 16, 't284': SEPARATE, 't277': 2000}, 'E_TOO_LARGE'),
        ((512, 512), {'t322': 0, 't323': 16}, 'E_TRUNCATED'),
        ((512, 512), {'t323': 16}, 'E_TRUNCATED'),
        ((512, 512), {'t278': 0, 't273': 8}, 'E_TRUNCATED'),
        ((80, 96), {'t322': 512, 't323': 512}, 'ok'),
    ],
)
def test_the_pixels_of_all_strips_and_tiles_are_bounded(compression, size, tags, code):
    assert parts_code(size, compression, **tags) == code


def test_raw_strips_that_the_picture_does_not_have_are_refused():
    tags = picture_tags(80, 96, 1)
    strips = {278: (4, 1, 95), 273: (1, 100_000, lambda start: start)}
    assert header_code(tiff(tags | strips, bytes(100_000))) == 'E_TRUNCATED'
    assert header_code(tiff(tags | strips | {273: (1, 2, 8)}, b'')) == 'ok'
    assert header_code(tiff(tags | strips | {278: (4, 1, 96)}, bytes(100_000))) == 'ok', 'Pillow reads only the last'


def test_one_stream_that_all_tiles_share_is_not_inflated_for_each():
    stream = zlib.compress(bytes(39_999_984), 9)
    tags = picture_tags(12_640, 3160, DEFLATE) | {322: (4, 1, 16), 323: (4, 1, 2_499_999)}
    tags |= {324: (4, 790, lambda start: start), 325: (4, 790, lambda start: start + 4 * 790)}
    place = 8 + 2 + 12 * len(tags) + 4 + 8 * 790
    lists = struct.pack('<1580I', *[place] * 790, *[len(stream)] * 790)
    start = time.monotonic()
    with pytest.raises(ImageError, match=r'31,599,987,360 pixels in total are over 160,000,000'):
        decode_image(tiff(tags, lists + stream))
    assert time.monotonic() - start < 10


def test_the_size_of_a_tile_outside_its_entry_is_read():
    tags = picture_tags(80, 96, 1) | {322: (16, 1, lambda start: start), 323: (16, 1, lambda start: start)}
    assert header_code(tiff(tags, struct.pack('<Q', 60_000))) == 'E_TOO_LARGE'


def test_the_byte_order_of_a_big_tiff_file_is_that_of_pillow():
    little = encoded(DEEP, 'TIFF', big_tiff=True)
    assert little.startswith(b'II+\0')
    assert decode_image(little).bits == 16
    with pytest.raises(ImageError) as caught:
        decode_image(b'MM\0+' + little[4:])
    assert caught.value.code == 'E_FORMAT'
