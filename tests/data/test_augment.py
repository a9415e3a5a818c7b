"""Augmentation of batches gives the same images as torchvision, SciPy and Pillow."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF1
from torchvision.transforms.v2 import functional as TF2

from cxr_fastai.data.augment import blur, coarsen, jitter, recompress, warp

HEIGHT, WIDTH = 60, 48  # not square, so that mixing up the axes fails
NO = torch.tensor([False])
YES = torch.tensor([True])
ZERO = torch.zeros(1)
NO_SHIFT = torch.zeros(1, 2)
MODES = ['nearest', 'bilinear']


@pytest.fixture(scope='module')
def image() -> torch.Tensor:
    """A smooth image, uint8 (1, 1, HEIGHT, WIDTH)."""
    noise = torch.rand(1, 1, 8, 6, generator=torch.Generator().manual_seed(1))
    return F.interpolate(noise, (HEIGHT, WIDTH), mode='bicubic').clamp(0, 1).mul(255).to(torch.uint8)


@pytest.fixture(scope='module')
def square() -> torch.Tensor:
    """A smooth image with an edge, (1, 1, 64, 64) in [0, 1]."""
    noise = np.random.default_rng(0).random((64, 64))
    return torch.from_numpy(gaussian_filter(noise, 2)).float()[None, None].mul(4).sub(1.5).clamp(0, 1)


def scaled(image: torch.Tensor) -> torch.Tensor:
    """An uint8 image in [0, 1]."""
    return image.float() / 255


def max_difference(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """The largest difference in grey levels between an image in [0, 1] and one in [0, 255], where `mask` is true."""
    difference = (ours * 255 - theirs.float()).abs()
    return float(difference.max() if mask is None else difference[mask].max())


def test_the_flip_equals_torchvision(image):
    assert max_difference(warp(scaled(image), YES, ZERO, NO_SHIFT), TF1.hflip(image)) <= 1


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('angle', [-10.0, -3.3, 7.7, 10.0])
def test_the_rotation_equals_torchvision(image, angle, mode):
    def rotate(x: torch.Tensor) -> torch.Tensor:
        return TF1.rotate(x, angle, interpolation=InterpolationMode(mode))

    ours = warp(scaled(image), NO, torch.tensor([angle]), NO_SHIFT, mode)
    inside = rotate(torch.ones(1, 1, HEIGHT, WIDTH)) > 0.999
    assert max_difference(ours, rotate(image), inside) <= 1


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('shift', [(5, 0), (0, -6), (-4, 3)])
def test_the_translation_equals_torchvision(image, shift, mode):
    ours = warp(scaled(image), NO, ZERO, torch.tensor([shift]).float(), mode)
    assert max_difference(ours, TF1.affine(image, 0.0, list(shift), 1.0, [0.0])) <= 1


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize(('angle', 'shift'), [(9.7, (5, -6)), (-8.0, (-3, 4))])
def test_flip_rotation_and_translation_have_the_order_of_torchvision(image, angle, shift, mode):
    def transform(x: torch.Tensor) -> torch.Tensor:
        rotated = TF1.rotate(TF1.hflip(x), angle, interpolation=InterpolationMode(mode))
        return TF1.affine(rotated, 0.0, list(shift), 1.0, [0.0])

    ours = warp(scaled(image), YES, torch.tensor([angle]), torch.tensor([shift]).float(), mode)
    # In separate steps, what the rotation moves out of the frame is lost even if the translation would move it back.
    inside = transform(torch.ones(1, 1, HEIGHT, WIDTH)) > 0.999
    assert max_difference(ours, transform(scaled(image)) * 255, inside) <= 1


@pytest.mark.parametrize('factor', [0.8, 1.0, 1.2])
def test_brightness_and_contrast_equal_torchvision(image, factor):
    one = torch.ones(1)
    brighter = jitter(scaled(image), factor * one, one, NO)
    assert max_difference(brighter, TF1.adjust_brightness(image, factor)) <= 1
    more_contrast = jitter(scaled(image), one, factor * one, NO)
    assert max_difference(more_contrast, TF1.adjust_contrast(image, factor)) <= 1


@pytest.mark.parametrize('brighter_first', [True, False])
def test_brightness_and_contrast_are_applied_in_the_given_order(image, brighter_first):
    if brighter_first:
        expected = TF1.adjust_contrast(TF1.adjust_brightness(scaled(image), 1.2), 0.8)
    else:
        expected = TF1.adjust_brightness(TF1.adjust_contrast(scaled(image), 0.8), 1.2)
    ours = jitter(scaled(image), torch.tensor([1.2]), torch.tensor([0.8]), torch.tensor([brighter_first]))
    assert max_difference(ours, expected * 255) <= 1e-3


def crop(image: torch.Tensor, scale: list[float], shift: list[float]) -> torch.Tensor:
    return warp(image, NO, ZERO, torch.tensor([shift]), 'bilinear', torch.tensor([scale]))


def test_a_crop_equals_torchvision(square):
    # 40 rows from row 4 and 32 columns from column 16: the centre of the crop is 8 px above that of the image.
    theirs = TF2.resized_crop(square, 4, 16, 40, 32, [64, 64], antialias=False)
    ours = crop(square, [32 / 64, 40 / 64], [0.0, 8.0])
    assert (ours - theirs)[..., 2:-2, 2:-2].abs().max() < 1e-5


def test_a_smaller_image_shows_the_same(square):
    small = warp(square, NO, ZERO, NO_SHIFT, 'bilinear', None, 32)
    assert (small - F.interpolate(square, (32, 32), mode='bilinear', antialias=False)).abs().max() < 1e-5


def test_blur_equals_scipy(square):
    images = square[..., :48].repeat(3, 1, 1, 1)
    sigma = torch.tensor([1.7, 0.0, 3.0])
    ours = blur(images, sigma)
    for image, blurred, width in zip(images, ours, sigma.tolist(), strict=True):
        # SciPy's `mirror` reflects without repeating the edge; its kernel reaches as far as that of the widest blur.
        theirs = gaussian_filter(image[0].numpy().astype(float), width, mode='mirror', radius=9)
        assert np.abs(blurred[0].numpy() - theirs).max() < 1e-6


def test_a_blur_that_reaches_almost_across_the_image_is_reflected_once():
    image = torch.rand(1, 1, 10, 8, generator=torch.Generator().manual_seed(2))
    theirs = gaussian_filter(image[0, 0].numpy().astype(float), 2.3, mode='mirror', radius=7)
    assert np.abs(blur(image, torch.tensor([2.3]))[0, 0].numpy() - theirs).max() < 1e-6


def test_coarsening_equals_two_resizes_of_torchvision(square):
    theirs = TF2.resize(TF2.resize(square, [32, 32], antialias=True), [64, 64], antialias=False)
    assert (coarsen(square, torch.tensor([0.5])) - theirs).abs().max() < 1e-5


def test_compression_equals_pillow(square):
    pixels = (square[0, 0] * 255).round().to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, 'JPEG', quality=30)
    theirs = np.asarray(Image.open(file)).astype(int)
    ours = (recompress(square, torch.tensor([30]))[0, 0] * 255).round().numpy().astype(int)
    assert np.abs(ours - theirs).max() <= 2
