"""The square that a network sees."""

import numpy as np
import pytest
from imagefiles import GREY, encoded, smooth, within
from PIL import Image
from torchvision.transforms import functional as TF

from cxr_fastai.images.decode import open_image, read_image
from cxr_fastai.images.preprocessing import Preprocessing


@pytest.mark.parametrize('resize', ['squish', 'pad', 'crop'])
def test_only_pad_adds_black_bars(resize):
    image = np.full((100, 200), 90, np.uint8)
    square = Preprocessing(64, resize).fit(image)
    assert square.shape == (64, 64)
    assert (square == 0).mean() == (0.5 if resize == 'pad' else 0)


@pytest.mark.parametrize('resize', ['pad', 'crop'])
def test_pad_and_crop_keep_the_aspect_ratio(resize):
    y, x = np.mgrid[:120, :180]
    disc = np.uint8(200 * (np.hypot(y - 60, x - 90) < 30) + 20)
    there = np.argwhere(Preprocessing(90, resize).fit(disc) > 120)
    height, width = np.ptp(there, axis=0)
    assert abs(height - width) <= 1


def test_squish_equals_the_resize_of_torchvision():
    theirs = np.asarray(TF.resize(Image.fromarray(GREY).convert('RGB'), [64, 64]))[..., 0]
    assert within(1, theirs, Preprocessing(64).fit(GREY))


def test_resizing_antialiases():
    checks = np.uint8(255 * (np.indices((256, 256)).sum(0) % 2))
    for resize in ('squish', 'pad', 'crop'):
        assert within(3, Preprocessing(64, resize).fit(checks), np.full((64, 64), 127))


def test_an_image_of_the_right_size_is_not_resampled():
    assert np.array_equal(Preprocessing(80).fit(GREY[:80]), GREY[:80])


@pytest.mark.parametrize('resize', ['squish', 'pad', 'crop'])
def test_a_large_jpeg_decoded_at_a_smaller_scale_differs_little(tmp_path, resize):
    (tmp_path / 'a.jpeg').write_bytes(encoded(smooth(900, 1200), 'JPEG', quality=95))
    quick, preprocessing = tmp_path / 'a.jpeg', Preprocessing(96, resize)
    assert open_image(quick, preprocessing).pixels.shape == (225, 300) and open_image(quick).pixels.shape == (900, 1200)
    assert np.abs(preprocessing.load(quick).astype(int) - preprocessing.fit(read_image(quick))).mean() < 0.5


@pytest.mark.parametrize('resize', ['squish', 'pad', 'crop'])
@pytest.mark.parametrize('shape', [(380, 380), (384, 384), (390, 1500), (1500, 390), (64, 250)])
def test_decoding_at_a_smaller_scale_keeps_twice_the_needed_side(tmp_path, resize, shape):
    (tmp_path / 'a.jpeg').write_bytes(encoded(smooth(*shape), 'JPEG'))
    h, w = open_image(tmp_path / 'a.jpeg', Preprocessing(96, resize)).pixels.shape
    assert (h, w) == shape or (max if resize == 'pad' else min)(h, w) >= 192


@pytest.mark.real
def test_decoding_originals_at_a_smaller_scale_changes_less_than_a_grey_level(real_images):
    originals = sorted((real_images.parent / 'chest_xray_originals').rglob('*.jpeg'))[::8]
    if not originals:
        pytest.skip('needs the folder chest_xray_originals next to the folder that CXR_DATA names')
    for path in originals:
        gap = np.abs(Preprocessing().load(path).astype(int) - Preprocessing().fit(read_image(path)))
        assert gap.mean() < 1
