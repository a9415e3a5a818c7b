"""Image files that were made to cost memory or time: each is refused, or read cheaply, before much work is done."""

import multiprocessing
import resource
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from imagefiles import DEEP, GREY, compressed, dicom, encoded, lut, png_with, within
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.decode import decode_image

MEMORY = 1_500_000_000
"""Bytes of data in which each accepted image is decoded, with Python and its packages."""


def code_of(data: bytes) -> str:
    """Return the error code of a file, or `ok`."""
    try:
        decode_image(data)
    except ImageError as error:
        assert '\n' not in str(error)
        return error.code
    return 'ok'


def with_element(tag: tuple[int, int], vr: bytes, value: bytes, undefined: bool = False, **tags) -> bytes:
    """Return a DICOM file in which one explicit element is placed before the pixels."""
    data = dicom(**tags)
    place = data.rindex(struct.pack('<HH', 0x7FE0, 0x10))
    length = 0xFFFFFFFF if undefined else len(value)
    is_long = vr in (b'OB', b'OW', b'SQ', b'UN', b'UT', b'UC', b'SV', b'UR')
    head = struct.pack('<HH2s', *tag, vr) + (struct.pack('<HI', 0, length) if is_long else struct.pack('<H', length))
    return data[:place] + head + value + data[place:]


ITEM = struct.pack('<HHI', 0xFFFE, 0xE000, 0)
OPEN_ITEM = struct.pack('<HHI', 0xFFFE, 0xE000, 0xFFFFFFFF)
SEQUENCE_END = struct.pack('<HHI', 0xFFFE, 0xE0DD, 0)
NESTED = OPEN_ITEM + struct.pack('<HH2sHI', 9, 0x1010, b'SQ', 0, 0xFFFFFFFF)


@pytest.mark.parametrize(
    ('tag', 'vr', 'value', 'undefined', 'code'),
    [
        ((0x28, 0x1050), b'DS', b'1\\' * 30_000, False, 'E_DICOM_CORRUPT'),
        ((0x28, 0x1050), b'UT', b'1\\' * 1_000_000, False, 'E_DICOM_CORRUPT'),
        ((0x28, 0x101), b'SV', bytes(8_000_000), False, 'E_DICOM_CORRUPT'),
        ((0x28, 0x1050), b'UN', bytes(8_000_000) + SEQUENCE_END, True, 'E_DICOM_CORRUPT'),
        ((0x9, 0x1001), b'DS', b'1\\' * 30_000, False, 'ok'),
        ((0x9, 0x1001), b'UT', b'1\\' * 1_000_000, False, 'ok'),
        ((0x9, 0x1001), b'SQ', ITEM * 200_000 + SEQUENCE_END, True, 'E_DICOM_CORRUPT'),
        ((0x28, 0x3010), b'SQ', ITEM * 200_000, False, 'E_DICOM_CORRUPT'),
        ((0x28, 0x3010), b'SQ', ITEM * 200_000 + SEQUENCE_END, True, 'E_DICOM_CORRUPT'),
        ((0x9, 0x1001), b'SQ', NESTED * 3000, True, 'E_DICOM_CORRUPT'),
    ],
    ids=[
        'window values',
        'window of 2 MB',
        'bits of 8 MB',
        'window without end',
        'private numbers',
        'private text',
        'private items',
        'LUT items',
        'LUT items without end',
        'nested sequences',
    ],
)
def test_long_elements_are_refused_or_skipped_before_they_are_converted(tag, vr, value, undefined, code):
    assert code_of(with_element(tag, vr, value, undefined)) == code


def test_a_million_elements_are_refused():
    element = struct.pack('<HH2sH', 0x9, 0x1001, b'LO', 0)
    assert code_of(with_many(element)) == 'E_DICOM_CORRUPT'


def with_many(element: bytes) -> bytes:
    data = dicom()
    place = data.rindex(struct.pack('<HH', 0x7FE0, 0x10))
    return data[:place] + element * 200_000 + data[place:]


def test_deflated_elements_are_unpacked_up_to_a_limit():
    file = dicom(syntax='1.2.840.10008.1.2.1.99')
    header = file[: 144 + struct.unpack_from('<I', file, 140)[0]]
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    bomb = b''.join(packer.compress(bytes(10_000_000)) for _ in range(100)) + packer.flush()
    assert code_of(file) == 'ok' and code_of(header + bomb) == 'E_TOO_LARGE'
    assert code_of(header) == 'E_DICOM_NOPIXEL' and code_of(header + b'\xff' * 100) == 'E_DICOM_CORRUPT'


def test_only_the_first_windows_are_tried():
    centres = [9e6] * 8 + [2500]
    image = decode_image(dicom(WindowCenter=centres, WindowWidth=[1001] * 9))
    assert 'of the pixels' in image.notes[0]
    assert 'of the file' in decode_image(dicom(WindowCenter=centres[1:], WindowWidth=[1001] * 8)).notes[0]


