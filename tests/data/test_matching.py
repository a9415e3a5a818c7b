"""Images get the histogram or the detail of their neighbour in the batch, as scikit-image and the definitions say."""

from collections import deque

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorImageBW
from scipy.ndimage import gaussian_filter
from skimage.exposure import match_histograms as match_by_skimage

from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.data.matching import MatchDetails, MatchHistograms, details_of, match_details, match_histograms
from cxr_fastai.data.transforms import without_mixing
from cxr_fastai.training.ahead import can_prepare_ahead

SIDE = 64
KINDS = [MatchHistograms, MatchDetails]


def smooth_images(sigmas: list[float], seed: int = 0) -> torch.Tensor:
    """Images of noise that is filtered with `sigmas` in pixels, (n, 1, SIDE, SIDE) in [0, 1], in 256 grey levels."""
    rng = np.random.default_rng(seed)
    squares = []
    for sigma in sigmas:
        square = gaussian_filter(rng.random((SIDE, SIDE)), sigma, mode='mirror')
        squares.append((square - square.min()) / np.ptp(square))
    return torch.from_numpy(np.stack(squares)).float()[:, None].mul(255).round().div(255)


def test_matched_histograms_equal_those_of_scikit_image():
    images, others = smooth_images([2, 3]), smooth_images([1, 2], seed=1) ** 2
    others = others.mul(255).round().div(255)
    ours = match_histograms(images, others)
    for image, other, result in zip(images[:, 0], others[:, 0], ours[:, 0], strict=True):
        theirs = match_by_skimage(image.numpy(), other.numpy())
        assert np.abs(result.numpy() - theirs).max() < 0.03  # they interpolate between grey levels
        assert abs(result.mean() - other.mean()) < 0.01 and abs(result.std() - other.std()) < 0.01


def test_an_image_matched_to_itself_stays():
    images = smooth_images([1, 2, 4])
    assert torch.allclose(match_histograms(images, images), images, atol=1e-6)
    assert torch.allclose(match_details(images, images), images, atol=1e-3)


def test_an_image_is_blurred_to_the_detail_of_a_softer_one_and_never_sharpened():
    sharp, soft = smooth_images([1.5, 1.5]), smooth_images([1.7, 1.65], seed=1)
    matched = match_details(sharp, soft)
    assert torch.allclose(details_of(matched), details_of(soft), rtol=0.05)
    assert (details_of(sharp) > 1.05 * details_of(soft)).all()
    assert torch.allclose(match_details(soft, sharp), soft, atol=1e-3)


def test_detail_does_not_depend_on_contrast_or_brightness():
    images = smooth_images([1, 2])
    assert torch.allclose(details_of(0.3 * images + 0.2), details_of(images), rtol=1e-3)


@pytest.mark.parametrize('kind', KINDS)
def test_the_probability_says_how_many_images_are_matched(kind):
    images = smooth_images([1, 3] * 60)
    matched = kind(0.5)(TensorImageBW(images), split_idx=0)
    changed = (matched.as_subclass(torch.Tensor) - images).abs().flatten(1).amax(1) > 0.01
    of_candidates = changed if kind is MatchHistograms else changed[::2]
    assert 0.3 < of_candidates.float().mean() < 0.7
    assert isinstance(matched, TensorImageBW)
    assert torch.equal(kind(0.5)(TensorImageBW(images), split_idx=1), images)


@pytest.mark.parametrize('kind', KINDS)
def test_the_last_image_of_an_odd_batch_stays(kind):
    images = smooth_images([1, 3, 1])
    matched = kind(1)(TensorImageBW(images), split_idx=0)
    assert torch.equal(matched[2], images[2]) and not torch.equal(matched[0], images[0])
    assert torch.equal(kind(1)(TensorImageBW(images[:1]), split_idx=0), images[:1])


@pytest.mark.parametrize('kind', KINDS)
def test_processes_that_share_a_batch_make_the_images_of_one_process(kind):
    images = smooth_images([1, 3, 2, 1, 4, 2, 1, 2])

    def make(part: slice) -> torch.Tensor:
        transform = kind(0.7)
        transform.generator = torch.Generator().manual_seed(1)
        transform.parts = deque([(8, part)])
        return transform(TensorImageBW(images[part]), split_idx=0)

    assert torch.allclose(torch.cat([make(slice(0, 4)), make(slice(4, 8))]), make(slice(0, 8)), atol=1e-6)


@pytest.mark.parametrize(('field', 'kind'), [('match_histogram', MatchHistograms), ('match_detail', MatchDetails)])
def test_a_recipe_prepares_batches_with_them(field, kind, images):
    dls = CXRDataLoaders.from_folder(images, size=64, bs=8, num_workers=0, valid='official', **{field: 0.9})
    assert [step.p for step in dls.train.after_batch.fs if isinstance(step, kind)] == [0.9]
    assert dls.train.one_batch()[0].shape == (8, 3, 64, 64)
    assert can_prepare_ahead(dls.train)


@pytest.mark.parametrize('kind', KINDS)
def test_predictions_with_augmentation_keep_the_images(kind, images):
    dls = CXRDataLoaders.from_folder(images, size=64, bs=8, num_workers=0, valid='official')
    transform = kind(1)
    dls.train.after_batch.add(transform)
    x = TensorImageBW(smooth_images([1, 3] * 4))
    with without_mixing(dls.train):
        assert torch.equal(transform(x, split_idx=0), x)
    assert not torch.equal(transform(x, split_idx=0), x)
