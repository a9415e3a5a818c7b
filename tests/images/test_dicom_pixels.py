"""Decoding of the stored pixels of DICOM files: unused bits, encodings and their packages, and the display."""

import struct

import numpy as np
import pytest
from imagefiles import DEEP, GREY, RAMP, dicom, encoded, recompressed, within
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.decode import decode_image
from cxr_fastai.images.dicom_pixels import keep_stored_bits
from cxr_fastai.images.limits import MAX_PIXELS

PLAIN = '1.2.840.10008.1.2.1'
DEFLATED = '1.2.840.10008.1.2.1.99'
ENCAPSULATED = '1.2.840.10008.1.2.1.98'
ENCODINGS = (PLAIN, DEFLATED, ENCAPSULATED, RLELossless, JPEG2000Lossless, JPEGLSLossless)
SIGNED = np.int16(DEEP.astype(int) - 2500)


def with_overlay(levels: np.ndarray) -> np.ndarray:
    """Return levels of 12 bits with an overlay in bit 15, another one in bit 12, and without an extended sign."""
    stored = levels.astype(np.uint16) & 0xFFF
    stored[10:40, 10:60] |= 0x8000
    stored[50:60] |= 0x1000
    return stored


@pytest.mark.parametrize(
    'syntax', [PLAIN, DEFLATED, ENCAPSULATED, RLELossless, JPEG2000Lossless, JPEGLSLossless], ids=str
)
@pytest.mark.parametrize('levels', [DEEP, SIGNED], ids=['unsigned', 'signed'])
def test_overlays_in_unused_bits_are_removed_after_every_decoder(syntax, levels):
    is_signed = levels.dtype.kind == 'i'
    image = decode_image(recompressed(with_overlay(levels), syntax, PixelRepresentation=int(is_signed)))
    assert within(1, image.pixels, RAMP) and len(image.notes) == 1


@pytest.mark.parametrize('syntax', [PLAIN, RLELossless, JPEG2000Lossless, JPEGLSLossless], ids=str)
def test_signed_pixels_keep_their_sign_after_every_decoder(syntax):
    extended = SIGNED.view(np.uint16)
    image = decode_image(recompressed(extended, syntax, PixelRepresentation=1))
    assert within(1, image.pixels, RAMP) and image.notes[0].startswith('window -1486 to 1485')


def test_unused_bits_of_ones_are_removed():
    for syntax in (JPEG2000Lossless, JPEGLSLossless, RLELossless):
        assert within(1, decode_image(recompressed(DEEP | 0xF000, syntax)).pixels, RAMP)


def test_a_compressed_picture_decides_whether_its_levels_are_signed():
    # PS3.5, 8.2.4: elements that contradict the codestream, which is unsigned here, are only suggestions.
    image = decode_image(recompressed(DEEP, JPEG2000Lossless, PixelRepresentation=1))
    assert within(1, image.pixels, RAMP)


def test_bits_are_kept_by_the_width_of_the_pixels():
    levels = np.array([[-3, 5]], np.int16)
    assert np.array_equal(keep_stored_bits(levels, 4, True), levels)
    assert np.array_equal(keep_stored_bits(np.array([[0x801D, 0x4005]], np.uint16), 4, True), levels)
    assert np.array_equal(keep_stored_bits(np.array([[0xF3, 0xFF]], np.uint8), 4, False), [[3, 15]])
    assert keep_stored_bits(levels, 16, True) is levels and keep_stored_bits(levels, 20, True) is levels
    assert keep_stored_bits(np.array([[0xFF000007]], np.uint32), 24, False)[0, 0] == 7


@pytest.mark.parametrize('first', [0, 2**31, 2**32 - 5000])
def test_levels_of_32_bits_are_read_wherever_they_lie(first):
    levels = np.uint32(DEEP.astype(np.int64) + first)
    assert within(1, decode_image(dicom(levels, BitsStored=32, HighBit=31)).pixels, RAMP)


@pytest.mark.parametrize('number', ['102', '103', '110', '112', '55', '65'])
def test_an_encoding_that_no_package_reads_says_so(number):
    image = dicom(GREY, '1.2.840.10008.1.2.4.102', encapsulate([bytes(100)]))
    syntax = f'1.2.840.10008.1.2.4.{number}'
    with pytest.raises(ImageError, match='no Python package reads it here') as caught:
        decode_image(image.replace(b'1.2.840.10008.1.2.4.102', syntax.ljust(23, '\0').encode()))
    assert caught.value.code == 'E_DICOM_SYNTAX' and syntax in str(caught.value) and 'gdcm' not in str(caught.value)


@pytest.mark.parametrize(
    ('syntax', 'packages'),
    [
        ('1.2.840.10008.1.2.4.57', 'python-gdcm'),
        ('1.2.840.10008.1.2.4.70', 'python-gdcm'),
        ('1.2.840.10008.1.2.4.51', 'pylibjpeg pylibjpeg-libjpeg'),
        ('1.2.840.10008.1.2.4.201', 'pylibjpeg pylibjpeg-openjpeg'),
        ('1.2.840.10008.1.2.4.203', 'pylibjpeg pylibjpeg-openjpeg'),
    ],
)
def test_the_package_that_reads_an_encoding_is_named(syntax, packages):
    image = dicom(DEEP, syntax, encapsulate([encoded(GREY, 'JPEG')]))
    with pytest.raises(ImageError, match=f'to read it, pip install {packages}$'):
        decode_image(image)


