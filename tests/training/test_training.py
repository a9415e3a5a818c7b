"""Phases, history, the best epoch, the plateau schedule, reproducibility, and the options of `train`."""

import dataclasses
import json
import math

import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from faults import nan_before_batch

from cxr_fastai.cli import main
from cxr_fastai.core.recipe import Phase
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.models.architectures import build_model, make_recipe
from cxr_fastai.training import training
from cxr_fastai.training.callbacks import COLUMNS, History
from cxr_fastai.training.learner import Diverged, recipe_learner
from cxr_fastai.training.restoring import load_learner
from cxr_fastai.training.training import fit_run, train

SMALL = make_recipe('baseline', epochs=2, size=48, batch_size=8, limit=4, seed=5, workers=0, valid='official')
"""One batch per epoch: 4 images of each class."""


@pytest.fixture
def learn(images) -> Learner:
    return recipe_learner(CXRDataLoaders.from_items(read_items(images, limit=SMALL.limit), images, SMALL), SMALL)


@pytest.fixture
def new_run(tmp_path) -> Run:
    return Run.create(tmp_path / 'run')


def with_phases(*phases: tuple):
    """The small recipe with other phases."""
    return dataclasses.replace(SMALL, phases=tuple(Phase(*fields) for fields in phases))


def test_two_trainings_with_one_seed_give_the_same_history(images, tmp_path):
    short = dataclasses.replace(SMALL, batch_size=4, phases=SMALL.phases[:1])
    recipes = {'a': short, 'b': short, 'c': dataclasses.replace(short, seed=6)}
    runs = {name: train(recipe, images, tmp_path / name) for name, recipe in recipes.items()}
    a, b, c = (run.history.drop(columns='seconds') for run in runs.values())
    assert a.equals(b) and not a.equals(c)


def test_the_history_has_one_row_per_epoch_over_all_phases(learn, new_run):
    fit_run(learn, with_phases(('frozen', 1, 1e-3, True), ('fine-tune', 2, 1e-5)), new_run)
    assert list(new_run.history) == COLUMNS
    assert new_run.history[['phase', 'epoch', 'lr']].values.tolist() == [
        ['frozen', 1, 1e-3],
        ['fine-tune', 2, 1e-5],
        ['fine-tune', 3, 1e-5],
    ]


def test_the_training_loss_is_the_mean_over_the_images_of_the_epoch(learn, new_run):
    losses = []
    loss_func = learn.loss_func

    def recording_loss(predictions, labels):
        loss = loss_func(predictions, labels)
        losses.append(loss.item())
        return loss

    learn.loss_func = recording_loss
    fit_run(learn, with_phases(('train', 1, 1e-3)), new_run)
    assert new_run.history.train_loss[0] == pytest.approx(losses[0])  # there is one batch


class Script(Callback):
    """Replace the AUC and loss of each epoch by given ones, and set a weight to the number of the epoch."""

    order = History.order + 0.5

    def __init__(self, scores: list[tuple[float, float]]):
        self.scores = scores

    def after_epoch(self):
        rows = self.history.rows
        rows[-1]['roc_auc'], rows[-1]['valid_loss'] = self.scores[len(rows) - 1]
        with torch.no_grad():
            self.model[1][-1].bias.fill_(len(rows))


@pytest.mark.parametrize(
    ('scores', 'best'),
    [
        ([(0.8, 0.5), (0.9, 0.9), (0.7, 0.1)], 2),  # highest AUC, in any phase
        ([(0.9, 0.5), (0.9, 0.4), (0.9, 0.4)], 2),  # equal AUC: lowest loss, then the first epoch
        ([(math.nan, 0.5), (math.nan, 0.6), (math.nan, 0.3)], 3),  # undefined AUC: lowest loss
    ],
)
def test_the_best_epoch_of_all_phases_is_kept(learn, new_run, scores, best):
    row = fit_run(learn, with_phases(('one', 1, 1e-3), ('two', 2, 1e-3)), new_run, cbs=[Script(scores)])
    assert (row['epoch'], learn.model[1][-1].bias[0].item()) == (best, best)


