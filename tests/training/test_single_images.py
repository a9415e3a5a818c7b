"""A training batch of one image, which BatchNorm cannot normalise, does not end a training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from cxr_fastai.core.errors import CXRWarning
from cxr_fastai.core.recipe import Phase, Recipe
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.checkpoint import StopOnSignal
from cxr_fastai.training.learner import CXRLearner, cxr_learner
from cxr_fastai.training.lr_finder import find_rates
from cxr_fastai.training.training import train

ONE_IMAGE = 'a training batch has one image, from which BatchNorm cannot estimate statistics'
ARCH = 'vision_learner.resnet18'
"""Its head has BatchNorm behind a pooling layer."""


class Batches(Callback):
    """Record the number of images of each training batch, and the modes of its BatchNorm1d layers then."""

    def before_fit(self) -> None:
        self.image_counts: list[int] = []
        self.modes: list[list[bool]] = []

    def after_batch(self) -> None:
        if self.training:
            self.image_counts.append(len(self.xb[0]))
            norms = [layer for layer in self.learn.network.modules() if isinstance(layer, nn.BatchNorm1d)]
            self.modes.append([layer.training for layer in norms])


@pytest.fixture
def learner(images) -> Callable[..., CXRLearner]:
    """Makes a learner of 10 images for training with BatchNorm behind a pooling layer."""

    def make(batch_size: int) -> CXRLearner:
        dls = CXRDataLoaders.from_folder(
            images, 'official', limit=5, size=48, bs=batch_size, num_workers=0, device='cpu'
        )
        body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2))
        return cxr_learner(dls, nn.Sequential(body, head))

    return make


@pytest.mark.parametrize(('batch_size', 'batches'), [(9, [9, 1]), (3, [3, 3, 3, 1]), (1, [1] * 10)])
def test_every_image_is_used_once_also_in_a_batch_of_one(learner, batch_size, batches):
    learn = learner(batch_size)
    record = Batches()
    with learn.no_bar(), learn.no_logging(), pytest.warns(CXRWarning, match=ONE_IMAGE):
        learn.fit(1, cbs=record)
    assert record.image_counts == batches
    assert all(all(modes) for modes in record.modes)
    assert learn.history.rows[0]['train_loss'] > 0


def test_a_batch_of_one_image_changes_weights_but_no_statistics(learner):
    learn = learner(1)
    norm = learn.network[1][2]
    statistics, weight = norm.running_mean.clone(), norm.bias.clone()
    spatial = learn.network[0][1].running_mean.clone()
    with learn.no_bar(), learn.no_logging(), pytest.warns(CXRWarning, match=ONE_IMAGE):
        learn.fit(1)
    assert torch.equal(norm.running_mean, statistics) and not torch.equal(norm.bias, weight)
    assert not torch.equal(learn.network[0][1].running_mean, spatial)  # it sees many pixels of the one image


def test_without_a_batch_of_one_image_nothing_is_warned_of(learner):
    learn = learner(4)
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1)


def recipe(*phases: Phase) -> Recipe:
    options = {'size': 48, 'limit': 5, 'batch_size': 9, 'seed': 4, 'workers': 0, 'weights': 'none'}
    return replace(make_recipe(ARCH, **options), phases=phases)


TWO_PHASES = Phase('frozen', 1, 1e-3, True), Phase('fine-tune', 2, 1e-3)


@pytest.mark.filterwarnings('ignore:validation has only')
def test_a_training_with_a_last_batch_of_one_image_resumes_exactly(images, tmp_path, monkeypatch):
    with pytest.warns(CXRWarning, match=ONE_IMAGE):
        whole = train(recipe(*TWO_PHASES), images, tmp_path / 'whole')
    stop_in_epoch_two(monkeypatch)
    with pytest.raises(KeyError), pytest.warns(CXRWarning, match=ONE_IMAGE):
        train(recipe(*TWO_PHASES), images, tmp_path / 'parts')
    monkeypatch.undo()
    with pytest.warns(CXRWarning, match=ONE_IMAGE):
        parts = train(recipe(*TWO_PHASES), images, tmp_path / 'parts', resume=True)
    assert parts.history.train_loss.tolist() == whole.history.train_loss.tolist()
    assert model_bytes(parts.path) == model_bytes(whole.path)


def model_bytes(folder: Path) -> bytes:
    return (folder / 'model.safetensors').read_bytes()


def stop_in_epoch_two(monkeypatch) -> None:
    def fail(self) -> None:
        if len(self.history.rows) == 2:
            raise KeyError('stopped by the test')

    monkeypatch.setattr(StopOnSignal, 'before_validate', fail, raising=False)


def test_lr_find_is_not_ended_by_a_batch_of_one_image(images):
    with pytest.warns(CXRWarning, match=ONE_IMAGE):
        rates = find_rates(recipe(Phase('train', 1, 1e-3)), images, steps=20)
    assert 0 < rates.suggestion < 10
