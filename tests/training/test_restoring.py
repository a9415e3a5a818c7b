"""`load_learner` restores the learners of users: their network and preprocessing, whatever else the file contains."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.transforms import Transform
from fastai.losses import FocalLossFlat
from fastai.metrics import F1Score, RocAucBinary, error_rate
from fastai.optimizer import Adam, ranger
from fastai.torch_core import TensorImageBW
from fastai.vision.augment import aug_transforms
from torch import nn
from torchvision.models import resnet18

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.models.architectures import add_arch
from cxr_fastai.training.learner import cxr_learner
from cxr_fastai.training.restoring import load_learner

SIZE = 48


def load(images: Path, **options: object) -> CXRDataLoaders:
    return CXRDataLoaders.from_folder(images, size=SIZE, bs=8, num_workers=0, valid_pct=0.3, **options)


@pytest.fixture(scope='module')
def dls(images) -> CXRDataLoaders:
    return load(images)


def same_predictions(learn, loaded, images) -> bool:
    """Return whether two learners predict the same for some images, one by one and in a batch."""
    paths = sorted((images / 'test').rglob('*.jpeg'))[:4]
    with learn.no_bar(), loaded.no_bar():
        expected = learn.get_preds(dl=learn.dls.test_dl(paths, num_workers=0))[0]
        p = loaded.get_preds(dl=loaded.dls.test_dl(paths, num_workers=0))[0]
        first = loaded.predict(paths[0])[2]
    return np.allclose(p, expected, atol=1e-5) and np.allclose(first, expected[0], atol=1e-5)


@pytest.mark.parametrize('opt_func', [Adam, ranger], ids=['adam', 'ranger'])
def test_metrics_losses_and_optimisers_of_fastai_are_no_obstacle(opt_func, dls, images, tmp_path):
    metrics = [error_rate, RocAucBinary(), F1Score()]
    learn = cxr_learner(dls, 'baseline', metrics=metrics, loss_func=FocalLossFlat(), opt_func=opt_func, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    assert same_predictions(learn, load_learner(learn.export('model.pkl')), images)


def test_augmentation_of_fastai_is_no_obstacle(images, tmp_path):
    learn = cxr_learner(load(images, batch_tfms=aug_transforms()), 'baseline', path=tmp_path)
    assert same_predictions(learn, load_learner(learn.export('model.pkl')), images)


@pytest.mark.parametrize('recipe, options', [('tuned', {}), ('reference', {'resize': 'pad', 'low_pass': 0.02})])
def test_the_preprocessing_is_restored(recipe, options, images, tmp_path):
    learn = cxr_learner(load(images, recipe=recipe, **options), 'baseline', path=tmp_path)
    assert same_predictions(learn, load_learner(learn.export('model.pkl')), images)


class Invert(Transform):
    """A transform of a user for every image."""

    def encodes(self, image: TensorImageBW) -> TensorImageBW:
        return 255 - image


def test_own_transforms_of_validation_images_are_not_lost_silently(images, tmp_path):
    learn = cxr_learner(load(images, item_tfms=Invert()), 'baseline', path=tmp_path)
    with pytest.raises(CXRError, match='its images pass Invert, which only the load_learner of fastai restores'):
        load_learner(learn.export('model.pkl'))


class RestoredNet(nn.Module):
    """A network of a user."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.stem(x)).flatten(1))


def test_an_own_network_is_restored_once_its_name_is_registered(dls, images, tmp_path):
    learn = cxr_learner(dls, RestoredNet, path=tmp_path)
    exported = learn.export('model.pkl')
    with pytest.raises(UsageError, match=re.escape("add_arch('RestoredNet', ...)")):
        load_learner(exported)
    add_arch('RestoredNet', RestoredNet)
    assert same_predictions(learn, load_learner(exported), images)


@pytest.mark.parametrize(
    'arch', [resnet18, 'vision_learner.resnet18', 'resnet10t'], ids=['torchvision', 'fastai', 'timm']
)
def test_networks_of_libraries_are_restored(arch, dls, images, tmp_path):
    learn = cxr_learner(dls, arch, pretrained=False, path=tmp_path)
    loaded = load_learner(learn.export('model.pkl'))
    assert loaded.arch == learn.arch
    assert same_predictions(learn, loaded, images)


def test_a_restored_learner_is_exported_again_with_its_settings(dls, tmp_path):
    learn = cxr_learner(dls, 'baseline', path=tmp_path)
    loaded = load_learner(learn.export('model.pkl'))
    loaded.config['threshold'] = 0.25
    again = load_learner(loaded.export(tmp_path / 'again.pkl'))
    assert again.config['threshold'] == 0.25
    assert again.config['size'] == SIZE
