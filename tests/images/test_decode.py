"""Any image file becomes one uint8 grey array, upright and through its window; and then what the network sees."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from imagefiles import DEEP, GREY, compressed, dicom, encoded, lut, smooth
from PIL import Image, ImageOps
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless
from torchvision.transforms import functional as TF

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.decode import decode_image, open_image, read_image
from cxr_fastai.images.dicom import read_dicom
from cxr_fastai.images.preprocessing import Preprocessing

RAMP = np.rint(255 * np.clip((DEEP - np.percentile(DEEP, 0.5)) / np.ptp(np.percentile(DEEP, [0.5, 99.5])), 0, 1))


def within(levels: int, a: np.ndarray, b: np.ndarray) -> bool:
    return np.abs(a.astype(int) - b).max() <= levels


def test_png_is_read_to_the_level(tmp_path):
    (tmp_path / 'a.png').write_bytes(encoded(GREY))
    image = read_image(tmp_path / 'a.png')
    assert image.dtype == np.uint8 and np.array_equal(image, GREY)


@pytest.mark.parametrize('form', ['PNG', 'TIFF'])
@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA', 'P'])
def test_grey_stored_in_another_mode_is_the_same_grey(form, mode):
    image = decode_image(encoded(Image.fromarray(GREY).convert(mode), form))
    assert np.array_equal(image.pixels, GREY) and (image.format, image.mode, image.bits) == (form, mode, 8)


@pytest.mark.parametrize('mode', ['L', 'RGB', 'CMYK'])
@pytest.mark.parametrize('options', [{}, {'progressive': True}])
def test_grey_in_a_jpeg_is_the_same_grey_within_compression(mode, options):
    image = decode_image(encoded(Image.fromarray(GREY).convert(mode), 'JPEG', quality=98, **options))
    assert within(4, image.pixels, GREY)


def test_grey_and_colour_jpeg_agree_within_a_level():
    grey, colour = (
        decode_image(encoded(Image.fromarray(GREY).convert(mode), 'JPEG', quality=95)).pixels for mode in ('L', 'RGB')
    )
    assert within(1, grey, colour)


def test_what_is_transparent_is_black():
    image = Image.fromarray(GREY).convert('RGBA')
    image.putalpha(Image.fromarray(np.uint8(255 * (GREY > 100))))
    seen = decode_image(encoded(image))
    assert np.array_equal(seen.pixels, np.where(GREY > 100, GREY, 0)) and 'transparency laid on black' in seen.notes


@pytest.mark.parametrize(
    'pixels',
    [DEEP, np.int32(DEEP) * 1000, np.float32(DEEP) / 5000, np.uint16(DEEP * 16)],
    ids=['12 in 16', 'int32', 'float', '16'],
)
def test_deep_images_are_windowed_to_their_percentiles(pixels):
    image = decode_image(encoded(pixels, 'TIFF'))
    assert within(1, image.pixels, RAMP) and '0.5 to 99.5 % of the pixels' in image.notes[0]
    assert (image.pixels == 255).mean() < 0.02


def test_a_16_bit_png_is_no_white_sheet():
    image = decode_image(encoded(DEEP))
    assert within(1, image.pixels, RAMP) and image.bits == 16


def test_numbers_that_are_none_are_counted_and_change_nothing_else():
    pixels = np.float32(DEEP)
    pixels[50, 10], pixels[50, 11], pixels[50, 12] = np.nan, np.inf, -np.inf
    image = decode_image(encoded(pixels, 'TIFF'))
    assert image.pixels[50, 10:13].tolist() == [0, 255, 0] and '3 pixels are no finite number' in image.notes[0]
    assert within(1, np.delete(image.pixels, 50, 0), np.delete(RAMP, 50, 0))


def test_a_tiff_in_which_white_is_zero_is_inverted_at_any_depth():
    deep, inverted = (decode_image(encoded(DEEP, 'TIFF', tiffinfo={262: tag})).pixels for tag in (1, 0))
    assert np.array_equal(255 - deep, inverted)
    # Pillow stores 255 - GREY here, and inverts it back.
    assert np.array_equal(decode_image(encoded(GREY, 'TIFF', tiffinfo={262: 0})).pixels, GREY)


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'TIFF'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_are_turned_upright(form, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(GREY, form, exif=exif)
    with Image.open(BytesIO(data)) as picture:
        upright = np.asarray(ImageOps.exif_transpose(picture))
    image = decode_image(data)
    assert np.array_equal(image.pixels, upright) and bool(image.notes) == (orientation > 1)


def test_the_content_decides_and_a_wrong_name_is_noted(tmp_path):
    (tmp_path / 'a.jpeg').write_bytes(encoded(GREY))
    image = open_image(tmp_path / 'a.jpeg')
    assert np.array_equal(image.pixels, GREY) and image.notes == ('PNG in spite of its name',)
    (tmp_path / 'b.dcm').write_bytes(encoded(GREY, 'TIFF'))
    assert open_image(tmp_path / 'b.dcm').notes == ('TIFF in spite of its name',)
    (tmp_path / 'c.png').write_bytes(dicom())
    assert 'DICOM in spite of its name' in open_image(tmp_path / 'c.png').notes


@pytest.mark.parametrize(
    'syntax', [JPEGBaseline8Bit, JPEG2000Lossless, RLELossless, JPEGLSLossless], ids=lambda uid: uid.name
)
def test_compressed_dicom_is_the_image_that_was_compressed(syntax):
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
    assert within(1, image.pixels, wanted) and image.notes[0].startswith("the file's")


def test_a_sigmoid_window_is_a_sigmoid():
    image = decode_image(dicom(WindowCenter=2500, WindowWidth=800, VOILUTFunction='SIGMOID'))
    assert within(1, image.pixels, 255 / (1 + np.exp(-4 * (DEEP - 2500.0) / 800)))


@pytest.mark.parametrize(
    'tags',
    [{}, {'WindowCenter': 2500, 'WindowWidth': 0}, {'WindowCenter': -9e6, 'WindowWidth': 3}],
    ids=['none', 'width 0', 'nothing to see'],
)
def test_without_a_window_that_shows_something_the_percentiles_serve(tags):
    image = decode_image(dicom(**tags))
    assert within(1, image.pixels, RAMP) and image.notes == ('window 1014 to 3985, 0.5 to 99.5 % of the pixels',)


def test_monochrome1_is_inverted():
    assert np.array_equal(
        255 - decode_image(dicom(PhotometricInterpretation='MONOCHROME1')).pixels, decode_image(dicom()).pixels
    )


def test_signed_pixels_and_a_modality_lut_mean_what_they_say():
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


def test_a_range_of_padding_is_padding():
    padded = DEEP.copy()
    padded[:4], padded[4:8] = 0, 5
    image = decode_image(dicom(padded, PixelPaddingValue=0, PixelPaddingRangeLimit=5))
    assert (image.pixels[:8] == 0).all() and np.array_equal(image.pixels[8:], decode_image(dicom(DEEP[8:])).pixels)


def test_a_negative_slope_turns_the_levels_round():
    image = decode_image(dicom(RescaleSlope=-1, RescaleIntercept=4095))
    assert within(1, image.pixels, RAMP[::-1, ::-1])


def test_monochrome1_with_a_window_is_inverted_after_it():
    tags = {'WindowCenter': 2500, 'WindowWidth': 1000}
    assert np.array_equal(
        decode_image(dicom(PhotometricInterpretation='MONOCHROME1', **tags)).pixels,
        255 - decode_image(dicom(**tags)).pixels,
    )


def test_signed_eight_bit_pixels_keep_all_their_levels():
    image = decode_image(dicom((GREY.astype(int) - 128).astype(np.int8)))
    assert np.array_equal(image.pixels, GREY)


SHORT = lut(2000, [1, 2, 3], 12)


@pytest.mark.parametrize(
    ('tags', 'note'),
    [
        ({'VOILUTFunction': '', 'WindowCenter': 2500, 'WindowWidth': 1000}, "the file's window"),
        ({'VOILUTFunction': 'FOO', 'WindowCenter': 2500, 'WindowWidth': 1000}, 'window 1014 to 3985'),
        ({'VOILUTSequence': [SHORT]}, 'window 1014 to 3985'),
        ({'VOILUTSequence': [SHORT], 'WindowCenter': 2500, 'WindowWidth': 1000}, "the file's window, centre 2500"),
        ({'VOILUTSequence': [lut(0, list(range(4096)), 16)]}, 'window 1014 to 3985'),
        ({'WindowCenter': [9e6, 2500], 'WindowWidth': [1, 1000]}, "the file's window, centre 2500"),
        (
            {
                'RescaleSlope': 0.001,
                'RescaleIntercept': 0,
                'WindowCenter': 2.5,
                'WindowWidth': 0.5,
                'VOILUTFunction': 'LINEAR_EXACT',
            },
            "the file's window, centre 2.5, width 0.5",
        ),
        ({'RescaleSlope': 0, 'RescaleIntercept': 0}, 'its modality rescaling cannot be used'),
    ],
)
def test_trouble_with_a_window_is_no_trouble_with_the_image(tags, note):
    image = decode_image(dicom(**tags))
    assert image.notes[0].startswith(note) and image.pixels.std() > 60


def test_a_modality_lut_of_twelve_bits_goes_with_a_window():
    image = decode_image(
        dicom(ModalityLUTSequence=[lut(0, list(range(4096)), 12)], WindowCenter=2500, WindowWidth=1001)
    )
    assert within(1, image.pixels, 255 * np.clip((DEEP.astype(float) - 1999) / 1000, 0, 1))


def test_reading_leaves_pydicom_as_it_was():
    from concurrent.futures import ThreadPoolExecutor

    from pydicom.config import settings

    before = settings.reading_validation_mode
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode_image, [dicom()] * 100))
    assert settings.reading_validation_mode == before


def test_eight_bit_dicom_without_a_window_stays_as_it_is():
    image = decode_image(dicom(GREY))
    assert np.array_equal(image.pixels, GREY) and image.notes == ()


@pytest.mark.parametrize('resize', ['squish', 'pad', 'crop'])
def test_resizing_makes_squares_and_the_choice_is_seen(resize):
    image = np.full((100, 200), 90, np.uint8)
    square = Preprocessing(64, resize).fit(image)
    assert square.shape == (64, 64)
    assert (square == 0).mean() == (0.5 if resize == 'pad' else 0)


@pytest.mark.parametrize('resize', ['pad', 'crop'])
def test_pad_and_crop_keep_the_aspect(resize):
    y, x = np.mgrid[:120, :180]
    disc = np.uint8(200 * (np.hypot(y - 60, x - 90) < 30) + 20)
    there = np.argwhere(Preprocessing(90, resize).fit(disc) > 120)
    height, width = np.ptp(there, axis=0)
    assert abs(height - width) <= 1


def test_squishing_is_torchvisions():
    theirs = np.asarray(TF.resize(Image.fromarray(GREY).convert('RGB'), [64, 64]))[..., 0]
    assert within(1, theirs, Preprocessing(64).fit(GREY))


def test_resizing_smooths_what_it_cannot_show():
    checks = np.uint8(255 * (np.indices((256, 256)).sum(0) % 2))
    for resize in ('squish', 'pad', 'crop'):
        assert within(3, Preprocessing(64, resize).fit(checks), np.full((64, 64), 127))


def test_an_image_of_the_right_size_is_not_resampled():
    assert np.array_equal(Preprocessing(80).fit(GREY[:80]), GREY[:80])


@pytest.mark.parametrize('resize', ['squish', 'pad', 'crop'])
def test_a_large_jpeg_decoded_smaller_differs_little(tmp_path, resize):
    (tmp_path / 'a.jpeg').write_bytes(encoded(smooth(900, 1200), 'JPEG', quality=95))
    quick, preprocessing = tmp_path / 'a.jpeg', Preprocessing(96, resize)
    assert open_image(quick, preprocessing).pixels.shape == (225, 300) and open_image(quick).pixels.shape == (900, 1200)
    assert np.abs(preprocessing.load(quick).astype(int) - preprocessing.fit(read_image(quick))).mean() < 0.5


@pytest.mark.parametrize('resize', ['squish', 'pad', 'crop'])
@pytest.mark.parametrize('shape', [(380, 380), (384, 384), (390, 1500), (1500, 390), (64, 250)])
def test_decoding_smaller_leaves_twice_what_is_needed(tmp_path, resize, shape):
    (tmp_path / 'a.jpeg').write_bytes(encoded(smooth(*shape), 'JPEG'))
    h, w = open_image(tmp_path / 'a.jpeg', Preprocessing(96, resize)).pixels.shape
    assert (h, w) == shape or (max if resize == 'pad' else min)(h, w) >= 192


@pytest.mark.real
def test_decoding_originals_smaller_costs_a_fifth_of_a_grey_level(real_images):
    originals = sorted((real_images.parent / 'chest_xray_originals').rglob('*.jpeg'))[::8]
    if not originals:
        pytest.skip('no originals beside the real images')
    for path in originals:
        gap = np.abs(Preprocessing().load(path).astype(int) - Preprocessing().fit(read_image(path)))
        assert gap.mean() < 1


SAMPLES = Path(pydicom.__file__).parent / 'data' / 'test_files'


class Anything:
    """A list of modalities that has them all."""

    def __contains__(self, _):
        return True


@pytest.mark.filterwarnings('ignore')  # pydicom tells of each of its odd samples
@pytest.mark.parametrize(
    'read',
    [open_image, lambda path: read_dicom(path.read_bytes(), Anything())],
    ids=['as images', 'as pixels of any modality'],
)
def test_pydicoms_samples_end_in_pixels_or_a_code(read):
    images, codes = 0, set()
    for path in sorted(path for path in SAMPLES.rglob('*') if path.is_file()):
        try:
            images += read(path).pixels.dtype == np.uint8
        except ImageError as error:
            codes.add(error.code)
    assert (
        {'E_DICOM_CORRUPT', 'E_DICOM_SYNTAX'}
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


COLOUR = Image.fromarray(GREY).convert('RGB')
SEEDS = {
    'jpeg': encoded(GREY, 'JPEG'),
    'progressive': encoded(COLOUR, 'JPEG', progressive=True),
    'png': encoded(GREY),
    'png16': encoded(DEEP),
    'palette': encoded(Image.fromarray(GREY).convert('P')),
    'tiff16': encoded(DEEP, 'TIFF', compression='tiff_lzw'),
    'float': encoded(np.float32(DEEP), 'TIFF'),
    'dicom': dicom(WindowCenter=2500, WindowWidth=1000),
    'j2k': compressed(JPEG2000Lossless),
    'rle': compressed(RLELossless),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', SEEDS)
def test_damaged_bytes_end_in_an_image_or_a_code(name):
    rng = np.random.default_rng(list(SEEDS).index(name))
    outcomes = set()
    for i in range(100):
        data = bytearray(SEEDS[name])
        if i % 4 == 0:
            data = data[: rng.integers(1, len(data))]
        else:
            # Half of the flips hit the first kilobyte, where the headers are.
            reach = min(len(data), 1024) if i % 4 == 1 else len(data)
            for at in rng.integers(0, reach, rng.integers(1, 12)):
                data[at] ^= rng.integers(1, 256)
        try:
            image = decode_image(bytes(data), Preprocessing(64) if i % 2 else None)
            assert image.pixels.dtype == np.uint8 and image.pixels.ndim == 2 and image.bits in range(1, 33)
            outcomes.add('image')
        except ImageError as error:
            outcomes.add(error.code)
    assert len(outcomes) > 1
