"""What is around the lungs is exchanged between the images of a batch, or left alone with a random label."""

from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorCategory, TensorImageBW

from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.data.surroundings import ExchangeSurroundings, HideLungs, soft_masks
from cxr_fastai.data.transforms import without_mixing
from cxr_fastai.images.anatomy import LUNGS
from cxr_fastai.training.ahead import can_prepare_ahead
from cxr_fastai.training.learner import cxr_learner

SIDE = 64
N = 400


def constant_images(n: int = N) -> tuple[TensorImageBW, TensorCategory]:
    """Images of one level each, and alternating labels."""
    levels = torch.arange(1, n + 1).div(n + 1).view(-1, 1, 1, 1)  # none is black
    return TensorImageBW(levels.expand(n, 1, SIDE, SIDE).clone()), TensorCategory(torch.arange(n) % 2)


def centre(images: torch.Tensor) -> torch.Tensor:
    return images[:, 0, SIDE // 2, SIDE // 2]


def corner(images: torch.Tensor) -> torch.Tensor:
    return images[:, 0, 0, 0]


def test_masks_equal_those_that_are_measured_with():
    box = torch.tensor([[LUNGS.top, LUNGS.bottom, LUNGS.left, LUNGS.right]])
    assert np.allclose(soft_masks(box, SIDE, SIDE)[0, 0], LUNGS.soft_mask(SIDE), atol=1e-5)


def test_an_exchange_keeps_lungs_and_label_and_takes_the_rest_from_the_neighbour():
    x, y = constant_images()
    mixed, labels = ExchangeSurroundings(0.5)((x, y), split_idx=0)
    assert torch.equal(centre(mixed), centre(x)) and torch.equal(labels, y)
    exchanged = (corner(mixed) != corner(x)).as_subclass(torch.Tensor)
    assert 0.4 < exchanged.float().mean() < 0.6
    neighbours = torch.arange(N) ^ 1
    assert torch.equal(corner(mixed)[exchanged], corner(x)[neighbours[exchanged]])


def test_the_last_image_of_an_odd_batch_has_no_neighbour_and_stays():
    x, y = constant_images(5)
    mixed, _ = ExchangeSurroundings(1)((x, y), split_idx=0)
    assert torch.equal(mixed[4], x[4]) and not torch.equal(mixed[3], x[3])


@pytest.mark.parametrize('kind', [ExchangeSurroundings, partial(HideLungs, share=0.5)])
def test_processes_that_share_a_batch_make_the_images_of_one_process(kind):
    x, y = constant_images(8)

    def make(part: slice) -> tuple:
        transform = kind(0.5)
        transform.generator = torch.Generator().manual_seed(1)
        transform.parts = deque([(8, part)])
        return transform((TensorImageBW(x[part]), TensorCategory(y[part])), split_idx=0)

    whole, labels = make(slice(0, 8))
    halves = [make(slice(0, 4)), make(slice(4, 8))]
    assert torch.equal(torch.cat([labels for _, labels in halves]), labels)
    assert torch.allclose(torch.cat([images for images, _ in halves]), whole, atol=1e-6)


def test_hidden_lungs_have_a_random_label_and_the_others_keep_theirs():
    x, y = constant_images()
    x[:, :, ::2] *= 0.9  # otherwise the mean hides nothing
    hidden, labels = HideLungs(0.5, 0.5)((x, y), split_idx=0)
    assert torch.equal(corner(hidden), corner(x))
    same = (hidden == x).flatten(1).all(1).as_subclass(torch.Tensor)
    assert torch.equal(labels.as_subclass(torch.Tensor)[same], y.as_subclass(torch.Tensor)[same])
    assert isinstance(hidden, TensorImageBW) and isinstance(labels, TensorCategory)


@pytest.mark.parametrize('share', [0.5, 0.74])
def test_labels_of_hidden_lungs_are_drawn_by_the_share_of_pneumonia_and_not_by_their_own(share):
    transform = HideLungs(1, share)
    x, _ = constant_images()
    own = torch.arange(N) < N / 2
    _, labels = transform((x, TensorCategory(own.long())), split_idx=0)
    drawn = labels.as_subclass(torch.Tensor).float()
    assert abs(drawn.sum() - share * N) < 1
    assert abs(drawn[own].mean() - drawn[~own].mean()) < 0.1
    first = torch.cat([transform.draw(3)['label'][:1] for _ in range(2000)])
    assert abs(first.float().mean() - share) < 0.05


def test_the_share_of_pneumonia_is_measured_on_the_training_images(images):
    dls = CXRDataLoaders.from_folder(images, size=64, bs=8, num_workers=0, valid='official', hide_lungs=0.4)
    (transform,) = [step for step in dls.train.after_batch.fs if isinstance(step, HideLungs)]
    labels = [int(y) for _, y in dls.train_ds]
    assert transform.share == np.mean(labels)


@pytest.mark.parametrize('kind', [ExchangeSurroundings, partial(HideLungs, share=0.5)])
def test_predictions_with_augmentation_keep_the_images(kind, images):
    dls = CXRDataLoaders.from_folder(images, size=64, bs=8, num_workers=0, valid='official', exchange=0.9)
    transform = kind(1)
    dls.train.after_batch.add(transform)
    x, y = constant_images(8)
    with without_mixing(dls.train):
        assert torch.equal(transform((x, y), split_idx=0)[0], x)
    assert not torch.equal(transform((x, y), split_idx=0)[0], x)
    (alone,) = transform((x,), split_idx=0)  # test images have no labels
    assert torch.equal(alone, x)


@pytest.mark.parametrize('fields', [{'exchange': 0.9, 'hide_lungs': 0.9}])
def test_a_learner_predicts_with_augmentation(fields, images):
    dls = CXRDataLoaders.from_folder(images, size=64, bs=8, num_workers=0, valid='official', **fields)
    learn = cxr_learner(dls, 'baseline')
    with learn.no_bar():
        p, _ = learn.tta(dl=dls.test_dl(sorted(images.glob('test/*/*.jpeg'))[:3]), n=2)
    assert p.shape == (3, 2)
    assert can_prepare_ahead(dls.train)


@pytest.mark.parametrize('transform', [ExchangeSurroundings(1), HideLungs(0.9, 0.5)])
def test_validation_images_stay_as_they_are(transform):
    x, y = constant_images(8)
    images, labels = transform((x, y), split_idx=1)
    assert torch.equal(images, x) and torch.equal(labels, y)


@pytest.mark.parametrize(('field', 'name'), [('exchange', 'ExchangeSurroundings'), ('hide_lungs', 'HideLungs')])
def test_a_recipe_prepares_batches_with_them(field, name, images):
    dls = CXRDataLoaders.from_folder(images, size=64, bs=8, num_workers=0, valid='official', **{field: 0.9})
    assert name in [type(step).__name__ for step in dls.train.after_batch.fs]
    x, y = dls.train.one_batch()
    assert x.shape == (8, 3, 64, 64) and set(y.tolist()) <= {0, 1}
    _, labels = dls.valid.one_batch()
    assert labels.tolist() == [int(y) for _, y in list(dls.valid_ds)[:8]]
