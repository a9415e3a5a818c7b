"""The work that the header of a JPEG 2000 picture demands is bounded, and usual settings pass."""

import struct
from functools import partial

import numpy as np
import pytest
from imagefiles import GREY, dicom, encoded, error_code, smooth
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.decode import decode_image
from cxr_fastai.images.j2k_header import check_j2k, read_j2k_header
from cxr_fastai.images.jpeg_header import CodestreamHeader

CODESTREAM = b'\xff\x4f\xff\x51'
LARGE = (6300, 6200)
"""Width and height near the largest number of pixels."""


code_of = partial(error_code, check_j2k)


def j2k(picture: np.ndarray = GREY, **options) -> bytes:
    """Return a codestream without the boxes of a JP2 file."""
    return encoded(picture, 'JPEG2000', no_jp2=True, **options)


def resized(data: bytes, width: int, height: int) -> bytes:
    """Return the picture with a header that declares another size. The only tile of a picture grows with it."""
    place = data.index(CODESTREAM) + 8
    old = data[place : place + 8]
    new = struct.pack('>II', width, height)
    tile = data[place + 16 : place + 24]
    return data[:place] + new + data[place + 8 : place + 16] + (new if tile == old else tile) + data[place + 24 :]


def with_segments(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """Return the codestream with segments before its first tile part."""
    place = data.index(b'\xff\x90')
    return data[:place] + b''.join(_segment(*segment) for segment in segments) + data[place:]


def with_tile_segment(data: bytes, marker: int, body: bytes) -> bytes:
    """Return the codestream with a segment in the header of its last tile part."""
    start = data.rindex(b'\xff\x90')
    place = data.index(b'\xff\x93', start)
    segment = _segment(marker, body)
    length = int.from_bytes(data[start + 6 : start + 10], 'big') + len(segment)
    return data[: start + 6] + struct.pack('>I', length) + data[start + 10 : place] + segment + data[place:]


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack('>HH', marker, len(body) + 2) + body


def coding(layers=1, levels=5, block=(4, 4), precincts=b'', order=0) -> bytes:
    """Return the contents of a segment COD. `block` are the exponents of the code blocks less 2."""
    style = 1 if precincts else 0
    return struct.pack('>BBHB5B', style, order, layers, 0, levels, *block, 0, 1) + precincts


def coded(cod: bytes) -> bytes:
    """Return the codestream of a small picture with another segment COD in place of its own."""
    data = j2k()
    place = data.index(b'\xff\x52')
    end = place + 2 + int.from_bytes(data[place + 2 : place + 4], 'big')
    return data[:place] + _segment(0xFF52, cod) + data[end:]


COLOUR = np.stack([smooth(64, 64, seed) for seed in range(3)], 2)
USUAL = {
    'default': {},
    'tiles of 256': {'tile_size': (256, 256)},
    'tiles of 512, 8 resolutions': {'tile_size': (512, 512), 'num_resolutions': 8},
    'tiles of 1024, precincts of 256': {'tile_size': (1024, 1024), 'precinct_size': (256, 256)},
    'precincts of 128': {'precinct_size': (128, 128)},
    'precincts of 256, by position': {'precinct_size': (256, 256), 'progression': 'PCRL'},
    'precincts of 128, by component': {'precinct_size': (128, 128), 'progression': 'CPRL'},
    'code blocks of 32': {'codeblock_size': (32, 32)},
    'code blocks of 16': {'codeblock_size': (16, 16)},
    '12 layers': {'quality_layers': [200 / 1.5**i for i in range(12)], 'irreversible': True},
    '12 layers, precincts of 256': {
        'quality_layers': [200 / 1.5**i for i in range(12)],
        'precinct_size': (256, 256),
        'irreversible': True,
    },
}


@pytest.mark.parametrize('options', USUAL.values(), ids=USUAL)
@pytest.mark.parametrize('picture', [smooth(64, 64), COLOUR], ids=['grey', 'colour'])
def test_usual_settings_pass_up_to_the_largest_size(picture, options):
    data = j2k(picture, **options)
    assert code_of(data) == 'ok'
    assert code_of(resized(data, *LARGE)) == 'ok'
    assert read_j2k_header(resized(data, *LARGE))[:2] == LARGE


@pytest.mark.parametrize('options', USUAL.values(), ids=USUAL)
def test_usual_settings_are_decoded(options):
    data = dicom(GREY, JPEG2000Lossless, encapsulate([j2k(**options)]))
    assert decode_image(data).pixels.shape == GREY.shape


@pytest.mark.parametrize(
    'cod',
    [
        coding(levels=0, precincts=b'\x00'),
        coding(levels=1, precincts=b'\x00\x11'),
        coding(levels=5, precincts=b'\xff' * 5 + b'\x22'),
        coding(levels=1, precincts=b'\xf1\x1f'),
        coding(block=(0, 0)),
        coding(layers=65_535),
        coding(layers=65_535, levels=32),
    ],
    ids=['1x1', '1x1 and 2x2', '4x4 in the last resolution', 'narrow', 'code blocks of 4', 'layers', 'levels'],
)
def test_a_header_that_demands_much_work_is_refused(cod):
    data = coded(cod)
    assert code_of(resized(data, *LARGE)) == 'E_TOO_LARGE'
    # The settings of one component, or of one tile, count as those of all.
    assert code_of(resized(with_tile_segment(j2k(), 0xFF52, cod), *LARGE)) == 'E_TOO_LARGE'
    if cod[2:4] == b'\0\1':  # a component has no layers of its own
        component = with_segments(j2k(), (0xFF53, b'\0' + cod[:1] + cod[5:]))
        assert code_of(resized(component, *LARGE)) == 'E_TOO_LARGE'


def test_one_by_one_precincts_in_a_dicom_file_are_refused_before_decoding():
    rows = np.linspace(0, 255, 2000, dtype=np.uint8)[:, None].repeat(2000, 1)
    frame = resized(coded(coding(levels=0, precincts=b'\x00')), 2000, 2000)
    with pytest.raises(ImageError) as caught:
        decode_image(dicom(rows, JPEG2000Lossless, encapsulate([frame])))
    assert caught.value.code == 'E_TOO_LARGE'


def test_small_tiles_and_many_changes_of_the_order_are_refused():
    tiles = bytearray(resized(j2k(), *LARGE))
    tiles[24:32] = struct.pack('>II', 64, 64)
    assert code_of(bytes(tiles)) == 'E_TOO_LARGE'
    precincts = resized(j2k(precinct_size=(128, 128)), *LARGE)
    order = struct.pack('>BBHBBB', 0, 0, 1, 6, 1, 3)
    assert code_of(with_segments(precincts, (0xFF5F, order))) == 'ok'
    assert code_of(with_segments(precincts, (0xFF5F, order * 200))) == 'E_TOO_LARGE'


def test_the_settings_of_all_tile_parts_count():
    data = j2k(tile_size=(48, 48))
    changed = with_tile_segment(data, 0xFF52, coding(block=(0, 0)))
    for picture, code in ((data, 'ok'), (changed, 'E_TOO_LARGE')):
        large = bytearray(resized(picture, *LARGE))
        large[24:32] = struct.pack('>II', 3200, 3200)
        assert code_of(bytes(large)) == code


def test_bytes_behind_the_last_tile_part_are_ignored():
    data = j2k()
    for tail in (b'', b'\xff\xd9', b'\0' * 50, b'\xff\xd9' + b'\0' * 50, b'\xff'):
        assert code_of(data.removesuffix(b'\xff\xd9') + tail) == 'ok'


def test_segments_that_a_decoder_would_search_are_refused():
    for marker in (0xFF30, 0xFF6F, 0xFF00, 0x1234):
        assert code_of(with_segments(j2k(), (marker, bytes(50)))) == 'E_TRUNCATED'
    assert code_of(with_segments(j2k(), *[(0xFF64, b'')] * 200_000)) == 'E_TOO_LARGE'
    assert code_of(with_segments(j2k(), (0xFF64, b'\0\1a comment'))) == 'ok'


def test_the_boxes_around_a_codestream_are_bounded():
    jp2 = encoded(GREY, 'JPEG2000')
    place = jp2.index(b'jp2c') - 4
    assert code_of(jp2) == 'ok'
    assert read_j2k_header(jp2) == read_j2k_header(j2k()) == CodestreamHeader(80, 96, 1, 8)
    box = struct.pack('>I4s', 8, b'free')
    long_box = struct.pack('>I4sQ', 1, b'free', 16)
    assert code_of(jp2[:place] + box + long_box + jp2[place:]) == 'ok'
    assert code_of(jp2[:place] + box * 5000 + jp2[place:]) == 'E_TOO_LARGE'
    header = jp2.index(b'jp2h') - 4
    length = int.from_bytes(jp2[header : header + 4], 'big')
    palette = struct.pack('>I4sHB', 11, b'pclr', 0, 255)
    changed = struct.pack('>I', length + 11) + jp2[header + 4 : header + length] + palette + jp2[header + length :]
    assert code_of(jp2[:header] + changed) == 'E_DICOM_CORRUPT'
    # The same bytes in a comment are no palette.
    assert code_of(with_segments(j2k(), (0xFF64, b'\0\1pclr'))) == 'ok'


@pytest.mark.parametrize('end', [0, 4, 20, 41, 44])
def test_a_cut_header_is_damaged(end):
    with pytest.raises(ImageError, match='truncated or damaged'):
        read_j2k_header(j2k()[:end])


@pytest.mark.parametrize('place', range(8, 40, 4))
@pytest.mark.parametrize('value', [0, 1, 2**31, 2**32 - 1])
def test_no_position_of_a_header_costs_work(place, value):
    data = bytearray(j2k())
    data[place : place + 4] = struct.pack('>I', value)
    assert code_of(bytes(data)) in ('ok', 'E_TRUNCATED', 'E_TOO_LARGE')
