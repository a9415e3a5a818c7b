"""Any film file becomes one uint8 grey array, or a `FilmError` with a stable code."""
import os

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as TF

from cxr_fastai.core import FilmError
from cxr_fastai.images import load_film, read_film, resize_film

GREY = np.random.default_rng(0).integers(0, 256, (120, 90), dtype=np.uint8)


def save(path, mode, **options):
    Image.fromarray(GREY).convert(mode).save(path, **options)
    return path


def test_png_is_read_to_the_level(tmp_path):
    film = read_film(save(tmp_path/'a.png', 'L'))
    assert film.dtype == np.uint8 and np.array_equal(film, GREY)


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA'])
def test_grey_stored_in_colour_is_the_same_grey(tmp_path, mode):
    assert np.array_equal(read_film(save(tmp_path/'a.png', mode)), GREY)


def test_grey_and_colour_jpeg_agree_within_a_level(tmp_path):
    smooth = Image.fromarray(GREY).resize((30, 40)).resize((90, 120))
    smooth.save(tmp_path/'l.jpeg', quality=95)
    smooth.convert('RGB').save(tmp_path/'rgb.jpeg', quality=95)
    gap = np.abs(read_film(tmp_path/'l.jpeg').astype(int) - read_film(tmp_path/'rgb.jpeg'))
    assert gap.max() <= 1


def test_the_content_decides_and_not_the_name(tmp_path):
    assert np.array_equal(read_film(save(tmp_path/'a.jpeg', 'L', format='PNG')), GREY)


def test_resizing_is_torchvisions(tmp_path):
    theirs = np.asarray(TF.resize(Image.fromarray(GREY).convert('RGB'), [64, 64]))[..., 0].astype(int)
    assert np.abs(theirs - resize_film(GREY, 64)).max() <= 1


def test_a_film_of_the_right_size_is_not_resampled(tmp_path):
    square = GREY[:90]
    Image.fromarray(square).save(tmp_path/'a.png')
    assert np.array_equal(load_film(tmp_path/'a.png', 90), square)


def broken(tmp_path, name):
    path = tmp_path/'film.jpeg'
    whole = save(path, 'L', quality=90).read_bytes()
    contents = {'E_EMPTY': b'', 'E_FORMAT': b'<html>not a film</html>', 'E_TRUNCATED': whole[:len(whole)//2]}
    if name in contents: path.write_bytes(contents[name])
    if name == 'E_IO': path.unlink()
    if name == 'E_NOT_REGULAR':
        path.unlink()
        os.mkfifo(path)
    if name == 'E_BITDEPTH': Image.fromarray(GREY.astype(np.uint16)*200).save(path, format='PNG')
    if name == 'E_TOO_LARGE': Image.new('1', (7_000, 6_000)).save(path, format='PNG')
    return path


@pytest.mark.parametrize('code', ['E_EMPTY', 'E_FORMAT', 'E_TRUNCATED', 'E_IO', 'E_NOT_REGULAR', 'E_BITDEPTH',
                                  'E_TOO_LARGE'])
def test_what_cannot_be_read_says_why_and_which(tmp_path, code):
    path = broken(tmp_path, code)
    with pytest.raises(FilmError, match=code) as caught: read_film(path)
    assert caught.value.code == code and str(path) in str(caught.value) and '\n' not in str(caught.value)
