"""`save_run`: a learner that was trained by hand becomes a run, on which every other step works."""

from __future__ import annotations

import numpy as np
import pytest
from fastai.callback.mixup import MixUp
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageDataLoaders
from fastai.vision.learner import vision_learner
from torch import nn
from torchvision.models import resnet18

from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import CXRDataLoaders, cxr_block
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.models.architectures import build_model
from cxr_fastai.publishing.exporting import export
from cxr_fastai.publishing.model_card import describe_run, reproduce
from cxr_fastai.publishing.reporting import report
from cxr_fastai.training.callbacks import COLUMNS
from cxr_fastai.training.learner import cxr_learner
from cxr_fastai.training.restoring import load_learner
from cxr_fastai.training.saving import save_run

SMALL = {'size': 32, 'bs': 8, 'num_workers': 0}


@pytest.fixture(scope='module')
def dls(images) -> CXRDataLoaders:
    return CXRDataLoaders.from_folder(images, limit=10, **SMALL)


@pytest.fixture
def learn(dls):
    set_seed(0)
    learn = cxr_learner(dls, 'baseline')
    with learn.no_bar(), learn.no_logging():
        yield learn


def scores(learn: Learner) -> np.ndarray:
    """The probabilities of pneumonia of the validation images, in the order of the loaders."""
    return learn.get_preds()[0][:, 1].numpy()


def scores_of_run(run: Run) -> np.ndarray:
    evaluate(run, split='valid')
    return run.predicted('valid').p_pneumonia.to_numpy()


def test_every_step_works_on_a_learner_that_was_trained_by_hand(learn, tmp_path):
    learn.fine_tune(1)
    run = save_run(learn, tmp_path / 'run')
    assert evaluate(run)['n'] == sum(read_items(run.images).split == 'test')
    assert scores_of_run(run) == pytest.approx(scores(learn), abs=1e-6)
    assert report(run).exists() and (export(run) / 'learner.pkl').exists()
    history = run.history
    assert list(history.columns) == COLUMNS and history.phase.tolist() == ['frozen', 'unfrozen']
    recipe = run.recipe
    assert (recipe.name, recipe.arch, recipe.size, recipe.limit) == ('custom', 'baseline', 32, 10)
    phases = [(phase.name, phase.epochs, phase.frozen) for phase in recipe.phases]
    assert phases == [('frozen', 1, True), ('unfrozen', 1, False)]


def test_what_is_not_known_is_written_as_unknown(learn, tmp_path):
    learn.fit(1, 1e-3)
    run = save_run(learn, tmp_path / 'run')
    facts = describe_run(run)
    assert 'trained by hand: 1 epoch of unfrozen at learning rate 0.001; optimizer Adam' in facts['Recipe']
    assert 'schedule not recorded' in facts['Recipe'] and facts['Seed'] == 'not recorded'
    assert facts['Final model'] == 'the network as it was saved'
    evaluate(run)
    assert reproduce(run, 'test').startswith('# trained in Python')


def test_a_learner_that_a_recipe_trained_keeps_the_recipe(learn, tmp_path):
    learn.fit_recipe('reference', epochs=2)
    run = save_run(learn, tmp_path / 'run')
    assert run.recipe == learn.recipe and run.recipe.name == 'reference'
    assert 'reference: 2 epochs of train' in describe_run(run)['Recipe']
    learn.fit(1, 1e-4)
    assert save_run(learn, tmp_path / 'longer').recipe.name == 'custom'


@pytest.mark.parametrize('change', ['callback', 'callback of the learner', 'transform'])
def test_a_recipe_that_was_not_followed_alone_is_not_claimed(images, tmp_path, change):
    transforms = aug_transforms() if change == 'transform' else None
    dls = CXRDataLoaders.from_folder(images, limit=4, batch_tfms=transforms, **SMALL)
    learn = cxr_learner(dls, 'baseline', cbs=MixUp() if change == 'callback of the learner' else None)
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe('reference', epochs=1, cbs=MixUp() if change == 'callback' else None)
        assert save_run(learn, tmp_path / 'run').recipe.name == 'custom'


