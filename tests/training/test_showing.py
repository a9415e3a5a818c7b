"""The picture of the first batch changes no training, and the log says where, how fast and how long it trains."""

import re

import pytest
import torch
from fastai.torch_core import set_seed
from torch import Tensor

from cxr_fastai.cli import main
from cxr_fastai.core.recipe import Phase, Recipe
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.models.inputs import normalize
from cxr_fastai.training.checkpoint import random_state
from cxr_fastai.training.learner import CXRLearner, recipe_learner
from cxr_fastai.training.showing import DrawBatch, plot_batch
from cxr_fastai.training.training import fit_run, train

SETTINGS = {'epochs': 2, 'size': 48, 'batch_size': 6, 'limit': 5, 'seed': 5, 'workers': 0}


def new_learner(images, recipe: Recipe) -> CXRLearner:
    set_seed(recipe.seed, reproducible=True)
    dls = CXRDataLoaders.from_items(read_items(images, limit=recipe.limit), images, recipe)
    return recipe_learner(dls, recipe)


def texts(values: object) -> str:
    """All numbers of nested states as text."""
    if isinstance(values, Tensor):
        return str(values.tolist())
    if isinstance(values, dict):
        return texts(list(values.items()))
    if isinstance(values, list | tuple):
        return ' '.join(map(texts, values))
    return str(values)


@pytest.mark.parametrize('fields', [{}, {'mixup': 0.4}, {'name': 'tuned'}])
def test_drawing_the_first_batch_changes_no_weight_and_no_random_number(images, tmp_path, fields):
    recipe = make_recipe('baseline', **SETTINGS | fields)
    path = tmp_path / 'figures' / 'batch.png'
    results = []
    for callbacks in ([], [DrawBatch(path)]):
        learn = new_learner(images, recipe)
        learn.fit_recipe(recipe, cbs=callbacks)
        results.append((learn.model.state_dict(), random_state(learn.dls)))
    (weights, state), (drawn_weights, drawn_state) = results
    assert all(torch.equal(weights[name], drawn_weights[name]) for name in weights)
    assert texts(state) == texts(drawn_state)
    assert path.read_bytes().startswith(b'\x89PNG')


def test_a_run_has_the_picture_of_its_first_batch_and_keeps_it(images, tmp_path):
    run = train(make_recipe('baseline', **SETTINGS), images, tmp_path / 'run')
    path = run / 'figures/train_batch.png'
    before = path.stat().st_mtime_ns
    learn = new_learner(images, run.recipe)
    fit_run(learn, run.recipe, run)
    assert path.stat().st_mtime_ns == before


def test_the_picture_shows_up_to_sixteen_images_with_their_labels():
    grey = torch.linspace(0, 1, 18)[:, None, None, None].expand(18, 1, 8, 8)
    names = ['NORMAL', 'PNEUMONIA'] * 8
    figure = plot_batch(normalize(grey), names)
    axes = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in axes] == names
    shown = torch.stack([torch.as_tensor(ax.images[0].get_array()).mean() for ax in axes])
    assert torch.allclose(shown, grey[:16, 0, 0, 0], atol=1e-6)
    assert '16 of 18 images, 8 px' in figure.get_suptitle()


def test_the_log_has_device_precision_rate_and_the_time_that_is_left(images, tmp_path, capsys):
    argv = ['train', '--data', images, '--out', tmp_path / 'run', '--device', 'cpu', '--workers', 0]
    options = ['--epochs', 2, '--size', 48, '--limit', 4, '--batch-size', 8]
    assert main([str(word) for word in argv + options]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = r'training baseline by the recipe reference on cpu \(.+\), precision fp32: 8 images in 1 batch, 2 epochs'
    assert any(re.fullmatch(start, line) for line in lines)
    rates = [line for line in lines if 'images/s' in line]
    assert re.search(r'^ +[\d,.]+ images/s, about .* left for 1 epoch$', rates[0])
    assert re.search(r'^ +[\d,.]+ images/s$', rates[1])
    assert any(re.search(r'^validation: 10% of the patients of train and val \(\d+ images\)$', line) for line in lines)


def test_quiet_shows_none_of_it(images, tmp_path, capsys):
    argv = ['--quiet', 'train', '--data', images, '--out', tmp_path / 'run', '--workers', 0]
    options = ['--epochs', 1, '--size', 48, '--limit', 4, '--batch-size', 8]
    assert main([str(word) for word in argv + options]) == 0
    assert capsys.readouterr().out == ''


def test_the_time_that_is_left_counts_later_phases(images, tmp_path, caplog):
    caplog.set_level('INFO', 'cxr_fastai')
    phases = (Phase('frozen', 2, 1e-3, True, patience=2), Phase('fine-tune', 2, 1e-4))
    recipe = Recipe('baseline', phases, **{name: value for name, value in SETTINGS.items() if name != 'epochs'})
    fit_run(new_learner(images, recipe), recipe, Run.create(tmp_path / 'run'))
    left = [re.search(r'(at most|about) .* left for (\d)', line) for line in caplog.messages if 'images/s' in line]
    counts = [match and match.groups() for match in left]
    assert counts == [('at most', '3'), ('about', '2'), ('about', '1'), None]  # fine-tune has no patience
