"""Decoding of DICOM files."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest
from imagefiles import DEEP, GREY, RAMP, compressed, dicom, lut, within
from pydicom.config import settings
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.decode import decode_image, open_image
from cxr_fastai.images.dicom import read_dicom


@pytest.mark.parametrize(
    'syntax', [JPEGBaseline8Bit, JPEG2000Lossless, RLELossless, JPEGLSLossless], ids=lambda uid: uid.name
)
def test_compressed_dicom_decodes_to_the_original_image(syntax):
    wanted = GREY if syntax in (JPEGBaseline8Bit, JPEG2000Lossless) else RAMP
    assert within(3 if syntax == JPEGBaseline8Bit else 1, decode_image(compressed(syntax)).pixels, wanted)


@pytest.mark.parametrize(
    ('tags', 'low', 'high'),
    [
        ({'WindowCenter': 2500, 'WindowWidth': 1001}, 1999, 2999),
        ({'WindowCenter': [2500, 1], 'WindowWidth': [1001, 2]}, 1999, 2999),
        ({'WindowCenter': 4900, 'WindowWidth': 2001, 'RescaleSlope': 2, 'RescaleIntercept': -100}, 1999.5, 2999.5),
        ({'WindowCenter': 2500, 'WindowWidth': 1000, 'VOILUTFunction': 'LINEAR_EXACT'}, 2000, 3000),
        ({'VOILUTSequence': [lut(2000, list(range(0, 4000, 4)), 12)]}, 2000, 3023.75),
    ],
)
def test_a_declared_window_is_used(tags, low, high):
    wanted = 255 * np.clip((DEEP.astype(float) - low) / (high - low), 0, 1)
    if 'VOILUTSequence' in tags:
        wanted = np.minimum(wanted, 255 * 3996 / 4095)  # its last entry
    image = decode_image(dicom(**tags))
    assert within(1, image.pixels, wanted) and 'of the file' in image.notes[0]


def test_a_sigmoid_window_follows_its_formula():
    image = decode_image(dicom(WindowCenter=2500, WindowWidth=800, VOILUTFunction='SIGMOID'))
    assert within(1, image.pixels, 255 / (1 + np.exp(-4 * (DEEP - 2500.0) / 800)))


@pytest.mark.parametrize(
    'tags',
    [{}, {'WindowCenter': 2500, 'WindowWidth': 0}, {'WindowCenter': -9e6, 'WindowWidth': 3}],
    ids=['none', 'width 0', 'nothing to see'],
)
def test_without_a_usable_window_the_percentiles_are_used(tags):
    image = decode_image(dicom(**tags))
    assert within(1, image.pixels, RAMP) and image.notes == ('window 1014 to 3985, 0.5% to 99.5% of the pixels',)


def test_monochrome1_is_inverted():
    assert np.array_equal(
        255 - decode_image(dicom(PhotometricInterpretation='MONOCHROME1')).pixels, decode_image(dicom()).pixels
    )


def test_signed_pixels_and_a_modality_lut_are_applied():
    assert within(1, decode_image(dicom((DEEP - 2000).astype(np.int16))).pixels, RAMP)
    falling = decode_image(dicom(ModalityLUTSequence=[lut(0, list(range(4095, -1, -1)), 16)]))
    assert within(1, falling.pixels, RAMP[::-1, ::-1])


@pytest.mark.parametrize(
    'tags',
    [{}, {'WindowCenter': 2500, 'WindowWidth': 2000}, {'PhotometricInterpretation': 'MONOCHROME1'}],
    ids=['none', 'window', 'inverted'],
)
@pytest.mark.parametrize('value', [0, 4095])
def test_padding_is_black_and_does_not_widen_the_window(tags, value):
    padded = DEEP.copy()
    padded[:10] = value
    image, whole = decode_image(dicom(padded, PixelPaddingValue=value, **tags)), decode_image(dicom(DEEP[10:], **tags))
    assert (image.pixels[:10] == 0).all() and np.array_equal(image.pixels[10:], whole.pixels)


def test_a_range_of_values_can_be_padding():
    padded = DEEP.copy()
    padded[:4], padded[4:8] = 0, 5
    image = decode_image(dicom(padded, PixelPaddingValue=0, PixelPaddingRangeLimit=5))
    assert (image.pixels[:8] == 0).all() and np.array_equal(image.pixels[8:], decode_image(dicom(DEEP[8:])).pixels)


def test_a_negative_slope_inverts_the_levels():
    image = decode_image(dicom(RescaleSlope=-1, RescaleIntercept=4095))
    assert within(1, image.pixels, RAMP[::-1, ::-1])


def test_monochrome1_is_inverted_after_its_window():
    tags = {'WindowCenter': 2500, 'WindowWidth': 1000}
    assert np.array_equal(
        decode_image(dicom(PhotometricInterpretation='MONOCHROME1', **tags)).pixels,
        255 - decode_image(dicom(**tags)).pixels,
    )


def test_signed_8_bit_pixels_keep_all_their_levels():
    image = decode_image(dicom((GREY.astype(int) - 128).astype(np.int8)))
    assert np.array_equal(image.pixels, GREY)


SHORT = lut(2000, [1, 2, 3], 12)


@pytest.mark.parametrize(
    ('tags', 'note'),
    [
        ({'VOILUTFunction': '', 'WindowCenter': 2500, 'WindowWidth': 1000}, 'window of the file'),
        ({'VOILUTFunction': 'FOO', 'WindowCenter': 2500, 'WindowWidth': 1000}, 'window 1014 to 3985'),
        ({'VOILUTSequence': [SHORT]}, 'window 1014 to 3985'),
        ({'VOILUTSequence': [SHORT], 'WindowCenter': 2500, 'WindowWidth': 1000}, 'window of the file: centre 2500'),
        ({'VOILUTSequence': [lut(0, list(range(4096)), 16)]}, 'window 1014 to 3985'),
        ({'WindowCenter': [9e6, 2500], 'WindowWidth': [1, 1000]}, 'window of the file: centre 2500'),
        (
            {
                'RescaleSlope': 0.001,
                'RescaleIntercept': 0,
                'WindowCenter': 2.5,
                'WindowWidth': 0.5,
                'VOILUTFunction': 'LINEAR_EXACT',
            },
            'window of the file: centre 2.5, width 0.5',
        ),
        ({'RescaleSlope': 0, 'RescaleIntercept': 0}, 'the modality rescaling of the file is unusable'),
    ],
)
def test_an_unusable_window_does_not_make_the_image_unusable(tags, note):
    image = decode_image(dicom(**tags))
    assert image.notes[0].startswith(note) and image.pixels.std() > 60


def test_a_12_bit_modality_lut_works_with_a_window():
    image = decode_image(
        dicom(ModalityLUTSequence=[lut(0, list(range(4096)), 12)], WindowCenter=2500, WindowWidth=1001)
    )
    assert within(1, image.pixels, 255 * np.clip((DEEP.astype(float) - 1999) / 1000, 0, 1))


def test_reading_in_threads_leaves_the_settings_of_pydicom_unchanged():

    before = settings.reading_validation_mode
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode_image, [dicom()] * 100))
    assert settings.reading_validation_mode == before


def test_8_bit_dicom_without_a_window_keeps_its_levels():
    image = decode_image(dicom(GREY))
    assert np.array_equal(image.pixels, GREY) and image.notes == ()


SAMPLES = Path(pydicom.__file__).parent / 'data' / 'test_files'


ALL_MODALITIES = ('CT', 'MG', 'MR', 'NM', 'OT', 'PT', 'RF', 'RTDOSE', 'RTIMAGE', 'SC', 'SEG', 'US', 'XA')


@pytest.mark.filterwarnings('ignore')  # pydicom tells of each of its odd samples
@pytest.mark.parametrize(
    'read',
    [open_image, lambda path: read_dicom(path.read_bytes(), ALL_MODALITIES)],
    ids=['as images', 'as pixels of any modality'],
)
def test_every_sample_of_pydicom_gives_pixels_or_an_error_code(read):
    images, codes = 0, set()
    for path in sorted(path for path in SAMPLES.rglob('*') if path.is_file()):
        try:
            images += read(path).pixels.dtype == np.uint8
        except ImageError as error:
            codes.add(error.code)
    assert (
        {'E_DICOM_CORRUPT', 'E_DICOM_NOPIXEL'}
        <= codes
        <= {
            'E_DICOM_CORRUPT',
            'E_DICOM_SYNTAX',
            'E_DICOM_NOPIXEL',
            'E_DICOM_MODALITY',
            'E_MULTIFRAME',
            'E_BITDEPTH',
            'E_BLANK',
            'E_TOO_SMALL',
            'E_FORMAT',
        }
    )
    assert images >= (50 if read is not open_image else 0)