def test_a_plateau_of_the_validation_loss_reduces_the_learning_rate(learn, new_run):
    recipe = dataclasses.replace(with_phases(('train', 6, 1e-3)), plateau_factor=0.1, plateau_patience=1)
    script = Script([(0.5, loss) for loss in (0.5, 0.6, 0.6, 0.6, 0.6, 0.6)])
    fit_run(learn, recipe, new_run, cbs=[script])
    assert new_run.history.lr.tolist() == pytest.approx([1e-3, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5])


class NaNWeight(Callback):
    """Make a weight NaN before a step, or before validation, of the second epoch."""

    def __init__(self, event: str):
        self.event = event

    def before_batch(self):
        if self.training and self.event == 'before_batch':
            self._break_model()

    def before_validate(self):
        if self.event == 'before_validate':
            self._break_model()

    def _break_model(self):
        if self.history.rows:
            self.model[0][0][0].weight.data.fill_(math.nan)


def test_a_nan_training_loss_ends_the_fit_with_the_weights_of_the_best_epoch(learn, new_run):
    recipe = with_phases(('one', 1, 1e-3), ('two', 2, 1e-4))
    message = 'the training loss is nan in epoch 2, batch 1. The best network so far, of epoch 1, was kept'
    with pytest.raises(Diverged, match=message) as raised:
        fit_run(learn, recipe, new_run, cbs=[NaNWeight('before_batch')])
    assert raised.value.exit_code == 6 and raised.value.best['epoch'] == 1 and len(new_run.history) == 1
    assert all(torch.isfinite(parameter).all() for parameter in learn.model.parameters())
    assert json.loads((new_run / 'failure.json').read_text()) == {
        'phase': 'two',
        'epoch': 2,
        'where': 'training',
        'batch': 1,
        'loss': 'nan',
        'lr': 1e-4,
        'best_epoch': 1,
    }


def test_a_nan_validation_loss_ends_the_fit_too(learn, new_run):
    with pytest.raises(Diverged, match='the validation loss is nan in epoch 2. The best network so far, of epoch 1'):
        fit_run(learn, SMALL, new_run, cbs=[NaNWeight('before_validate')])
    assert len(new_run.history) == 1


def test_a_training_that_diverges_in_the_first_epoch_saves_no_model(images, tmp_path):
    recipe = dataclasses.replace(with_phases(('train', 2, 1e30)), batch_size=4)
    with pytest.raises(Diverged, match='No epoch was completed before. Train again with a lower --lr'):
        train(recipe, images, tmp_path / 'run')
    assert not (tmp_path / 'run/learner.pkl').exists()


def test_a_training_that_diverges_later_saves_the_best_model_so_far(images, tmp_path):
    with nan_before_batch(2), pytest.raises(Diverged):
        train(SMALL, images, tmp_path / 'run')
    network = load_learner(tmp_path / 'run/learner.pkl').model
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())


def test_a_validation_with_one_class_selects_the_best_epoch_by_loss(images, tmp_path):
    items = read_items(images, limit=4)
    kept = items[(items.split != 'valid') | (items.label == 'NORMAL')]
    table = kept.assign(path=[str(images / path) for path in kept.path])
    table.to_csv(tmp_path / 'images.csv', index=False)
    with pytest.warns(UserWarning, match='4 NORMAL and 0 PNEUMONIA'):
        run = train(SMALL, tmp_path / 'images.csv', tmp_path / 'run')
    assert run.history.roc_auc.isna().all()
    assert run.last_event('end')['best']['epoch'] == run.history.valid_loss.idxmin() + 1


def test_the_run_folder_records_recipe_images_and_environment(run, images):
    assert run.recipe.size == 64 and run.items.equals(pd.DataFrame(read_items(images)))
    start = run.last_event('start')
    assert {'time', 'data', 'device', 'python', 'torch', 'fastai', 'cxr_fastai'} <= set(start)
    assert run.last_event('end')['best']['epoch'] in run.history.epoch.to_list()