def test_what_happened_to_the_network_after_the_recipe_is_not_hidden(learn, images, tmp_path):
    learn.fit_recipe('reference', epochs=2)
    run = save_run(learn, tmp_path / 'run')
    assert run.last_event('end')['best']['epoch'] == learn.best_row['epoch']
    assert describe_run(run)['Seed'] == 'not recorded'  # fit_recipe sets none
    learn.save(tmp_path / 'weights')
    learn.load(tmp_path / 'weights')
    assert save_run(learn, tmp_path / 'loaded').recipe.name == 'custom'
    learn.fit_recipe('reference', epochs=1)
    learn.dls = CXRDataLoaders.from_folder(images, limit=6, **SMALL)
    assert save_run(learn, tmp_path / 'other_images').recipe.name == 'custom'


def test_a_run_knows_the_test_images_of_a_data_frame(images, tmp_path):
    items = read_items(images, limit=3)
    dls = CXRDataLoaders.from_df(items, images, valid='official', **SMALL)
    learn = cxr_learner(dls, 'baseline')
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        run = save_run(learn, tmp_path / 'run')
    evaluate(run)
    assert set(run.predicted('test').path) == set(items.path[items.split == 'test'])  # and not all of the folder


def test_loaders_of_the_data_block_and_a_plain_learner_are_enough(images, tmp_path):
    dls = cxr_block().dataloaders(images, bs=8, num_workers=0)
    learn = Learner(dls, build_model('baseline'), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        with pytest.raises(UsageError, match='the name of the network, a BaselineCNN, is not known. Pass arch="NAME"'):
            save_run(learn, tmp_path / 'run')
        run = save_run(learn, tmp_path / 'run', arch='baseline')
        expected = scores(learn)
    row = run.history.iloc[0]
    assert row.phase == 'unknown' and row.accuracy >= 0 and np.isnan(row.roc_auc)
    assert sorted(scores_of_run(run)) == pytest.approx(sorted(expected), abs=1e-6)


def stock_learner(images, **options) -> Learner:
    """A learner of fastai alone, with 64 px images that are squeezed to a square."""
    dls = ImageDataLoaders.from_folder(
        images, 'train', 'val', item_tfms=Resize(64, method='squish'), bs=8, num_workers=0, **options
    )
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    return learn


def test_a_learner_of_fastai_alone_becomes_a_run(images, tmp_path):
    learn = stock_learner(images, batch_tfms=Normalize.from_stats(*imagenet_stats))
    with learn.no_bar(), pytest.warns(CXRWarning, match=r'the run has no learner.pkl: the images of this .* are not'):
        run = save_run(learn, tmp_path / 'run')
    assert run.recipe.arch == 'vision_learner.resnet18' and run.recipe.valid == 'unknown'
    with learn.no_bar():
        expected = scores(learn)
    assert sorted(scores_of_run(run)) == pytest.approx(sorted(expected), abs=0.005)
    train, valid = ((run.items.split == split).sum() for split in ('train', 'valid'))
    with pytest.raises(UsageError, match=rf'split test has no images \(found train {train}, valid {valid}, test 0\)'):
        evaluate(run)
    assert evaluate(run, data=images)['n'] == len(list((images / 'test').rglob('*.jpeg')))
    page = report(run).read_text(encoding='utf-8')
    assert 'not recorded' in page and 'The network was saved by hand' in page and 'AUC is kept' not in page
    assert Predictor.load(export(run)).config.arch == 'vision_learner.resnet18'


def test_a_learner_whose_images_are_prepared_in_another_way_is_refused(images, tmp_path):
    learn = stock_learner(images)  # without normalisation
    with learn.no_bar(), pytest.warns(CXRWarning), pytest.raises(UsageError, match=r'would differ .* by up to 0\.'):
        save_run(learn, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_network_without_a_known_name_is_refused_before_anything_is_written(dls, tmp_path):
    class Unregistered(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 4, 3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))

    learn = cxr_learner(dls, Unregistered())
    with pytest.raises(UsageError, match='Unregistered'):
        save_run(learn, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_folder_that_is_in_use_is_not_changed(learn, tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(UsageError, match='exists already and nothing in it was overwritten'):
        save_run(learn, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ['notes.txt']


def test_a_learner_from_a_file_has_no_images_to_save(learn, tmp_path):
    loaded = load_learner(learn.export(tmp_path / 'model.pkl'))
    with pytest.raises(UsageError, match='the learner has no images, because it was loaded from a file'):
        save_run(loaded, tmp_path / 'run')
