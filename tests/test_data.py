"""The specification's transforms, with torchvision's meaning of them, on training films only."""
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
from cxr_fastai.data.transforms import AugmentFilms, jitter, warp
from cxr_fastai.images.cache import find_cache, prepare
from cxr_fastai.images.decode import read_film
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.models.inputs import normalize

H, W = 60, 48  # not square, so that mixing up the axes shows
NONE = torch.tensor([False])
MODES = ['nearest', 'bilinear']


@pytest.fixture(scope='module')
def film() -> torch.Tensor:
    """A smooth film uint8 (1, 1, H, W), as films are smooth."""
    noise = torch.rand(1, 1, 8, 6, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(noise, (H, W), mode='bicubic').clamp(0, 1).mul(255).to(torch.uint8)


def unit(film): return film.float()/255


def levels(ours: torch.Tensor, theirs: torch.Tensor, inside: torch.Tensor | None = None) -> float:
    """The largest difference in grey levels, where `inside`."""
    gap = (ours*255 - theirs.float()).abs()
    return float((gap if inside is None else gap[inside]).max())


def test_the_flip_is_torchvisions(film):
    ours = warp(unit(film), ~NONE, torch.zeros(1), torch.zeros(1, 2))
    assert levels(ours, TF.hflip(film)) <= 1


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('angle', [-10.0, -3.3, 7.7, 10.0])
def test_the_rotation_is_torchvisions(film, angle, mode):
    ours = warp(unit(film), NONE, torch.tensor([angle]), torch.zeros(1, 2), mode)
    rotate = lambda x: TF.rotate(x, angle, interpolation=InterpolationMode(mode))
    assert levels(ours, rotate(film), rotate(torch.ones(1, 1, H, W)) > 0.999) <= 1


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('shift', [(5, 0), (0, -6), (-4, 3)])
def test_the_translation_is_torchvisions(film, shift, mode):
    ours = warp(unit(film), NONE, torch.zeros(1), torch.tensor([shift]).float(), mode)
    assert levels(ours, TF.affine(film, 0.0, list(shift), 1.0, [0.0])) <= 1


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize(('angle', 'shift'), [(9.7, (5, -6)), (-8.0, (-3, 4))])
def test_flip_rotation_and_translation_compose_in_torchvisions_order(film, angle, shift, mode):
    def stepwise(x):
        turned = TF.rotate(TF.hflip(x), angle, interpolation=InterpolationMode(mode))
        return TF.affine(turned, 0.0, list(shift), 1.0, [0.0])
    ours = warp(unit(film), ~NONE, torch.tensor([angle]), torch.tensor([shift]).float(), mode)
    # Stepwise, what the rotation pushes out of the frame is lost even where the shift would bring it back.
    assert levels(ours, stepwise(unit(film))*255, stepwise(torch.ones(1, 1, H, W)) > 0.999) <= 1


@pytest.mark.parametrize('factor', [0.8, 1.0, 1.2])
def test_brightness_and_contrast_are_torchvisions(film, factor):
    one = torch.ones(1)
    assert levels(jitter(unit(film), factor*one, one, NONE), TF.adjust_brightness(film, factor)) <= 1
    assert levels(jitter(unit(film), one, factor*one, NONE), TF.adjust_contrast(film, factor)) <= 1


@pytest.mark.parametrize('brighter_first', [True, False])
def test_brightness_and_contrast_keep_their_order(film, brighter_first):
    steps = [lambda x: TF.adjust_brightness(x, 1.2), lambda x: TF.adjust_contrast(x, 0.8)]
    theirs = unit(film)
    for step in steps if brighter_first else steps[::-1]: theirs = step(theirs)
    ours = jitter(unit(film), torch.tensor([1.2]), torch.tensor([0.8]), torch.tensor([brighter_first]))
    assert levels(ours, theirs*255) <= 1e-3


def test_draws_have_the_specifications_ranges():
    torch.manual_seed(0)
    p = AugmentFilms().draw(2000, 200, 100)
    for name, low, high in [('angle', -10, 10), ('brightness', 0.8, 1.2), ('contrast', 0.8, 1.2)]:
        reach = (high - low)/100
        assert low <= p[name].min() < low + reach and high - reach < p[name].max() <= high
    assert (p['shift'] == p['shift'].round()).all()
    assert p['shift'].amin(0).tolist() == [-10, -20] and p['shift'].amax(0).tolist() == [10, 20]
    assert 0.45 < p['flip'].float().mean() < 0.55 and 0.45 < p['brighter_first'].float().mean() < 0.55


def test_each_film_of_a_batch_is_drawn_by_itself():
    films = TensorImageBW(torch.rand(1, 1, 32, 32).repeat(6, 1, 1, 1))
    augmented = AugmentFilms()(films, split_idx=0)
    assert len({tuple(film.flatten().tolist()) for film in augmented}) == 6
    assert torch.equal(AugmentFilms()(films, split_idx=1), films)


@pytest.fixture(scope='module')
def recipe(): return make_recipe('baseline', size=64, batch_size=7)


@pytest.fixture(scope='module')
def items(films): return read_items(films)


@pytest.fixture(scope='module')
def dls(items, films, recipe): return make_dls(items, films, recipe)


def test_valid_and_test_films_reach_the_network_untouched(dls, items, films, recipe):
    for split, dl in [('valid', dls.valid), ('test', dls.test_dl(locate(items[items.split == 'test'], films)))]:
        pixels = [Preprocessing.of(recipe).load(films/path) for path in items[items.split == split].path]
        wanted = normalize(torch.from_numpy(np.stack(pixels))[:, None].float()/255)
        assert torch.equal(torch.cat([batch[0].as_subclass(torch.Tensor) for batch in dl]), wanted)


def test_training_films_are_augmented_anew_each_time(dls):
    item = dls.train_ds[0]
    dls.train.before_iter()
    batches = [dls.train.after_batch(dls.train.create_batch([item]))[0] for _ in range(2)]
    assert not torch.equal(*batches) and batches[0].shape == (1, 3, 64, 64)


def test_the_loader_is_the_specifications(dls, items):
    assert dls.train.shuffle and not dls.valid.shuffle
    assert not dls.train.drop_last and (dls.train.bs, dls.train.fake_l.num_workers) == (7, 0)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (sum(items.split == 'train'), sum(items.split == 'valid'))
    assert list(dls.vocab) == ['NORMAL', 'PNEUMONIA']


def test_test_films_are_in_no_loader(dls, items):
    seen = {str(path) for dl in dls.loaders for path in dl.dataset.items.path}
    assert not any(path.endswith(test) for path in seen for test in items[items.split == 'test'].path)


def test_paths_and_arrays_can_be_predicted_on(dls, items, films):
    path = films/items.path[0]
    for source in ([path], [str(path)], [read_film(path)]):
        assert torch.equal(dls.test_dl(source).one_batch()[0], dls.test_dl([path]).one_batch()[0])


def test_show_batch_draws_films(dls):
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    for dl in (dls.train, dls.valid):
        dl.show_batch(max_n=4)
        drawn = [ax for ax in plt.gcf().axes if ax.images]
        assert len(drawn) == 4 and {ax.get_title() for ax in drawn} <= {'NORMAL', 'PNEUMONIA'}
        assert drawn[0].images[0].get_array().shape == (64, 64, 3)
        plt.close('all')


def test_worker_processes_read_the_same_films(items, films, recipe):
    dls = make_dls(items, films, dataclasses.replace(recipe, workers=2))
    alone = make_dls(items, films, recipe)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(dls.valid, alone.valid, strict=True))


@pytest.mark.parametrize('cached', [False, True])
def test_a_low_pass_is_the_same_in_training_and_in_prediction(items, films, cached):
    recipe = make_recipe('baseline', size=64, low_pass=1/32)
    preprocessing = Preprocessing.of(recipe)
    if cached: prepare(list(items.path), films, preprocessing)
    dls = make_dls(items, films, recipe, find_cache(films, preprocessing) if cached else None)
    of_dls = torch.cat([batch[0].as_subclass(torch.Tensor) for batch in dls.valid])
    pixels = np.stack([preprocessing.load(films/path) for path in items[items.split == 'valid'].path])
    assert torch.equal(of_dls, normalize(torch.from_numpy(pixels)[:, None].float()/255))
    sharp = np.stack([Preprocessing(64).load(films/path) for path in items[items.split == 'valid'].path])
    theirs = np.stack([gaussian_filter(film.astype(float), 2, mode='nearest') for film in sharp])
    assert np.abs(theirs - pixels).mean() < 1 < np.abs(sharp.astype(float) - pixels).mean()