@pytest.fixture
def train_without_fit(images, tmp_path, monkeypatch):
    """A function that runs `cxr-fastai train OPTIONS` without the fit, and returns the recipe and the learner."""
    fits = []

    def record(learn, recipe, *_):
        fits.append((recipe, learn))
        return {}

    monkeypatch.setattr(training, 'fit_run', record)

    def run_train(*options: str):
        assert main(['train', '--data', str(images), '--out', str(tmp_path / 'run'), *options]) == 0
        recipe, learn = fits[-1]
        assert Run.open(tmp_path / 'run').recipe == recipe
        return recipe, learn

    return run_train


def test_every_option_of_train_has_its_effect(train_without_fit):
    options = '--epochs 3 --lr 0.005 --valid official --size 56 --batch-size 5 --workers 2 --limit 4 --seed 9'
    recipe, learn = train_without_fit(*options.split())
    assert recipe.epochs == 3 and recipe.phases[0].lr == 0.005
    assert recipe.valid == 'official' and len(learn.dls.valid_ds) == 8
    assert learn.dls.train.bs == learn.dls.valid.bs == 5
    assert learn.dls.train.fake_l.num_workers == 2
    assert len(learn.dls.train_ds) == 8
    assert recipe.seed == 9 and torch.initial_seed() == 9
    assert learn.dls.new(num_workers=0).one_batch()[0].shape == (5, 3, 56, 56)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('options', 'has_effect'),
    [
        ('--epochs 3', lambda recipe, learn: recipe.epochs == 3),
        ('--lr 0.005', lambda recipe, learn: recipe.phases[0].lr == 0.005),
        ('--valid official', lambda recipe, learn: recipe.valid == 'official' and len(learn.dls.valid_ds) == 12),
        ('', lambda recipe, learn: recipe.valid == 'patients' and len(learn.dls.valid_ds) < 12),
        ('--size 56', lambda recipe, learn: learn.dls.one_batch()[0].shape[-2:] == (56, 56)),
        ('--batch-size 5', lambda recipe, learn: learn.dls.train.bs == learn.dls.valid.bs == 5),
        ('--workers 2', lambda recipe, learn: learn.dls.train.fake_l.num_workers == 2),
        ('--limit 4', lambda recipe, learn: len(learn.dls.train_ds) == 8),
        ('--seed 9', lambda recipe, learn: recipe.seed == 9 and torch.initial_seed() == 9),
        ('--arch resnet50 --weights none', lambda recipe, learn: hasattr(learn.model[0], 'layer4')),
    ],
)
def test_each_option_of_train_has_its_effect_alone(train_without_fit, options, has_effect):
    assert has_effect(*train_without_fit(*options.split()))


def test_weights_from_a_file_are_those_of_the_network(train_without_fit, tmp_path):
    weights = build_model('baseline').state_dict()
    torch.save(weights, tmp_path / 'w.pth')
    _, learn = train_without_fit('--size', '48', '--weights', str(tmp_path / 'w.pth'))
    assert all(torch.equal(value, weights[name]) for name, value in learn.model.state_dict().items())


def test_epochs_are_a_bar_on_a_terminal_and_plain_lines_of_100_columns_in_the_log(learn, new_run, terminal, caplog):
    caplog.set_level('INFO', 'cxr_fastai')
    with terminal.used():
        fit_run(learn, SMALL, new_run)
    assert 'validation' in terminal.getvalue()
    lines = [line for line in caplog.messages if 'AUC' in line]
    assert len(lines) == 2 and max(map(len, lines)) <= 100
    assert not any('\x1b' in line for line in caplog.messages)


@pytest.mark.real
@pytest.mark.slow
def test_real_images_can_be_trained_and_evaluated(real_images, tmp_path):
    run = tmp_path / 'run'
    options = ['--limit', '60', '--size', '64', '--epochs', '2']
    assert main(['train', '--data', str(real_images), '--out', str(run), *options]) == 0
    assert main(['evaluate', str(run), '--split', 'valid']) == 0
    assert Run.open(run).metrics['valid']['n'] == 120


def test_train_and_the_loaders_choose_the_same_validation_images(train_without_fit, images):
    recipe, learn = train_without_fit('--set', 'valid_pct=0.25')
    dls = CXRDataLoaders.from_folder(images, valid_pct=0.25)
    assert recipe.valid_pct == 0.25
    assert learn.dls.valid.items.path.tolist() == dls.valid.items.path.tolist()
