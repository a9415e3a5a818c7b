"""The specification's transforms, with torchvision's meaning of them, on training images only."""

import dataclasses

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorImageBW
from scipy.ndimage import gaussian_filter
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import locate, make_dls
from cxr_fastai.data.transforms import AugmentImages, jitter, warp
from cxr_fastai.images.cache import find_cache, prepare
from cxr_fastai.images.decode import read_image
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.models.inputs import normalize

H, W = 60, 48  # not square, so that mixing up the axes shows
NONE = torch.tensor([False])
MODES = ['nearest', 'bilinear']


@pytest.fixture(scope='module')
def image() -> torch.Tensor:
    """A smooth image uint8 (1, 1, H, W), as images are smooth."""
    noise = torch.rand(1, 1, 8, 6, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(noise, (H, W), mode='bicubic').clamp(0, 1).mul(255).to(torch.uint8)


def unit(image):
    return image.float() / 255


def levels(ours: torch.Tensor, theirs: torch.Tensor, inside: torch.Tensor | None = None) -> float:
    """The largest difference in grey levels, where `inside`."""
    gap = (ours * 255 - theirs.float()).abs()
    return float((gap if inside is None else gap[inside]).max())


def test_the_flip_is_torchvisions(image):
    ours = warp(unit(image), ~NONE, torch.zeros(1), torch.zeros(1, 2))
    assert levels(ours, TF.hflip(image)) <= 1


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('angle', [-10.0, -3.3, 7.7, 10.0])
def test_the_rotation_is_torchvisions(image, angle, mode):
    ours = warp(unit(image), NONE, torch.tensor([angle]), torch.zeros(1, 2), mode)
    rotate = lambda x: TF.rotate(x, angle, interpolation=InterpolationMode(mode))
    assert levels(ours, rotate(image), rotate(torch.ones(1, 1, H, W)) > 0.999) <= 1


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('shift', [(5, 0), (0, -6), (-4, 3)])
def test_the_translation_is_torchvisions(image, shift, mode):
    ours = warp(unit(image), NONE, torch.zeros(1), torch.tensor([shift]).float(), mode)
    assert levels(ours, TF.affine(image, 0.0, list(shift), 1.0, [0.0])) <= 1


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize(('angle', 'shift'), [(9.7, (5, -6)), (-8.0, (-3, 4))])
def test_flip_rotation_and_translation_compose_in_torchvisions_order(image, angle, shift, mode):
    def stepwise(x):
        turned = TF.rotate(TF.hflip(x), angle, interpolation=InterpolationMode(mode))
        return TF.affine(turned, 0.0, list(shift), 1.0, [0.0])

    ours = warp(unit(image), ~NONE, torch.tensor([angle]), torch.tensor([shift]).float(), mode)
    # Stepwise, what the rotation pushes out of the frame is lost even where the shift would bring it back.
    assert levels(ours, stepwise(unit(image)) * 255, stepwise(torch.ones(1, 1, H, W)) > 0.999) <= 1


@pytest.mark.parametrize('factor', [0.8, 1.0, 1.2])
def test_brightness_and_contrast_are_torchvisions(image, factor):
    one = torch.ones(1)
    assert levels(jitter(unit(image), factor * one, one, NONE), TF.adjust_brightness(image, factor)) <= 1
    assert levels(jitter(unit(image), one, factor * one, NONE), TF.adjust_contrast(image, factor)) <= 1


@pytest.mark.parametrize('brighter_first', [True, False])
def test_brightness_and_contrast_keep_their_order(image, brighter_first):
    steps = [lambda x: TF.adjust_brightness(x, 1.2), lambda x: TF.adjust_contrast(x, 0.8)]
    theirs = unit(image)
    for step in steps if brighter_first else steps[::-1]:
        theirs = step(theirs)
    ours = jitter(unit(image), torch.tensor([1.2]), torch.tensor([0.8]), torch.tensor([brighter_first]))
    assert levels(ours, theirs * 255) <= 1e-3


def test_draws_have_the_specifications_ranges():
    torch.manual_seed(0)
    p = AugmentImages().draw(2000, 200, 100)
    for name, low, high in [('angle', -10, 10), ('brightness', 0.8, 1.2), ('contrast', 0.8, 1.2)]:
        reach = (high - low) / 100
        assert low <= p[name].min() < low + reach and high - reach < p[name].max() <= high
    assert (p['shift'] == p['shift'].round()).all()
    assert p['shift'].amin(0).tolist() == [-10, -20] and p['shift'].amax(0).tolist() == [10, 20]
    assert 0.45 < p['flip'].float().mean() < 0.55 and 0.45 < p['brighter_first'].float().mean() < 0.55


def test_each_image_of_a_batch_is_drawn_by_itself():
    images = TensorImageBW(torch.rand(1, 1, 32, 32).repeat(6, 1, 1, 1))
    augmented = AugmentImages()(images, split_idx=0)
    assert len({tuple(image.flatten().tolist()) for image in augmented}) == 6
    assert torch.equal(AugmentImages()(images, split_idx=1), images)


@pytest.fixture(scope='module')
def recipe():
    return make_recipe('baseline', size=64, batch_size=7)


@pytest.fixture(scope='module')
def items(images):
    return read_items(images)


@pytest.fixture(scope='module')
def dls(items, images, recipe):
    return make_dls(items, images, recipe)


def test_valid_and_test_images_reach_the_network_untouched(dls, items, images, recipe):
    for split, dl in [('valid', dls.valid), ('test', dls.test_dl(locate(items[items.split == 'test'], images)))]:
        pixels = [Preprocessing.of(recipe).load(images / path) for path in items[items.split == split].path]
        wanted = normalize(torch.from_numpy(np.stack(pixels))[:, None].float() / 255)
        assert torch.equal(torch.cat([batch[0].as_subclass(torch.Tensor) for batch in dl]), wanted)


def test_training_images_are_augmented_anew_each_time(dls):
    item = dls.train_ds[0]
    dls.train.before_iter()
    batches = [dls.train.after_batch(dls.train.create_batch([item]))[0] for _ in range(2)]
    assert not torch.equal(*batches) and batches[0].shape == (1, 3, 64, 64)


def test_the_loader_is_the_specifications(dls, items):
    assert dls.train.shuffle and not dls.valid.shuffle
    assert not dls.train.drop_last and (dls.train.bs, dls.train.fake_l.num_workers) == (7, 0)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (sum(items.split == 'train'), sum(items.split == 'valid'))
    assert list(dls.vocab) == ['NORMAL', 'PNEUMONIA']


def test_test_images_are_in_no_loader(dls, items):
    seen = {str(path) for dl in dls.loaders for path in dl.dataset.items.path}
    assert not any(path.endswith(test) for path in seen for test in items[items.split == 'test'].path)


def test_paths_and_arrays_can_be_predicted_on(dls, items, images):
    path = images / items.path[0]
    for source in ([path], [str(path)], [read_image(path)]):
        assert torch.equal(dls.test_dl(source).one_batch()[0], dls.test_dl([path]).one_batch()[0])


def test_show_batch_draws_images(dls):
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    for dl in (dls.train, dls.valid):
        dl.show_batch(max_n=4)
        drawn = [ax for ax in plt.gcf().axes if ax.images]
        assert len(drawn) == 4 and {ax.get_title() for ax in drawn} <= {'NORMAL', 'PNEUMONIA'}
        assert drawn[0].images[0].get_array().shape == (64, 64, 3)
        plt.close('all')


def test_worker_processes_read_the_same_images(items, images, recipe):
    dls = make_dls(items, images, dataclasses.replace(recipe, workers=2))
    alone = make_dls(items, images, recipe)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(dls.valid, alone.valid, strict=True))


@pytest.mark.parametrize('cached', [False, True])
def test_a_low_pass_is_the_same_in_training_and_in_prediction(items, images, cached):
    recipe = make_recipe('baseline', size=64, low_pass=1 / 32)
    preprocessing = Preprocessing.of(recipe)
    if cached:
        prepare(list(items.path), images, preprocessing)
    dls = make_dls(items, images, recipe, find_cache(images, preprocessing) if cached else None)
    of_dls = torch.cat([batch[0].as_subclass(torch.Tensor) for batch in dls.valid])
    pixels = np.stack([preprocessing.load(images / path) for path in items[items.split == 'valid'].path])
    assert torch.equal(of_dls, normalize(torch.from_numpy(pixels)[:, None].float() / 255))
    sharp = np.stack([Preprocessing(64).load(images / path) for path in items[items.split == 'valid'].path])
    theirs = np.stack([gaussian_filter(image.astype(float), 2, mode='nearest') for image in sharp])
    assert np.abs(theirs - pixels).mean() < 1 < np.abs(sharp.astype(float) - pixels).mean()
