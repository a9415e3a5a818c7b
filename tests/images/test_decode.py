"""Decoding of image files and of images in memory to grey uint8 arrays."""

import os
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from imagefiles import DEEP, GREY, RAMP, colour_png, compressed, dicom, encoded, smooth, within
from PIL import Image, ImageOps
from pydicom.uid import JPEG2000Lossless, RLELossless

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.decode import decode_image, grey_array, open_image, read_image
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


PICTURE = Image.fromarray(GREY)
DIFFERENT = Image.merge('RGB', [PICTURE, PICTURE.transpose(Image.Transpose.ROTATE_180), PICTURE])
TRANSPARENT = PICTURE.convert('RGBA')
TRANSPARENT.putalpha(Image.fromarray(np.uint8(255 * (GREY > 100))))
ROTATED = Image.Exif()
ROTATED[0x112] = 6
FILES = {
    'grey JPEG': encoded(GREY, 'JPEG'),
    'colour JPEG': encoded(DIFFERENT, 'JPEG'),
    'CMYK JPEG': encoded(DIFFERENT.convert('CMYK'), 'JPEG'),
    'progressive JPEG': encoded(GREY, 'JPEG', progressive=True),
    'rotated JPEG': encoded(GREY, 'JPEG', exif=ROTATED),
    'rotated PNG': encoded(GREY, exif=ROTATED),
    'rotated TIFF': encoded(GREY, 'TIFF', exif=ROTATED),
    'rotated deep TIFF': encoded(DEEP, 'TIFF', exif=ROTATED),
    'palette': encoded(DIFFERENT.convert('P')),
    'palette and transparency': encoded(PICTURE.convert('P'), transparency=9),
    'transparency': encoded(TRANSPARENT),
    'grey and transparency': encoded(TRANSPARENT.convert('LA')),
    '1 bit': encoded(PICTURE.convert('1')),
    '16 bits': encoded(DEEP),
    '16-bit TIFF': encoded(DEEP, 'TIFF', compression='tiff_lzw'),
    '16-bit TIFF with white as zero': encoded(DEEP, 'TIFF', tiffinfo={262: 0}),
    '32 bits': encoded(np.int32(DEEP) * 1000, 'TIFF'),
    'floats': encoded(np.float32(DEEP) / 5000, 'TIFF'),
}


@pytest.mark.parametrize('is_loaded', [False, True])
@pytest.mark.parametrize('kind', FILES)
def test_a_pil_image_gives_the_pixels_of_its_file(kind, is_loaded):
    expected = decode_image(FILES[kind])
    image = Image.open(BytesIO(FILES[kind]))
    if is_loaded:
        image.load()
    decoded = decode_image(image)
    assert decoded.pixels.dtype == np.uint8 and np.array_equal(decoded.pixels, expected.pixels)
    assert (decoded.format, decoded.mode, decoded.bits) == (expected.format, expected.mode, expected.bits)
    # Pillow forgets the orientation of a TIFF when it has turned the pixels.
    if not (is_loaded and 'rotated' in kind and 'TIFF' in kind):
        assert decoded.notes == expected.notes
    assert np.array_equal(grey_array(image), expected.pixels), 'the image is not changed, so it can be used again'


@pytest.mark.parametrize('kind', FILES)
def test_the_bytes_of_a_file_are_decoded_like_the_file(tmp_path, kind):
    (tmp_path / 'image').write_bytes(FILES[kind])
    expected = read_image(tmp_path / 'image')
    for data in (FILES[kind], bytearray(FILES[kind]), memoryview(FILES[kind])):
        assert np.array_equal(grey_array(data), expected)


def test_the_bytes_of_a_dicom_file_are_decoded_like_the_file(tmp_path):
    (tmp_path / 'a.dcm').write_bytes(dicom(PhotometricInterpretation='MONOCHROME1'))
    assert np.array_equal(grey_array((tmp_path / 'a.dcm').read_bytes()), read_image(tmp_path / 'a.dcm'))


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'LA', 'P', 'CMYK', 'YCbCr'])
def test_grey_pixels_are_read_from_pil_images_of_every_mode(mode):
    assert within(1, grey_array(PICTURE.convert(mode)), GREY)


@pytest.mark.parametrize('pixels', [DEEP, np.int32(DEEP), np.float32(DEEP) / 4000], ids=['I;16', 'I', 'F'])
def test_deep_pil_images_are_windowed_like_files(pixels):
    image = decode_image(Image.fromarray(pixels))
    assert within(1, image.pixels, RAMP) and '0.5% to 99.5% of the pixels' in image.notes[0]


def test_a_converted_pil_image_keeps_its_orientation_and_an_upright_one_is_not_turned():
    upright = decode_image(FILES['rotated JPEG']).pixels
    opened = Image.open(BytesIO(FILES['rotated JPEG']))
    assert within(1, grey_array(opened.convert('RGB')), upright)
    assert np.array_equal(grey_array(ImageOps.exif_transpose(opened)), upright)


def test_threads_can_convert_the_same_opened_image():
    data = encoded(smooth(400, 300), 'JPEG')
    image = Image.open(BytesIO(data))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(grey_array, [image] * 16))
    assert all(np.array_equal(result, grey_array(data)) for result in results)


def closed() -> Image.Image:
    image = Image.open(BytesIO(FILES['grey JPEG']))
    image.close()
    return image


@pytest.mark.parametrize(
    'image, code',
    [
        (lambda: Image.open(BytesIO(FILES['grey JPEG'][:-200])), 'E_TRUNCATED'),
        (closed, 'E_IO'),
        (lambda: Image.open(BytesIO(colour_png(16))), 'E_BITDEPTH'),
        (lambda: PICTURE.convert('RGB').convert('LAB'), 'E_BITDEPTH'),
        (
            lambda: Image.open(BytesIO(encoded(PICTURE, 'GIF', save_all=True, append_images=[DIFFERENT]))),
            'E_MULTIFRAME',
        ),
        (lambda: PICTURE.resize((63, 80)), 'E_TOO_SMALL'),
        (lambda: Image.new('1', (20_000, 2100)), 'E_TOO_LARGE'),
        (lambda: Image.new('RGB', (80, 96), 'grey'), 'E_BLANK'),
        (lambda: b'', 'E_EMPTY'),
        (lambda: b'<html>', 'E_FORMAT'),
        (lambda: bytearray(FILES['16 bits'][:500]), 'E_TRUNCATED'),
    ],
)
def test_images_in_memory_have_the_errors_of_files(image, code):
    with pytest.raises(ImageError) as caught:
        open_image(image())
    assert caught.value.code == code and str(caught.value).startswith(f'image: {code}: ')
    assert '\n' not in str(caught.value)


def test_an_image_in_memory_can_be_given_a_name_for_its_error():
    with pytest.raises(ImageError, match='^left lung: E_ARRAY: float64 array'):
        open_image(GREY / 255, name='left lung')


class PathObject:
    """A path of another library."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def test_every_kind_of_path_is_opened(tmp_path):
    (tmp_path / 'a.png').write_bytes(encoded(GREY))
    with os.scandir(tmp_path) as entries, os.scandir(os.fsencode(tmp_path)) as byte_entries:
        paths = [tmp_path / 'a.png', str(tmp_path / 'a.png'), PathObject(tmp_path / 'a.png'), *entries, *byte_entries]
    assert len(paths) == 5
    for path in paths:
        assert np.array_equal(read_image(path), GREY)
    with pytest.raises(ImageError, match=f'^{tmp_path}/missing.png: E_IO'):
        read_image(PathObject(tmp_path / 'missing.png'))


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
