"""Arrays as images: grey levels in uint8 are read, and for all others the error says how to convert them."""

import re

import numpy as np
import PIL.Image
import pytest
import torch
from imagefiles import DEEP, GREY, within

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.arrays import check_squares
from cxr_fastai.images.decode import decode_image, grey_array
from cxr_fastai.images.preprocessing import Preprocessing

RGB = np.stack([GREY, GREY, GREY], axis=2)
COLOUR = np.stack([GREY, GREY[::-1], GREY], axis=2)


@pytest.mark.parametrize('array', [GREY, GREY[..., None], RGB], ids=['h w', 'h w 1', 'h w 3'])
def test_grey_levels_in_uint8_are_the_image(array):
    pixels = grey_array(array)
    assert pixels.dtype == np.uint8 and np.array_equal(pixels, GREY)


def test_the_memory_layout_of_an_array_does_not_matter(tmp_path):
    GREY.tofile(tmp_path / 'pixels')
    read_only = GREY.copy()
    read_only.flags.writeable = False
    for array in (np.asfortranarray(GREY), np.memmap(tmp_path / 'pixels', np.uint8, 'r', shape=GREY.shape), read_only):
        assert np.array_equal(grey_array(array), GREY)
    assert np.array_equal(grey_array(GREY[::-1, ::-1]), GREY[::-1, ::-1])


def test_an_array_is_described_as_a_file_is():
    image = decode_image(RGB)
    assert (image.format, image.bits, image.width, image.height, image.notes) == ('array', 8, 80, 96, ())


CONVERTIBLE = {
    'float32 in 0 to 1': (np.float32(GREY / 255), "(255 * image).round().astype('uint8')"),
    'float16 in 0 to 1': (np.float16(GREY / 255), "(255 * image).round().astype('uint8')"),
    'float64 in 0 to 255': (GREY.astype(float), "image.round().astype('uint8')"),
    'int64 in 0 to 255': (GREY.astype(int), "image.round().astype('uint8')"),
    'bool': (GREY > 100, "255 * image.astype('uint8')"),
    '3 h w': (RGB.transpose(2, 0, 1), 'image.transpose(1, 2, 0)'),
    '1 h w': (GREY[None], 'image[0]'),
    'colour': (COLOUR, 'PIL.Image.fromarray(image)'),
    'RGBA': (np.dstack([RGB, np.full_like(GREY, 255)]), 'PIL.Image.fromarray(image)'),
    'grey and alpha': (np.dstack([GREY, np.full_like(GREY, 255)]), 'PIL.Image.fromarray(image)'),
    'masked': (np.ma.masked_less(GREY, 9), 'image.filled(0)'),
}


@pytest.mark.parametrize('kind', CONVERTIBLE)
def test_the_error_names_a_conversion_that_works(kind):
    array, conversion = CONVERTIBLE[kind]
    with pytest.raises(ImageError, match=re.escape(conversion)) as caught:
        grey_array(array)
    assert caught.value.code == 'E_ARRAY'
    converted = grey_array(eval(conversion, {'image': array, 'PIL': PIL}))
    assert converted.shape == GREY.shape
    if kind not in ('bool', 'colour', 'masked'):
        assert within(1, converted, GREY)


REFUSED = {
    'uint16': (DEEP, 'uint16 array (96, 80): only uint8 is read. Its values are 1000 to 4000: scale a window'),
    'int16': (np.int16(DEEP) - 2000, 'Its values are -1000 to 2000: scale a window of it to 0 to 255'),
    'normalised': (np.float32(GREY / 128 - 1), 'float32 array (96, 80): only uint8 is read. Its values are -1 to'),
    'not a number': (np.full((96, 80), np.nan), 'float64 array (96, 80)'),
    'infinite': (np.where(GREY > 100, np.inf, GREY / 255), 'float64 array (96, 80)'),
    'complex': (GREY.astype(complex), 'complex128 array (96, 80)'),
    'objects': (GREY.astype(object), 'object array (96, 80)'),
    'texts': (np.array(['image.jpeg']), 'array (1,)'),
    'n h w': (np.stack([GREY] * 5), 'If these are 5 images, pass them one at a time.'),
    'n h w 3': (np.stack([RGB] * 2), 'uint8 array (2, 96, 80, 3): not an image (h, w). Pass the images of a batch one'),
    'a row': (GREY[0], 'uint8 array (80,): not an image (h, w)'),
    'a number': (np.array(7, np.uint8), 'uint8 array (): not an image (h, w)'),
    'empty floats': (np.zeros((0, 0)), 'float64 array (0, 0): only uint8 is read'),
    'a uint8 tensor': (torch.from_numpy(GREY.copy()), 'Tensor of torch.uint8 (96, 80): only NumPy arrays are read'),
    'a float tensor': (torch.rand(3, 96, 80), 'Tensor of torch.float32 (3, 96, 80): only NumPy arrays are read'),
}


@pytest.mark.parametrize('kind', REFUSED)
def test_other_arrays_are_refused_in_one_line_with_their_type_and_shape(kind):
    array, reason = REFUSED[kind]
    with pytest.raises(ImageError, match=re.escape(reason)) as caught:
        grey_array(array)
    assert (caught.value.code, caught.value.status) == ('E_ARRAY', 'error')
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 190


@pytest.mark.parametrize(
    'array, code, reason',
    [
        (np.zeros((0, 80), np.uint8), 'E_TOO_SMALL', '80x0: a side is under 64 pixels'),
        (GREY[:63], 'E_TOO_SMALL', '80x63: a side is under 64 pixels'),
        (np.tile(GREY, (4, 1)), 'E_TOO_SMALL', '80x384: the aspect ratio is over 4'),
        (np.broadcast_to(GREY[:1, :1], (8000, 6000)), 'E_TOO_LARGE', '6000x8000 is over 40,000,000 pixels'),
        (np.full((96, 80), 90, np.uint8), 'E_BLANK', 'nearly alike'),
        (np.uint8(GREY > 100), 'E_BLANK', 'must be multiplied by 255'),
    ],
)
def test_the_limits_of_files_hold_for_arrays(array, code, reason):
    with pytest.raises(ImageError, match=reason) as caught:
        grey_array(array)
    assert (caught.value.code, caught.value.status) == (code, 'rejected')


@pytest.mark.parametrize('thing', [None, 3, float('nan'), ['a.jpeg'], {}, 'a.jpeg', object()])
def test_things_that_are_no_images_are_refused(thing):
    with pytest.raises(ImageError, match=f'^{type(thing).__name__}: not an image') as caught:
        grey_array(thing)
    assert caught.value.code == 'E_TYPE'


def test_the_view_of_the_network_is_made_of_grey_pixels_only():
    preprocessing = Preprocessing(64)
    for image in (GREY / 255, DEEP, RGB, torch.from_numpy(GREY.copy())):
        with pytest.raises(ImageError, match='not the grey pixels') as caught:
            preprocessing.fit(image)
        assert caught.value.code == 'E_ARRAY'


def test_a_batch_for_the_network_is_checked():
    squares = np.zeros((2, 64, 64), np.uint8)
    check_squares(squares, 64)
    for images in (squares.astype(np.float32), squares[0], squares[:, None], squares[:, :, :60], [squares], None):
        with pytest.raises(ImageError, match=r'the network needs a uint8 array \(n, 64, 64\)') as caught:
            check_squares(images, 64)
        assert caught.value.code == 'E_ARRAY'
