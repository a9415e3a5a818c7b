"""Decoding of image files to grey uint8 arrays."""

from io import BytesIO

import numpy as np
import pytest
from imagefiles import DEEP, GREY, RAMP, compressed, dicom, encoded, within
from PIL import Image, ImageOps
from pydicom.uid import JPEG2000Lossless, RLELossless

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.decode import decode_image, open_image, read_image
from cxr_fastai.images.preprocessing import Preprocessing


def test_a_png_is_read_exactly(tmp_path):
    (tmp_path / 'a.png').write_bytes(encoded(GREY))
    image = read_image(tmp_path / 'a.png')
    assert image.dtype == np.uint8 and np.array_equal(image, GREY)


@pytest.mark.parametrize('form', ['PNG', 'TIFF'])
@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA', 'P'])
def test_grey_pixels_are_read_exactly_from_every_colour_mode(form, mode):
    image = decode_image(encoded(Image.fromarray(GREY).convert(mode), form))
    assert np.array_equal(image.pixels, GREY) and (image.format, image.mode, image.bits) == (form, mode, 8)


@pytest.mark.parametrize('mode', ['L', 'RGB', 'CMYK'])
@pytest.mark.parametrize('options', [{}, {'progressive': True}])
def test_grey_pixels_are_read_from_every_jpeg_mode_up_to_compression_error(mode, options):
    image = decode_image(encoded(Image.fromarray(GREY).convert(mode), 'JPEG', quality=98, **options))
    assert within(4, image.pixels, GREY)


def test_grey_and_colour_jpegs_differ_by_at_most_one_level():
    grey, colour = (
        decode_image(encoded(Image.fromarray(GREY).convert(mode), 'JPEG', quality=95)).pixels for mode in ('L', 'RGB')
    )
    assert within(1, grey, colour)


def test_transparent_pixels_become_black():
    image = Image.fromarray(GREY).convert('RGBA')
    image.putalpha(Image.fromarray(np.uint8(255 * (GREY > 100))))
    decoded = decode_image(encoded(image))
    assert np.array_equal(decoded.pixels, np.where(GREY > 100, GREY, 0))
    assert 'transparency replaced by black' in decoded.notes


@pytest.mark.parametrize(
    'pixels',
    [DEEP, np.int32(DEEP) * 1000, np.float32(DEEP) / 5000, np.uint16(DEEP * 16)],
    ids=['12 in 16', 'int32', 'float', '16'],
)
def test_deep_images_are_windowed_between_their_percentiles(pixels):
    image = decode_image(encoded(pixels, 'TIFF'))
    assert within(1, image.pixels, RAMP) and '0.5% to 99.5% of the pixels' in image.notes[0]
    assert (image.pixels == 255).mean() < 0.02


def test_a_16_bit_png_is_not_white():
    image = decode_image(encoded(DEEP))
    assert within(1, image.pixels, RAMP) and image.bits == 16


def test_nan_and_infinite_pixels_are_counted_and_change_no_other_pixel():
    pixels = np.float32(DEEP)
    pixels[50, 10], pixels[50, 11], pixels[50, 12] = np.nan, np.inf, -np.inf
    image = decode_image(encoded(pixels, 'TIFF'))
    assert image.pixels[50, 10:13].tolist() == [0, 255, 0] and '3 pixels are NaN or infinite' in image.notes[0]
    assert within(1, np.delete(image.pixels, 50, 0), np.delete(RAMP, 50, 0))


def test_a_tiff_that_stores_white_as_zero_is_inverted_at_any_depth():
    deep, inverted = (decode_image(encoded(DEEP, 'TIFF', tiffinfo={262: tag})).pixels for tag in (1, 0))
    assert np.array_equal(255 - deep, inverted)
    # Pillow stores 255 - GREY here, and inverts it back.
    assert np.array_equal(decode_image(encoded(GREY, 'TIFF', tiffinfo={262: 0})).pixels, GREY)


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'TIFF'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_are_rotated_according_to_their_exif_orientation(form, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(GREY, form, exif=exif)
    with Image.open(BytesIO(data)) as picture:
        upright = np.asarray(ImageOps.exif_transpose(picture))
    image = decode_image(data)
    assert np.array_equal(image.pixels, upright) and bool(image.notes) == (orientation > 1)


def test_the_content_determines_the_format_and_a_wrong_suffix_is_noted(tmp_path):
    (tmp_path / 'a.jpeg').write_bytes(encoded(GREY))
    image = open_image(tmp_path / 'a.jpeg')
    assert np.array_equal(image.pixels, GREY) and image.notes == ('the file is PNG despite its suffix .jpeg',)
    (tmp_path / 'b.dcm').write_bytes(encoded(GREY, 'TIFF'))
    assert open_image(tmp_path / 'b.dcm').notes == ('the file is TIFF despite its suffix .dcm',)
    (tmp_path / 'c.png').write_bytes(dicom())
    assert 'the file is DICOM despite its suffix .png' in open_image(tmp_path / 'c.png').notes


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
def test_damaged_files_give_an_image_or_an_error_code(name):
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
