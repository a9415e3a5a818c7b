"""What would end a training late, or make its result useless, is found before its first batch."""

import shutil
from pathlib import Path

import pytest
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRError, CXRWarning, OutputError, UsageError
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.learner import cxr_learner
from cxr_fastai.training.restoring import load_learner
from cxr_fastai.training.training import train

SETTINGS = {'epochs': 1, 'size': 48, 'batch_size': 4, 'limit': 4, 'workers': 0, 'valid': 'official'}
OPTIONS = ['--epochs', '1', '--size', '48', '--batch-size', '4', '--limit', '4', '--workers', '0']


def loaders(images: Path, **options) -> CXRDataLoaders:
    return CXRDataLoaders.from_folder(images, 'official', size=48, limit=4, num_workers=0, device='cpu', **options)


@pytest.mark.parametrize('fit', ['fine_tune', 'fit_one_cycle', 'fit_recipe'])
def test_fewer_images_than_a_batch_are_refused_where_incomplete_batches_are_dropped(images, fit):
    learn = cxr_learner(loaders(images, bs=9, drop_last=True), 'baseline')
    arguments = ('reference', 1) if fit == 'fit_recipe' else (1,)
    with pytest.raises(UsageError, match=r'there are 8 training images, fewer than a batch of 9, .* at most 8'):
        getattr(learn, fit)(*arguments)


def test_loaders_of_fastai_that_drop_every_batch_are_refused(images):
    dls = ImageDataLoaders.from_folder(images / 'train', valid_pct=0.2, seed=1, item_tfms=Resize(48), bs=64)
    learn = cxr_learner(dls, 'baseline')
    with pytest.raises(UsageError, match='images, fewer than a batch of 64'):
        learn.fine_tune(1)


def test_fewer_images_than_a_batch_are_one_batch(images):
    learn = cxr_learner(loaders(images, bs=64), 'baseline')
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert len(learn.history.rows) == 1


def test_a_learner_from_a_file_is_not_fitted_without_images(run):
    learn = load_learner(run / 'learner.pkl')
    with pytest.raises(UsageError, match='no training images. Give it DataLoaders'):
        learn.fit(1)


def without(folder: Path, images: Path, *missing: str) -> Path:
    """Copy `images` to `folder` without the images in the folders `missing`."""
    shutil.copytree(images, folder)
    for name in missing:
        shutil.rmtree(folder / name)
    return folder


def test_training_images_of_a_single_class_are_refused(images, tmp_path):
    items = read_items(images)
    normal = items[items.label == 'NORMAL']
    dls = CXRDataLoaders.from_items(normal, images, make_recipe('baseline', **SETTINGS), device='cpu')
    with pytest.raises(UsageError, match=r'all training images \(.*\) are NORMAL, so nothing can be learned'):
        cxr_learner(dls, 'baseline')
    folder = without(tmp_path / 'images', images, 'train/PNEUMONIA')
    with pytest.raises(UsageError, match=r'at least two images of each class. Add images of that class'):
        train(make_recipe('baseline', **SETTINGS), folder, tmp_path / 'run')


def test_validation_images_of_a_single_class_are_warned_of_before_training(images, tmp_path):
    folder = without(tmp_path / 'images', images, 'val/PNEUMONIA')
    with pytest.warns(CXRWarning, match=r'4 NORMAL and 0 PNEUMONIA images, so its AUC is undefined'):
        loaders(folder)
    with pytest.warns(CXRWarning, match=r'evaluate` needs --threshold fixed:T') as caught:
        train(make_recipe('baseline', **SETTINGS), folder, tmp_path / 'run')
    assert len(caught) == 1


def test_validation_images_of_a_single_class_in_loaders_of_fastai_are_warned_of(images):
    dls = ImageDataLoaders.from_name_func(
        images,
        sorted(images.glob('train/*/*.jpeg')),
        lambda path: 'NORMAL' if path.startswith('IM') or 'NORMAL' in path else 'PNEUMONIA',
        valid_pct=0.2,
        item_tfms=Resize(48),
        bs=4,
    )
    valid = dls.valid_ds
    valid.items = type(valid.items)(path for path in valid.items if path.parent.name == 'NORMAL')
    with pytest.warns(CXRWarning, match=r'all validation images \(.*\) are NORMAL'):
        cxr_learner(dls, 'baseline')


@pytest.mark.parametrize('place', ['file/run', 'file/new/run'])
def test_a_run_that_cannot_be_written_is_refused_before_images_are_read(images, tmp_path, place, capsys):
    (tmp_path / 'file').touch()
    code = main(['train', '--data', str(images), '--out', str(tmp_path / place), *OPTIONS])
    output = capsys.readouterr()
    assert code == 6 and output.out == ''
    assert f'{tmp_path / place}: cannot be written (Not a directory)' in output.err
    assert len(output.err.splitlines()) == 1


def test_a_full_disk_is_noticed_before_the_run_is_made(images, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=10**6))
    with pytest.raises(OutputError, match=r'run needs about 17 MB, but 1 MB are free on this disk'):
        train(make_recipe('baseline', **SETTINGS), images, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_trust_store_that_cannot_be_written_is_reported_before_training(images, tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('CXR_TRUST', str(tmp_path / 'file' / 'trust.json'))
    assert main(['train', '--data', str(images), '--out', str(tmp_path / 'run'), *OPTIONS]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith('warning: this program will not open the learner.pkl of this training')
    assert 'choose another place with CXR_TRUST' in first
    assert (tmp_path / 'run' / 'model.safetensors').is_file()


def test_a_damaged_trust_store_is_reported_before_training(images, tmp_path, monkeypatch):
    (tmp_path / 'trust.json').write_text('{')
    monkeypatch.setenv('CXR_TRUST', str(tmp_path / 'trust.json'))
    with pytest.warns(CXRWarning) as caught:
        train(make_recipe('baseline', **SETTINGS), images, tmp_path / 'run')
    assert 'trust.json' in str(caught[0].message)


def test_too_few_patients_for_a_split_by_patient_are_refused(images):
    with pytest.raises(CXRError, match='at least two patients of each class; found 1 NORMAL and 1 PNEUMONIA'):
        CXRDataLoaders.from_df(read_items(images, limit=1).query('split == "train"'), images, size=48)
