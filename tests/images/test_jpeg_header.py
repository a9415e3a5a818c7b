"""The segments and scans of a JPEG picture are those that Pillow and libjpeg read, and they are bounded."""

import struct
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imagefiles import DEEP, GREY, compressed, dicom, encoded, error_code, header_code, progressive_with
from PIL import Image
from pydicom import dcmread
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import JPEGLSLossless

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.decode import decode_image
from cxr_fastai.images.jpeg_header import (
    METADATA,
    check_scans,
    count_scans,
    jpeg_segments,
    read_jpeg_header,
    read_jpegls_header,
)
from cxr_fastai.images.limits import MAX_PARTS, MAX_STRUCTURE

JPEG = encoded(GREY, 'JPEG')


def segment(marker: int, body: bytes = b'') -> bytes:
    """Return a segment of a JPEG file."""
    return struct.pack('>BBH', 0xFF, marker, len(body) + 2) + body


def with_header(extra: bytes, jpeg: bytes = JPEG) -> bytes:
    """Return a JPEG file with the bytes `extra` behind its first marker."""
    return jpeg[:2] + extra + jpeg[2:]


def scans_code(data: bytes) -> str:
    """Return the error code of the scans alone, or `ok`."""
    return error_code(lambda jpeg: check_scans(jpeg, 80, 96), data)


COMMENT = segment(0xFE)
HIDDEN = COMMENT * 3000


@pytest.mark.parametrize(
    'extra',
    [
        b'\xff' * 300_000,
        b'\xff\0' * 150_000,
        bytes(300_000),
        b'\xff\xd0' * 150_000,
        b'\xff\xd8' * 3000,
        b'\xff\xd9' + HIDDEN,
        b'\xff\0' + HIDDEN,
        b'a' + HIDDEN,
        b'\xff\xc8' + HIDDEN,
        b'\xff\xf0' + HIDDEN,
        b'\xff\xfd\xff\xff' + HIDDEN,
        segment(0xDB, (b'\0' + bytes(64)) * 500) * 10,
        segment(0xC4, bytes(50_000)) * 5,
        segment(0xC0, b'\x08\0\x60\0\x50\x01' + bytes(50_000)) * 5,
        segment(0xE1, b'Exif\0\0') * 200,
    ],
    ids=[
        'fill bytes',
        'escaped bytes',
        'other bytes',
        'restart markers',
        'starts',
        'comments after the end',
        'comments after an escaped byte',
        'comments after another byte',
        'comments in JPG',
        'comments in JPG0',
        'comments in JPG13 with a length',
        'quantisation tables',
        'Huffman tables',
        'frame headers',
        'parts of EXIF',
    ],
)
def test_a_header_that_pillow_reads_slowly_is_refused_before(extra):
    assert header_code(with_header(extra)) == 'E_TOO_LARGE'
    assert header_code(with_header(extra * 100)) == 'E_TOO_LARGE'


@pytest.mark.parametrize(
    'extra',
    [
        b'\xff' * 1000,
        b'\xff\xd0' * 50,
        segment(0xFE, bytes(65_000)) * 50,
        segment(0xE2, b'ICC_PROFILE\0\1\1' + bytes(60_000)),
        segment(0xDB, (b'\0' + bytes(64)) * 4),
    ],
    ids=['fill bytes', 'restart markers', 'long comments', 'profile', 'tables'],
)
def test_an_unusual_header_is_read(extra):
    assert decode_image(with_header(extra)).width == 80


PIECES = st.one_of(
    st.sampled_from([b'\xff', b'\xff\0', b'\0', b'a', b'\xff\xd0', b'\xff\xd8', b'\xff\xd9', b'\xff\xc8', b'\xff\xf7']),
    st.builds(segment, st.sampled_from([0xFE, 0xE0, 0xE1, 0xEF, 0xDD, 0xC4]), st.binary(max_size=9)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=8).map(b''.join))
def test_the_segments_are_those_that_pillow_finds(extra):
    data = with_header(extra)
    try:
        image = Image.open(BytesIO(data), formats=['JPEG'])
    except (SyntaxError, OSError):  # Pillow refuses the file
        return
    bodies = [bytes(part.body) for part in jpeg_segments(data) if part.kind in METADATA]
    assert bodies == [body for _, body in image.applist]


def exif_with(*tags: tuple[int, int], size: int = 40_000) -> bytes:
    """Return EXIF data whose tags share a value."""
    entries = b''.join(struct.pack('<HHII', tag, kind, size, 8) for tag, kind in tags)
    return b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + bytes(4 + size)


def test_exif_data_are_joined_as_pillow_does():
    bomb = exif_with(*[(1000 + index, 7) for index in range(900)])
    first, rest = bomb[:5000], bomb[5000:]
    parts = segment(0xE1, b'Exif\0\0' + first) + segment(0xE1, b'Exif\0\0' + rest)
    decoy = segment(0xE5, b'Exif\0\0decoy')
    assert header_code(with_header(parts)) == 'E_TOO_LARGE'
    assert header_code(with_header(decoy + parts)) == 'E_TOO_LARGE'
    assert header_code(with_header(segment(0xE1, b'Exif\0\0' * 2 + bomb))) == 'E_TOO_LARGE'
    # Only segments of the kind APP1 are EXIF data.
    assert header_code(with_header(segment(0xE5, b'Exif\0\0' + bomb))) == 'ok'


