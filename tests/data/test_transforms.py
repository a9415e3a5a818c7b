"""Random crops, smaller images, and the degradations, each beside an independent implementation."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.torch_core import TensorImageBW
from PIL import Image
from scipy.ndimage import gaussian_filter
from torchvision.transforms.v2 import functional as TF

from cxr_fastai.data.transforms import AugmentImages, DegradeImages, augmentations, blur, coarsen, recompress, warp
from cxr_fastai.models.architectures import make_recipe

NONE = torch.zeros(1, dtype=torch.bool)
ZERO = torch.zeros(1)


@pytest.fixture(scope='module')
def image() -> torch.Tensor:
    """A smooth image with an edge, (1, 1, 64, 64) in [0, 1]."""
    noise = np.random.default_rng(0).random((64, 64))
    return torch.from_numpy(gaussian_filter(noise, 2)).float()[None, None].mul(4).sub(1.5).clamp(0, 1)


def kept(image, scale, shift) -> torch.Tensor:
    return warp(image, NONE, ZERO, torch.tensor([shift]), 'bilinear', torch.tensor([scale]))


def test_a_crop_is_torchvisions(image):
    # The 32 columns from 16 on and the 40 rows from 4 on: the middle of the crop is 8 px above that of the image.
    theirs = TF.resized_crop(image, 4, 16, 40, 32, [64, 64], antialias=False)
    ours = kept(image, [32 / 64, 40 / 64], [0.0, 8.0])
    assert (ours - theirs)[..., 2:-2, 2:-2].abs().max() < 1e-5


def test_crops_lie_inside_the_image_and_have_the_areas_and_aspects_that_are_asked_for():
    torch.manual_seed(0)
    p = AugmentImages(translate=0, crop=0.25, crop_aspect=4 / 3).draw(4000, 100, 100)
    (w, h), (dx, dy) = p['scale'].unbind(1), p['shift'].unbind(1)
    assert ((w / 2 + dx.abs() / 100 <= 0.5 + 1e-6) & (h / 2 + dy.abs() / 100 <= 0.5 + 1e-6)).all()
    assert 0.25 - 1e-6 <= (w * h).min() < 0.26 and (w * h).max() > 0.97
    assert 3 / 4 - 1e-3 <= (w / h).min() < 0.77 and 1.30 < (w / h).max() <= 4 / 3 + 1e-3
    assert p['shift'].amin() < -20 and p['shift'].amax() > 20


def test_without_crops_the_draws_are_those_of_the_specification():
    for_both = []
    for transform in (AugmentImages(), AugmentImages(crop=1.0, crop_aspect=1.0)):
        torch.manual_seed(3)
        for_both.append(transform.draw(5, 64, 64))
    assert all(torch.equal(for_both[0][name], for_both[1][name]) for name in for_both[0])
    assert (for_both[0]['scale'] == 1).all()


@pytest.mark.parametrize(('share', 'side'), [(0.5, 64), (0.7, 96), (0.99, 128), (1.0, 128), (0.01, 64)])
def test_small_images_have_sides_that_networks_halve(share, side):
    augment = AugmentImages(flip=0, degrees=0, translate=0, brightness=0, contrast=0)
    augment.share = share
    assert augment(TensorImageBW(torch.rand(2, 1, 128, 128)), split_idx=0).shape == (2, 1, side, side)


def test_a_smaller_image_shows_the_same(image):
    small = warp(image, NONE, ZERO, torch.zeros(1, 2), 'bilinear', None, 32)
    assert (small - F.interpolate(image, (32, 32), mode='bilinear', antialias=False)).abs().max() < 1e-5


def test_a_low_pass_is_scipys(image):
    ours = blur(image.repeat(2, 1, 1, 1), torch.tensor([1.7, 0.0]))
    theirs = gaussian_filter(image[0, 0].numpy().astype(float), 1.7, mode='mirror', truncate=3.6)
    assert np.abs(ours[0, 0].numpy() - theirs).max() < 2e-3
    assert torch.allclose(ours[1], image[0])


def test_coarse_images_are_torchvisions_resized_twice(image):
    theirs = TF.resize(TF.resize(image, [32, 32], antialias=True), [64, 64], antialias=False)
    assert (coarsen(image, torch.tensor([0.5])) - theirs).abs().max() < 1e-5


def test_an_image_is_compressed_as_pillow_does(image):
    grey = (image[0, 0] * 255).round().to(torch.uint8)
    Image.fromarray(grey.numpy()).save(file := io.BytesIO(), 'JPEG', quality=30)
    theirs = np.asarray(Image.open(file)).astype(int)
    ours = (recompress(image, torch.tensor([30]))[0, 0] * 255).round().numpy().astype(int)
    assert np.abs(ours - theirs).max() <= 2


def test_degradation_leaves_valid_images_alone_and_draws_for_each_training_image():
    degrade = DegradeImages(resolution=0.3, blur=0.02, jpeg=20)
    images = TensorImageBW(torch.rand(1, 1, 32, 32).repeat(4, 1, 1, 1))
    assert torch.equal(degrade(images, split_idx=1), images)
    worse = degrade(images, split_idx=0)
    assert worse.shape == images.shape and len({image.numpy().tobytes() for image in worse}) == 4


@pytest.mark.parametrize(
    ('fields', 'names'),
    [
        ({}, ['AugmentImages']),
        ({'blur': 0.01}, ['AugmentImages', 'DegradeImages']),
        ({'jpeg': 30, 'erase': 0.5}, ['AugmentImages', 'DegradeImages', 'RandomErasing']),
    ],
)
def test_a_recipe_gets_the_transforms_that_it_asks_for(fields, names):
    assert [type(step).__name__ for step in augmentations(make_recipe('baseline', **fields))] == names


def test_every_field_reaches_its_transform():
    fields = {
        'flip': 0.3,
        'degrees': 7.0,
        'translate': 0.05,
        'brightness': 0.1,
        'contrast': 0.15,
        'crop': 0.5,
        'crop_aspect': 1.5,
        'interpolation': 'bilinear',
        'resolution': 0.6,
        'blur': 0.02,
        'jpeg': 33,
    }
    steps = augmentations(make_recipe('baseline', **fields))
    assert all(any(getattr(step, name, None) == value for step in steps) for name, value in fields.items())
