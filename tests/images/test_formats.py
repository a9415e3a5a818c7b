"""Formats that are not read are named by their first bytes."""

import io

import numpy as np
import pytest
from PIL import Image

from cxr_fastai.images.decode import sniff
from cxr_fastai.images.formats import FIGURES, MARKS, MASKS, name_foreign_format, name_own_picture, png_mark


@pytest.mark.parametrize(
    ('form', 'name'), [('WEBP', 'WebP'), ('BMP', 'BMP'), ('GIF', 'GIF'), ('JPEG2000', 'JPEG 2000')]
)
def test_files_of_pillow_are_named(form, name):
    buffer = io.BytesIO()
    Image.new('L', (8, 8)).save(buffer, form)
    assert name_foreign_format(buffer.getvalue()) == name


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'TIFF'])
def test_formats_that_are_read_have_no_foreign_name(form):
    buffer = io.BytesIO()
    Image.new('L', (8, 8)).save(buffer, form)
    assert name_foreign_format(buffer.getvalue()) is None
    assert sniff(buffer.getvalue()) == form


@pytest.mark.parametrize('data', [b'', b'B', b'BMW is a car maker', b'GIF', b'PK', bytes(400)])
def test_other_bytes_have_no_name(data):
    assert name_foreign_format(data) is None


@pytest.mark.parametrize('kind', [FIGURES, MASKS])
def test_a_marked_picture_is_recognised_and_another_is_not(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    marked, plain = io.BytesIO(), io.BytesIO()
    Image.fromarray(noise).save(marked, 'PNG', optimize=True, pnginfo=png_mark(kind))
    Image.fromarray(noise).save(plain, 'PNG')
    assert name_own_picture(marked.getvalue()) == kind
    assert name_own_picture(plain.getvalue()) is None
    assert name_own_picture(MARKS[0][0]) is None