def test_a_list_of_pictures_whose_tags_share_bytes_is_refused():
    tags = [(1000 + index, 7) for index in range(100)]
    assert header_code(with_header(segment(0xE2, b'MPF\0' + exif_with(*tags)))) == 'E_TOO_LARGE'
    assert header_code(with_header(segment(0xE2, b'MPF\0' + exif_with(*tags[:1])))) == 'ok'


@pytest.mark.parametrize('marker', [0xFE, 0xE1, 0xE5])
def test_the_bytes_of_a_scan_marker_in_metadata_are_no_scan(marker):
    picture = np.zeros((1000, 1000), np.uint8)
    picture[::2] = 255
    jpeg = encoded(picture, 'JPEG', progressive=True)
    scans, _ = count_scans(jpeg)
    data = with_header(segment(marker, b'\xff\xda' * 5000), jpeg)
    assert count_scans(data) == (scans, count_scans(jpeg)[1] + 1)
    decode_image(data)


def test_a_thumbnail_between_the_scans_and_bytes_behind_the_end_are_no_scans():
    jpeg = encoded(GREY, 'JPEG', progressive=True)
    scans, _ = count_scans(jpeg)
    last = jpeg.rindex(b'\xff\xda')
    assert count_scans(jpeg[:last] + segment(0xFE, JPEG) + jpeg[last:])[0] == scans
    assert count_scans(jpeg + JPEG * 100)[0] == scans


def test_scans_are_counted_as_libjpeg_reads_them():
    jpeg = progressive_with(5, 80)
    scans, _ = count_scans(jpeg)
    assert scans == 5 + count_scans(progressive_with(0, 80))[0]
    last = jpeg.rindex(b'\xff\xda')
    # Fill bytes, restart markers and invalid markers do not hide a scan.
    for hidden in (b'\xff' * 10, b'\xff\xd3', b'\xff\0', b'\xff\2\xff\xff', b'\xff\1'):
        assert count_scans(jpeg[:last] + hidden + jpeg[last:])[0] == scans
    with pytest.raises(ImageError, match='would take too long'):
        check_scans(progressive_with(60, 80), 3000, 3000)


def test_many_segments_between_the_scans_are_refused():
    jpeg = encoded(GREY, 'JPEG', progressive=True)
    last = jpeg.rindex(b'\xff\xda')
    with pytest.raises(ImageError, match='parts before or between'):
        count_scans(jpeg[:last] + COMMENT * (MAX_PARTS + 1) + jpeg[last:])


def test_a_picture_has_one_frame_header():
    assert read_jpeg_header(JPEG) == (80, 96, 1, 8)
    frame = segment(0xC0, struct.pack('>BHHB', 8, 96, 80, 1) + b'\1\x11\0')
    for data in (with_header(frame), b'\xff\xd8\xff\xd9', JPEG[:2] + segment(0xC0, b'\x08')):
        with pytest.raises(ImageError, match='not one JPEG header'):
            read_jpeg_header(data)


def test_a_long_run_of_fill_bytes_within_the_pixels_is_refused():
    place = JPEG.index(b'\xff\xda') + 100
    for n, code in ((1000, 'ok'), (MAX_STRUCTURE + 2, 'E_TOO_LARGE')):
        data = JPEG[:-2] + b'\xff' * n + JPEG[-2:]
        within = JPEG[:place] + b'\xff' * n + b'\0' + JPEG[place:]
        assert scans_code(data) == scans_code(within) == code


def test_a_jpegls_picture_without_an_end_is_refused_before_decoding():
    image = dcmread(BytesIO(compressed(JPEGLSLossless)))
    frame = get_frame(image.PixelData, 0, number_of_frames=1)
    end = frame.rindex(b'\xff\xd9')
    assert read_jpegls_header(frame) == read_jpegls_header(frame + bytes(3)) == (80, 96, 1, 12)
    for cut in (frame[:end], frame[: end + 1], frame[:60], frame[: end + 2] + b'a'):
        with pytest.raises(ImageError, match='has no end'):
            read_jpegls_header(cut)
        data = dicom(DEEP, JPEGLSLossless, encapsulate([cut]))
        with pytest.raises(ImageError, match='has no end'):
            decode_image(data)


@pytest.mark.parametrize('fill', [b'\xff', b'\0'])
def test_the_limit_of_fill_bytes_is_exact(fill):
    for n, code in ((MAX_STRUCTURE, 'ok'), (MAX_STRUCTURE + 1, 'E_TOO_LARGE')):
        assert header_code(b'\xff\xd8' + fill * n + b'\xff\xfe\0\2') == code
