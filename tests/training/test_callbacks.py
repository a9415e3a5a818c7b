"""Averaged weights, growing images, schedules: each does what its formula says."""

import copy

import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner

from cxr_fastai.core.run import Run
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import make_dls
from cxr_fastai.data.transforms import AugmentImages
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.callbacks import AverageWeights, recipe_callbacks
from cxr_fastai.training.learner import make_learner
from cxr_fastai.training.training import fit


def fitted(images, tmp_path, *cbs: Callback, **fields) -> tuple[Learner, Run]:
    recipe = make_recipe('baseline', **{'epochs': 2, 'size': 64, 'batch_size': 4, 'limit': 8, 'seed': 5} | fields)
    torch.manual_seed(5)
    learn = make_learner(make_dls(read_items(images, limit=8), images, recipe), recipe)
    run = Run.create(tmp_path / 'run')
    fit(learn, recipe, run, cbs=cbs)
    return learn, run


class Record(Callback):
    """The weights after each step, and those that validation sees."""

    order = 70

    def __init__(self):
        self.steps, self.validated, self.sides, self.rates = [], [], [], []

    def after_batch(self):
        if not self.training:
            return
        self.steps.append(copy.deepcopy(self.model.state_dict()))
        self.sides.append(self.xb[0].shape[-1])
        self.rates.append([group['lr'] for group in self.opt.hypers])

    def before_validate(self):
        self.validated.append(copy.deepcopy(self.model.state_dict()))


def test_validation_and_the_best_epoch_have_the_average_and_training_goes_on_with_its_own(images, tmp_path):
    record = Record()
    learn, _ = fitted(images, tmp_path, record, ema=0.8)
    name = '1.6.weight'
    torch.manual_seed(5)
    recipe = make_recipe('baseline', epochs=2, size=64, batch_size=4, limit=8, seed=5)
    mean = make_learner(make_dls(read_items(images, limit=8), images, recipe), recipe).model.state_dict()[name].clone()
    averages = []
    for step, weights in enumerate(record.steps, 1):
        decay = min(0.8, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weights[name]
        averages.append(mean)
    per_epoch = len(record.steps) // 2
    for epoch in range(2):
        assert torch.allclose(record.validated[epoch][name], averages[(epoch + 1) * per_epoch - 1], atol=1e-6)
    kept = learn.model.state_dict()[name]
    assert any(torch.allclose(kept, average, atol=1e-6) for average in averages[per_epoch - 1 :: per_epoch])
    assert not any(torch.equal(kept, weights[name]) for weights in record.steps)


def test_images_start_small_and_end_whole(images, tmp_path):
    record = Record()
    learn, _ = fitted(images, tmp_path, record, start_size=0.5, size=128)
    assert record.sides[0] == 64 and record.sides[-1] == 128 and record.sides == sorted(record.sides)
    assert learn.dls.valid.one_batch()[0].shape[-1] == 128


def test_one_cycle_goes_up_to_the_rate_and_down_again_for_each_group(images, tmp_path):
    record = Record()
    _, run = fitted(images, tmp_path, record, schedule='one-cycle', body_lr=0.1, lr=1e-3)
    body, head = zip(*record.rates, strict=True)
    top = head.index(max(head))
    assert 0 < top < len(head) - 1 and max(head) == pytest.approx(1e-3, rel=0.05) and head[-1] < 1e-4
    assert body == pytest.approx([rate / 10 for rate in head])
    assert run.history.lr.max() == pytest.approx(max(head))


def test_a_recipe_gets_the_callbacks_that_it_asks_for():
    assert recipe_callbacks(make_recipe('baseline')) == []
    asked = recipe_callbacks(make_recipe('baseline', mixup=0.2, clip=1, ema=0.9, start_size=0.5))
    assert [type(callback).__name__ for callback in asked] == ['MixUp', 'GradientClip', 'AverageWeights', 'GrowImages']


@pytest.fixture(scope='module')
def plain(images, tmp_path_factory) -> Run:
    return fitted(images, tmp_path_factory.mktemp('plain'))[1]


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
def test_every_choice_changes_what_is_learnt(plain, images, tmp_path, fields):
    changed = fitted(images, tmp_path, **fields)[1]
    assert plain.history.train_loss[1] != changed.history.train_loss[1]


def test_the_average_of_integers_is_the_newest():
    learn = Learner.__new__(Learner)
    learn.model, learn.training = torch.nn.BatchNorm1d(1), True
    average = AverageWeights(0.9)
    average.learn = learn
    average.before_fit()
    learn.model.num_batches_tracked += 7
    average.after_batch()
    assert average.mean['num_batches_tracked'] == 7


def test_images_are_whole_where_nothing_lets_them_grow(images):
    recipe = make_recipe('baseline', 'tuned', size=128, batch_size=4, limit=8)
    dls = make_dls(read_items(images, limit=8), images, recipe)
    assert [step.share for step in dls.train.after_batch.fs if isinstance(step, AugmentImages)] == [1]