@pytest.mark.parametrize(
    ('photometric', 'shape', 'note'),
    [
        ('MONOCHROME2', 'IDENTITY', None),
        ('MONOCHROME2', 'INVERSE', 'inverted (PresentationLUTShape INVERSE)'),
        ('MONOCHROME2', 'inverse ', 'inverted (PresentationLUTShape INVERSE)'),
        ('MONOCHROME2', 'LIN OD', None),
        ('MONOCHROME1', 'INVERSE', 'inverted (MONOCHROME1)'),
        ('MONOCHROME1', 'IDENTITY', 'inverted (MONOCHROME1)'),
    ],
)
def test_an_image_is_inverted_once_if_low_levels_are_white(photometric, shape, note):
    image = decode_image(dicom(PhotometricInterpretation=photometric, PresentationLUTShape=shape))
    assert within(1, image.pixels, 255 - RAMP if note else RAMP)
    assert image.notes[1:] == ((note,) if note else ())


@pytest.mark.parametrize(
    ('tags', 'is_noted'),
    [
        ({'PresentationIntentType': 'FOR PROCESSING'}, True),
        ({'SOPClassUID': '1.2.840.10008.5.1.4.1.1.1.1.1'}, True),
        ({'PresentationIntentType': 'FOR PRESENTATION'}, False),
    ],
)
def test_an_image_that_is_not_made_for_display_has_a_note(tags, is_noted):
    assert any('FOR PROCESSING' in note for note in decode_image(dicom(**tags)).notes) == is_noted


@pytest.mark.parametrize(
    ('tags', 'shape', 'name'),
    [
        ({'PixelAspectRatio': [2, 1]}, (192, 80), 'PixelAspectRatio'),
        ({'PixelAspectRatio': [1, 2]}, (96, 160), 'PixelAspectRatio'),
        ({'PixelSpacing': [0.3, 0.2]}, (144, 80), 'PixelSpacing'),
        ({'ImagerPixelSpacing': [0.2, 0.3]}, (96, 120), 'ImagerPixelSpacing'),
        ({'NominalScannedPixelSpacing': [0.3, 0.2]}, (144, 80), 'NominalScannedPixelSpacing'),
        ({'PixelSpacing': [0.3, 0.2], 'PixelAspectRatio': [1, 3]}, (144, 80), 'PixelSpacing'),
        ({'PixelSpacing': [0, 0.2], 'ImagerPixelSpacing': [0.3, 0.2]}, (144, 80), 'ImagerPixelSpacing'),
    ],
)
def test_pixels_that_are_not_square_are_resampled(tags, shape, name):
    image = decode_image(dicom(**tags))
    assert image.pixels.shape == shape and image.notes[-1].endswith(f'({name})')
    assert (image.height, image.width) == DEEP.shape
    assert abs(image.pixels.mean() - RAMP.mean()) < 1


@pytest.mark.parametrize(
    ('tags', 'note'),
    [
        ({'PixelSpacing': [0.143, 0.143]}, ''),
        ({'PixelSpacing': [0.143, 0.1431]}, ''),
        ({'PixelSpacing': [0.1]}, ''),
        ({'PixelAspectRatio': [0, 0]}, ''),
        ({'PixelSpacing': [1e9, 0.1]}, 'PixelSpacing is implausible and was ignored'),
        ({'PixelSpacing': [1e-300, 1e300]}, 'PixelSpacing is implausible and was ignored'),
    ],
)
def test_square_and_impossible_pixels_are_left_as_they_are(tags, note):
    image = decode_image(dicom(**tags))
    assert np.array_equal(image.pixels, decode_image(dicom()).pixels) and image.notes[1:] == ((note,) if note else ())


def test_a_large_image_is_reduced_to_square_pixels():
    side = 4600
    levels = np.tile(np.linspace(0, 255, side).astype(np.uint8), (side, 1))
    image = decode_image(dicom(levels, PixelSpacing=[0.2, 0.1]))
    assert image.pixels.shape == (side, side // 2) and image.pixels.size < MAX_PIXELS


def tiff(levels: np.ndarray, sample_format: int, photometric: int = 1) -> bytes:
    """Return an uncompressed TIFF file of grey `levels`."""
    height, width = levels.shape
    raw = levels.tobytes()
    tags = {256: width, 257: height, 258: 8 * levels.itemsize, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height}
    tags |= {279: len(raw), 339: sample_format}
    directory = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags.items())
    return b'II*\0' + struct.pack('<I', 8 + len(raw)) + raw + struct.pack('<H', len(tags)) + directory + bytes(4)


def test_signed_levels_of_8_bits_in_a_tiff_file_do_not_wrap():
    image = decode_image(tiff(np.int8(GREY.astype(int) - 128), 2))
    assert np.array_equal(image.pixels, GREY) and image.notes == ('signed levels, of which -128 is black',)
    assert np.array_equal(decode_image(tiff(GREY, 1)).pixels, GREY)


@pytest.mark.parametrize(('sample_format', 'first'), [(1, 0), (2, -2500)])
def test_levels_of_32_bits_in_a_tiff_file_do_not_wrap(sample_format, first):
    levels = (DEEP.astype(np.int64) + first) * 1_000_000
    image = decode_image(tiff(levels.astype(np.uint32 if sample_format == 1 else np.int32), sample_format))
    assert within(1, image.pixels, RAMP)


def test_signed_levels_of_16_bits_in_a_tiff_file_are_windowed():
    assert within(1, decode_image(tiff(SIGNED, 2)).pixels, RAMP)
