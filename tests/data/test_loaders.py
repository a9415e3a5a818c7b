"""The `DataLoaders`: which images they contain, and that training and prediction prepare images in the same way."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from cxr_fastai.core.errors import ImageError
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import CXRDataLoaders, describe_unreadable, find_unreadable, locate
from cxr_fastai.images.cache import find_cache, prepare
from cxr_fastai.images.decode import read_image
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.models.inputs import normalize


@pytest.fixture(scope='module')
def recipe():
    return make_recipe('baseline', size=64, batch_size=7)


@pytest.fixture(scope='module')
def items(images):
    return read_items(images)


@pytest.fixture(scope='module')
def dls(items, images, recipe):
    return CXRDataLoaders.from_items(items, images, recipe)


def all_inputs(dl) -> torch.Tensor:
    return torch.cat([batch[0].as_subclass(torch.Tensor) for batch in dl])


def network_inputs(pixels: np.ndarray) -> torch.Tensor:
    return normalize(torch.from_numpy(pixels)[:, None].float() / 255)


def test_valid_and_test_images_are_prepared_as_for_prediction(dls, items, images, recipe):
    test_dl = dls.test_dl(locate(items[items.split == 'test'], images))
    for split, dl in [('valid', dls.valid), ('test', test_dl)]:
        paths = items[items.split == split].path
        pixels = np.stack([Preprocessing.of(recipe).load(images / path) for path in paths])
        assert torch.equal(all_inputs(dl), network_inputs(pixels))


def test_training_images_are_augmented_differently_each_time(dls):
    item = dls.train_ds[0]
    dls.train.before_iter()
    first, second = (dls.train.after_batch(dls.train.create_batch([item]))[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert first.shape == (1, 3, 64, 64)


def test_the_loader_has_the_settings_of_the_specification(dls, items):
    assert dls.train.shuffle
    assert not dls.valid.shuffle
    assert not dls.train.drop_last
    assert dls.train.bs == 7
    assert dls.train.fake_l.num_workers == 0
    assert len(dls.train_ds) == sum(items.split == 'train')
    assert len(dls.valid_ds) == sum(items.split == 'valid')
    assert list(dls.vocab) == ['NORMAL', 'PNEUMONIA']


def test_test_images_are_in_no_loader(dls, items, images):
    loaded = {str(path) for dl in dls.loaders for path in dl.dataset.items.path}
    test_images = {str(images / path) for path in items[items.split == 'test'].path}
    assert not loaded & test_images


def test_test_dl_accepts_paths_and_arrays(dls, items, images):
    path = images / items.path[0]
    expected = dls.test_dl([path]).one_batch()[0]
    for source in (str(path), read_image(path)):
        assert torch.equal(dls.test_dl([source]).one_batch()[0], expected)


def test_show_batch_draws_images_with_their_labels(dls):
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    for dl in (dls.train, dls.valid):
        dl.show_batch(max_n=4)
        axes = [ax for ax in plt.gcf().axes if ax.images]
        assert len(axes) == 4
        assert {ax.get_title() for ax in axes} <= {'NORMAL', 'PNEUMONIA'}
        assert axes[0].images[0].get_array().shape == (64, 64, 3)
        plt.close('all')


def test_worker_processes_read_the_same_images(items, images, recipe, dls):
    with_workers = CXRDataLoaders.from_items(items, images, dataclasses.replace(recipe, workers=2))
    assert torch.equal(all_inputs(with_workers.valid), all_inputs(dls.valid))


@pytest.mark.parametrize('cached', [False, True])
def test_a_low_pass_is_the_same_in_training_and_in_prediction(items, images, cached):
    recipe = make_recipe('baseline', size=64, low_pass=1 / 32)
    preprocessing = Preprocessing.of(recipe)
    cache = None
    if cached:
        prepare(list(items.path), images, preprocessing)
        cache = find_cache(images, preprocessing)
        assert cache is not None
    dls = CXRDataLoaders.from_items(items, images, recipe, cache)
    paths = [images / path for path in items[items.split == 'valid'].path]
    pixels = np.stack([preprocessing.load(path) for path in paths])
    assert torch.equal(all_inputs(dls.valid), network_inputs(pixels))
    sharp = np.stack([Preprocessing(64).load(path) for path in paths]).astype(float)
    expected = np.stack([gaussian_filter(image, 2, mode='nearest') for image in sharp])
    assert np.abs(expected - pixels).mean() < 1
    assert np.abs(sharp - pixels).mean() > 1


def test_unreadable_images_are_found_and_the_first_are_named(items, images, tmp_path):
    good = images / items.path[0]
    bad = [tmp_path / f'{i}.png' for i in range(5)]
    for path in bad:
        path.write_bytes(b'not an image')
    errors = find_unreadable([good, *bad])
    assert list(errors) == bad
    assert all(isinstance(error, ImageError) for error in errors.values())
    text = describe_unreadable(errors)
    assert '2.png' in text
    assert '3.png' not in text
    assert text.endswith('; and 2 more')
