"""Averaged weights, growing images and learning rate schedules follow their formulas."""

import copy

import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import nn
from torch.optim.swa_utils import AveragedModel

from cxr_fastai.core.run import Run
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.data.transforms import AugmentImages
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.callbacks import moving_average, recipe_callbacks
from cxr_fastai.training.learner import recipe_learner
from cxr_fastai.training.training import fit_run

SETTINGS = {'epochs': 2, 'size': 48, 'batch_size': 4, 'limit': 6, 'seed': 5, 'workers': 0}


def new_learner(images, recipe) -> Learner:
    """A learner with the same random weights in every call."""
    torch.manual_seed(recipe.seed)
    return recipe_learner(CXRDataLoaders.from_items(read_items(images, limit=recipe.limit), images, recipe), recipe)


def fit_recipe(images, folder, *cbs: Callback, **fields) -> tuple[Learner, Run]:
    recipe = make_recipe('baseline', **SETTINGS | fields)
    learn = new_learner(images, recipe)
    run = Run.create(folder / 'run')
    fit_run(learn, recipe, run, cbs=cbs)
    return learn, run


class Record(Callback):
    """Record weights, image size and learning rates of each step, and the weights that validation uses."""

    order = 70

    def __init__(self):
        self.weights, self.validated, self.sizes, self.rates = [], [], [], []

    def after_batch(self):
        if not self.training:
            return
        self.weights.append(copy.deepcopy(self.model.state_dict()))
        self.sizes.append(self.xb[0].shape[-1])
        self.rates.append([group['lr'] for group in self.opt.hypers])

    def before_validate(self):
        self.validated.append(copy.deepcopy(self.model.state_dict()))


def test_validation_and_the_best_epoch_use_the_averaged_weights_but_training_does_not(images, tmp_path):
    record = Record()
    learn, _ = fit_recipe(images, tmp_path, record, ema=0.8)
    name = '1.6.weight'
    average = new_learner(images, make_recipe('baseline', **SETTINGS)).model.state_dict()[name].clone()
    averages = []
    for step, weights in enumerate(record.weights, 1):
        decay = min(0.8, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weights[name]
        averages.append(average)
    steps = len(record.weights) // 2
    after_epochs = averages[steps - 1 :: steps]
    for validated, average in zip(record.validated, after_epochs, strict=True):
        assert torch.allclose(validated[name], average, atol=1e-6)
    kept = learn.model.state_dict()[name]
    assert any(torch.allclose(kept, average, atol=1e-6) for average in after_epochs)
    assert not any(torch.equal(kept, weights[name]) for weights in record.weights)


def test_counters_are_copied_into_the_average():
    model = nn.BatchNorm1d(1)
    average = AveragedModel(model, multi_avg_fn=moving_average(0.9), use_buffers=True)
    average.update_parameters(model)
    model.num_batches_tracked += 7
    model.running_mean += 1
    average.update_parameters(model)
    assert average.module.num_batches_tracked == 7
    assert 0 < average.module.running_mean.item() < 1


def test_images_start_small_and_reach_their_full_size(images, tmp_path):
    record = Record()
    learn, _ = fit_recipe(images, tmp_path, record, start_size=0.5, size=128)
    assert record.sizes[0] == 64 and record.sizes[-1] == 128 and record.sizes == sorted(record.sizes)
    assert learn.dls.valid.one_batch()[0].shape[-1] == 128


def test_images_have_their_full_size_without_the_callback(images):
    recipe = make_recipe('baseline', 'tuned', size=128, batch_size=4, limit=4, workers=0)
    dls = CXRDataLoaders.from_items(read_items(images, limit=4), images, recipe)
    assert [step.share for step in dls.train.after_batch.fs if isinstance(step, AugmentImages)] == [1]


def test_one_cycle_raises_and_lowers_the_learning_rate_of_each_group(images, tmp_path):
    record = Record()
    _, run = fit_recipe(images, tmp_path, record, schedule='one-cycle', body_lr=0.1, lr=1e-3, epochs=3)
    body, head = zip(*record.rates, strict=True)
    peak = head.index(max(head))
    assert 0 < peak < len(head) - 1 and max(head) == pytest.approx(1e-3, rel=0.05) and head[-1] < 1e-4
    assert body == pytest.approx([rate / 10 for rate in head])
    assert run.history.lr.max() == pytest.approx(max(head))


def test_a_recipe_has_only_the_callbacks_of_its_fields():
    assert recipe_callbacks(make_recipe('baseline')) == []
    recipe = make_recipe('baseline', mixup=0.2, clip=1, ema=0.9, start_size=0.5, precision='bf16')
    names = [type(callback).__name__ for callback in recipe_callbacks(recipe)]
    assert names == ['MixUp', 'GradientClip', 'AverageWeights', 'Precision', 'GrowImages']


@pytest.fixture(scope='module')
def default_loss(images, tmp_path_factory) -> float:
    """The mean training loss of one epoch of the default recipe."""
    return fit_recipe(images, tmp_path_factory.mktemp('default'), epochs=1)[1].history.train_loss[0]


@pytest.mark.parametrize(
    'fields',
    [
        {'mixup': 0.4},
        {'clip': 0.5},
        {'label_smoothing': 0.2},
        {'class_weights': True},
        {'erase': 1.0},
        {'optimizer': 'adamw', 'weight_decay': 0.1},
    ],
)
def test_every_field_changes_the_training_loss(default_loss, images, tmp_path, fields):
    changed = fit_recipe(images, tmp_path, epochs=1, **fields)[1]
    assert changed.history.train_loss[0] != default_loss