def test_only_the_first_lut_counts_and_a_long_one_is_refused():
    luts = [lut(2000, list(range(0, 4000, 4)), 12)] * 3
    assert 'VOI LUT' in decode_image(dicom(VOILUTSequence=luts)).notes[0]
    assert code_of(dicom(VOILUTSequence=[lut_of_bytes(140_000)])) == 'E_DICOM_CORRUPT'


def lut_of_bytes(size: int):
    item = lut(0, [1, 2], 12)
    item.add_new(0x00283006, 'OW', bytes(size))
    return item


def test_pixel_data_of_another_type_are_refused():
    data = dicom()
    place = data.rindex(struct.pack('<HH', 0x7FE0, 0x10)) + 4
    assert code_of(data[:place] + b'SV' + data[place + 2 :]) == 'E_DICOM_CORRUPT'


def test_rle_segments_give_no_more_bytes_than_the_file_declares():
    run = b'\x81\0' * 10_000  # 128 bytes from 2
    frame = struct.pack('<16I', 2, 64, 64 + len(run), *[0] * 13) + run * 2
    assert code_of(compressed(RLELossless)) == 'ok'
    assert code_of(dicom(syntax=RLELossless, data=encapsulate([frame]))) in ('E_BLANK', 'E_DICOM_CORRUPT')


@pytest.mark.parametrize('count', [0, 1, 3, 15, 16, 2**32 - 1])
def test_a_wrong_number_of_rle_segments_is_refused(count):
    frame = struct.pack('<16I', count, *[64] * 15) + bytes(100)
    assert code_of(dicom(syntax=RLELossless, data=encapsulate([frame]))) == 'E_DICOM_CORRUPT'


@pytest.mark.parametrize('syntax', [JPEG2000Lossless, JPEGLSLossless], ids=['JPEG 2000', 'JPEG-LS'])
def test_a_codestream_of_another_size_is_refused(syntax):
    data = bytearray(compressed(syntax))
    if syntax == JPEG2000Lossless:
        place = data.index(b'\xff\x4f\xff\x51') + 8
        data[place : place + 8] = struct.pack('>II', 6000, 6000)
    else:
        place = data.index(b'\xff\xf7') + 5
        data[place : place + 4] = struct.pack('>HH', 6000, 6000)
    assert code_of(bytes(data)) == 'E_DICOM_CORRUPT'


def test_a_codestream_of_many_tiles_or_components_is_refused():
    data = bytearray(compressed(JPEG2000Lossless))
    place = data.index(b'\xff\x4f\xff\x51')
    tiny_tiles, components = bytearray(data), bytearray(data)
    tiny_tiles[place + 24 : place + 32] = struct.pack('>II', 1, 1)
    components[place + 40 : place + 42] = struct.pack('>H', 16_384)
    assert code_of(bytes(components)) == 'E_DICOM_CORRUPT'
    assert code_of(bytes(tiny_tiles)) == 'E_TOO_LARGE'


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack('>BBH', 0xFF, marker, len(body) + 2) + body


@pytest.mark.parametrize(
    ('extra', 'code'),
    [
        (segment(0xFE, bytes(65_000)) * 300, 'E_TOO_LARGE'),
        (segment(0xE2, bytes(65_000)) * 300, 'E_TOO_LARGE'),
        (segment(0xFE, b'') * 100_000, 'E_TOO_LARGE'),
        (segment(0xDB, bytes(65)) * 100_000, 'E_TOO_LARGE'),
        (segment(0xFE, bytes(65_000)) * 10, 'ok'),
        (b'\xff' * 100_000, 'ok'),
    ],
    ids=['comments', 'profiles', 'empty comments', 'tables', 'usual comments', 'fill bytes'],
)
def test_the_metadata_of_a_jpeg_are_bounded(extra, code):
    jpeg = encoded(GREY, 'JPEG')
    assert code_of(jpeg[:2] + extra + jpeg[2:]) == code


def exif_bomb(size: int, tags: int) -> bytes:
    """Return EXIF data in which every tag has the same long value."""
    entries = b''.join(struct.pack('<HHII', 1000 + i, 7, size, 8) for i in range(tags))
    return b'II*\0' + struct.pack('<IH', 8, tags) + entries + struct.pack('<I', 0) + bytes(size)


def test_bytes_in_memory_are_limited_as_files_are():
    data = bytes(400_000_001)  # never touched, so they cost no memory
    assert code_of(data) == code_of(memoryview(data)) == 'E_TOO_LARGE'


def test_tags_that_share_a_value_do_not_multiply_it():
    jpeg = encoded(GREY, 'JPEG')
    exif = segment(0xE1, b'Exif\0\0' + exif_bomb(40_000, 900))
    assert code_of(jpeg[:2] + exif + jpeg[2:]) == 'E_TOO_LARGE'
    assert code_of(png_with((b'eXIf', exif_bomb(1_000_000, 900)))) == 'E_TOO_LARGE'
    profile = b'Raw profile type exif\0\nexif\n9\n' + exif_bomb(300_000, 900).hex().encode()
    assert code_of(png_with((b'tEXt', profile))) == 'ok'


@pytest.mark.parametrize(
    'chunks',
    [
        [(b'tEXt', b'a\0' + bytes(1000))] * 5000,
        [(b'tEXt', b'a\0')] * 100_000,
        [(b'eXIf', bytes(5_000_000))],
        [(b'prVt', bytes(1_000_000))] * 5,
    ],
    ids=['text', 'many', 'EXIF', 'private'],
)
def test_the_metadata_of_a_png_are_bounded(chunks):
    assert code_of(png_with(*chunks)) == 'E_TOO_LARGE'


def test_a_second_colour_profile_is_refused():
    profile = (b'iCCP', b'a\0\0' + zlib.compress(bytes(1_000_000), 9))
    assert code_of(png_with(profile)) == 'ok'
    assert code_of(png_with(profile, (b'tEXt', b'a\0b'), profile)) == 'E_TRUNCATED'


def test_a_compressed_text_that_inflates_to_gigabytes_is_not_inflated():
    bomb = zlib.compress(bytes(50_000_000), 9)
    assert code_of(png_with((b'zTXt', b'a\0\0' + bomb))) in ('E_TOO_LARGE', 'E_TRUNCATED', 'ok')


def tiff_with(*entries: tuple[int, int, int, int], tail: bytes = b'') -> bytes:
    body = b''.join(struct.pack('<HHII', *entry) for entry in entries)
    return b'II*\0' + struct.pack('<IH', 8, len(entries)) + body + struct.pack('<I', 0) + tail


@pytest.mark.parametrize(
    'data',
    [
        tiff_with(*[(i, 7, 100_000, 8) for i in range(900)], tail=bytes(100_000)),
        tiff_with(*[(i, 3, 1, 0) for i in range(5000)]),
        tiff_with((256, 3, 1, 100), (257, 3, 1, 100), (322, 4, 1, 60_000), (323, 4, 1, 60_000)),
        tiff_with((256, 3, 1, 100), (257, 3, 1, 100), (273, 4, 2**31, 8)),
        tiff_with(*[(270, 7, 100_000, 8)] * 900, tail=bytes(100_000)),
        b'II+\0\x08\0\0\0' + struct.pack('<QQ', 16, 2**60),
    ],
    ids=['shared values', 'tags', 'tiles', 'strips', 'one tag often', 'BigTIFF tags'],
)
def test_the_directory_of_a_tiff_is_bounded(data):
    assert code_of(data) == 'E_TOO_LARGE'


def test_comments_of_a_gif_cost_nothing():
    gif = encoded(GREY, 'GIF')
    comments = b'\x21\xfe' + (b'\xff' + bytes(255)) * 80_000 + b'\0'
    place = 13 + 3 * 256
    assert code_of(gif[:place] + comments + gif[place:]) in ('E_FORMAT', 'E_TRUNCATED')


def large_images() -> dict[str, bytes]:
    """Return accepted images near the largest number of pixels, by name."""
    rows = np.linspace(0, 1, 6200, dtype=np.float32)[:, None].repeat(6300, 1)
    grey = np.uint8(255 * rows)
    colour = Image.fromarray(grey)
    return {
        'JPEG': encoded(grey, 'JPEG'),
        'CMYK JPEG': encoded(colour.convert('CMYK'), 'JPEG'),
        'PNG of 16 bits': encoded(np.uint16(65_535 * rows), compress_level=1),
        'TIFF of floats': encoded(rows, 'TIFF'),
        'PNG with transparency': encoded(colour.convert('RGBA'), compress_level=1),
        'DICOM': dicom(np.uint16(4095 * rows)),
        'colour DICOM': dicom(
            grey,
            data=np.repeat(grey, 3).tobytes(),
            BitsStored=8,
            HighBit=7,
            PhotometricInterpretation='YBR_FULL',
            SamplesPerPixel=3,
            PlanarConfiguration=0,
        ),
    }


@pytest.mark.slow
def test_the_largest_images_are_decoded_in_bounded_memory():
    context = multiprocessing.get_context('spawn')
    for name, data in large_images().items():
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_decode_within, args=(data, MEMORY, sender))
        process.start()
        sender.close()
        assert receiver.recv() == 'ok', name
        process.join()


def _decode_within(data: bytes, memory: int, answers) -> None:
    decode_image(dicom())  # loads the decoders
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    try:
        answers.send(code_of(data))
    except MemoryError:
        answers.send('MemoryError')


def test_cheap_checks_do_not_change_what_usual_images_give():
    assert within(0, decode_image(encoded(GREY)).pixels, GREY)
    assert code_of(encoded(DEEP, 'TIFF', compression='tiff_lzw')) == 'ok'
    image = Image.fromarray(GREY)
    exif = Image.Exif()
    exif[0x112] = 6
    buffer = BytesIO()
    image.save(buffer, 'JPEG', exif=exif)
    assert decode_image(buffer.getvalue()).pixels.shape == GREY.T.shape
