"""Everything that a fastai user calls on a Learner works on that of `cxr_learner`, with real calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.transforms import Normalize
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat
from fastai.metrics import RocAucBinary, error_rate
from fastai.optimizer import Adam
from fastai.vision.augment import Resize, aug_transforms
from PIL import Image
from torch import nn
from torchvision.models import resnet18

from cxr_fastai.core.errors import CXRError, CXRWarning, UsageError
from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import CXRDataLoaders, cxr_block, find_preprocessing
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.callbacks import ReduceOnPlateau
from cxr_fastai.training.learner import cxr_learner
from cxr_fastai.training.restoring import load_learner as own_load_learner

matplotlib.use('Agg')
COURSE = Path(__file__).parents[2] / 'docs/course.py'
SMALL = {'size': 32, 'bs': 8, 'num_workers': 0}


@pytest.fixture(scope='module')
def dls(images) -> CXRDataLoaders:
    return CXRDataLoaders.from_folder(images, limit=8, **SMALL)


@pytest.fixture
def learn(dls, tmp_path):
    learn = cxr_learner(dls, 'baseline', path=tmp_path, model_dir=tmp_path / 'models')
    with learn.no_bar(), learn.no_logging():
        yield learn


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_parameters()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> int:
    """The number of parameters that differ from `before`."""
    return sum(int((value != before[name]).sum()) for name, value in model.named_parameters())


# The DataLoaders.


def test_validation_images_are_of_other_patients_in_the_proportion_asked_for(images):
    dls = CXRDataLoaders.from_folder(images, valid_pct=0.25, seed=3, **SMALL)
    table = dls.item_table
    used = table[table.split != 'test']
    assert not set(used[used.split == 'train'].patient) & set(used[used.split == 'valid'].patient)
    assert (used.split == 'valid').mean() == pytest.approx(0.25, abs=0.1)
    assert set(table.split) == {'train', 'valid', 'test'}
    again = CXRDataLoaders.from_folder(images, valid_pct=0.25, seed=3, **SMALL)
    assert again.item_table.equals(table)
    assert dls.path == Path('.') and dls.root == dls.source == images


def test_the_official_folder_can_be_used_for_validation(images):
    dls = CXRDataLoaders.from_folder(images, valid='official', **SMALL)
    assert all('/val/' in path for path in dls.valid.items.path)


def test_a_csv_file_and_a_data_frame_give_the_batches_of_the_folder(images, tmp_path, dls):
    items = read_items(images, 'patients', limit=8)
    listing = items.assign(path=[str(images / path) for path in items.path])
    listing.to_csv(tmp_path / 'labels.csv', index=False)
    from_csv = CXRDataLoaders.from_csv(tmp_path, 'labels.csv', valid='official', **SMALL)
    frame = listing[listing.split != 'test'].rename(columns={'path': 'file', 'label': 'y'})
    frame = frame.assign(is_valid=frame.split == 'valid').drop(columns='split')
    from_df = CXRDataLoaders.from_df(frame, fn_col='file', label_col='y', valid_col='is_valid', **SMALL)
    expected, labels = dls.valid.one_batch()
    for other in (from_csv, from_df):
        batch, other_labels = other.valid.one_batch()
        assert torch.equal(batch, expected) and torch.equal(other_labels, labels)
    assert from_csv.source == tmp_path / 'labels.csv' and from_df.source is None


def test_a_data_frame_without_labels_or_files_is_refused(images):
    with pytest.raises(UsageError, match='has no column label, but path, class'):
        CXRDataLoaders.from_df(pd.DataFrame({'path': ['a.png'], 'class': ['NORMAL']}))
    with pytest.raises(UsageError, match='no such file in row 0'):
        CXRDataLoaders.from_df(pd.DataFrame({'path': ['a.png'], 'label': ['NORMAL']}), images)


def test_transforms_of_the_user_replace_the_augmentation(images):
    dls = CXRDataLoaders.from_folder(images, batch_tfms=aug_transforms(max_warp=0), limit=4, **SMALL)
    names = [type(transform).__name__ for transform in dls.after_batch.fs]
    assert 'AugmentImages' not in names and 'Flip' in ' '.join(names)
    assert dls.one_batch()[0].shape[1:] == (3, 32, 32)


@pytest.mark.parametrize(
    ('transforms', 'message'),
    [
        ({'item_tfms': Resize(64)}, 'item_tfms Resize: images are resized when they are opened. Pass size=224'),
        ({'batch_tfms': [Normalize()]}, 'batch_tfms Normalize: images are normalised already'),
    ],
)
def test_transforms_that_would_be_ignored_or_applied_twice_are_refused(images, transforms, message):
    with pytest.raises(UsageError, match=message):
        CXRDataLoaders.from_folder(images, **transforms)


def test_fields_of_a_recipe_and_arguments_of_the_loaders_are_passed_on(images):
    dls = CXRDataLoaders.from_folder(images, recipe='tuned', low_pass=0.02, val_bs=3, limit=4, **SMALL)
    assert find_preprocessing(dls) == Preprocessing(32, 'squish', 0.02)
    assert dls.valid.bs == 3 and dls.recipe.crop == 0.25
    with pytest.raises(UsageError, match='recipe best is unknown: choose reference or tuned'):
        CXRDataLoaders.from_folder(images, recipe='best')


@pytest.mark.parametrize('name', ['valid_pc', 'vocab', 'train', 'mixup', 'batch_size'])
def test_an_argument_that_nothing_would_use_is_refused(images, name):
    with pytest.raises(UsageError, match=f'{name}: not a'):
        CXRDataLoaders.from_folder(images, **{name: 'x'})


def test_the_data_block_reads_a_folder_and_describes_itself(images, capsys):
    block = cxr_block('tuned', valid='official')
    dls = block.dataloaders(images, bs=4, num_workers=0)
    assert list(dls.vocab) == list(VOCAB) and len(dls.valid_ds) == 12  # the folder `val`
    by_patient = cxr_block(size=32).dataloaders(images, bs=4, num_workers=0)
    assert by_patient.one_batch()[0].shape == (4, 3, 32, 32) and len(by_patient.valid_ds) < 12
    block.summary(images, bs=4, num_workers=0)
    assert 'Setting-up type transforms pipelines' in capsys.readouterr().out


def test_new_loaders_and_loaders_of_any_image_see_the_same_images(dls, images):
    path = Path(dls.valid.items.path.iloc[0])
    expected = dls.valid.one_batch()[0][0]
    assert torch.equal(dls.valid.new(bs=2).one_batch()[0][0], expected)
    picture = Image.open(path)
    for image in (path, str(path), picture, np.asarray(picture.convert('L'))):
        assert torch.equal(dls.test_dl([image], num_workers=0).one_batch()[0][0], expected)
    learn = cxr_learner(dls, 'baseline')
    with learn.no_bar():
        scores = [learn.predict(image)[2] for image in (path, picture, np.asarray(picture.convert('L')))]
        learn.show_results(max_n=2)
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_a_wrong_array_is_refused_in_one_line(learn, dls):
    pixels = np.asarray(Image.open(dls.valid.items.path.iloc[0]).convert('L'))
    for wrong in (pixels / 255, pixels.astype(np.uint16) * 257, pixels[None, None]):
        with pytest.raises(CXRError) as raised:
            learn.predict(wrong)
        assert '\n' not in str(raised.value) and str(wrong.dtype) in str(raised.value)


# Training.


def test_fine_tune_trains_the_head_with_frozen_statistics_and_then_everything(images):
    dls = CXRDataLoaders.from_folder(images, limit=4, **SMALL)
    learn = cxr_learner(dls, 'resnet50', pretrained='none')
    before = weights_of(learn.model)
    statistics = learn.model[0].bn1.running_mean.clone()
    with learn.no_bar(), learn.no_logging():
        learn.freeze()
        learn.fit_one_cycle(1, 2e-3)
        assert changed(before, learn.model) == 4098
        assert torch.equal(learn.model[0].bn1.running_mean, statistics)
        learn.fine_tune(1)
    assert [row['phase'] for row in learn.history.rows] == ['frozen', 'frozen', 'unfrozen']
    unchanged = [name for name, value in learn.model.named_parameters() if torch.equal(value, before[name])]
    assert unchanged == []
    assert not torch.equal(learn.model[0].bn1.running_mean, statistics)


def test_a_pretrained_body_is_frozen_as_by_vision_learner(dls, tmp_path):
    torch.save(cxr_learner(dls, 'baseline').model.state_dict(), tmp_path / 'weights.pth')
    learn = cxr_learner(dls, 'baseline', pretrained=str(tmp_path / 'weights.pth'))
    assert not any(parameter.requires_grad for parameter in learn.model[0].parameters())
    assert all(parameter.requires_grad for parameter in learn.model[1].parameters())


def test_lr_find_suggests_a_rate_and_leaves_the_network_and_the_history_alone(learn):
    before = weights_of(learn.model)
    suggestion = learn.lr_find(num_it=20, show_plot=False)
    assert 1e-7 < suggestion.valley < 10
    assert changed(before, learn.model) == 0 and learn.history.rows == []


def test_freeze_to_trains_only_the_last_groups(learn):
    before = weights_of(learn.model[0])
    learn.freeze_to(-1)
    learn.fit(1, 1e-3)
    assert changed(before, learn.model[0]) == 0


def test_tta_averages_augmented_views(learn):
    torch.manual_seed(0)
    plain, targs = learn.get_preds()
    views, tta_targs = learn.tta(n=2)
    assert torch.equal(targs, tta_targs) and not torch.equal(views, plain)
    assert torch.allclose(learn.tta(n=1, beta=1)[0], plain)


@pytest.mark.parametrize('precision', ['to_fp16', 'to_bf16'])
def test_mixed_precision_trains_and_validates_in_32_bits(learn, precision):
    getattr(learn, precision)()
    learn.fit(1, 1e-3)
    halves = learn.get_preds()[0]
    learn.to_fp32()
    assert torch.equal(learn.get_preds()[0], halves)
    assert not hasattr(learn, 'precision')


def test_validate_and_get_preds_agree_and_add_no_epoch(learn):
    loss, accuracy, *_ = learn.validate()
    preds, targs = learn.get_preds()
    assert accuracy == pytest.approx((preds.argmax(1) == targs).float().mean().item())
    assert loss == pytest.approx(nn.functional.nll_loss(preds.log(), targs).item(), abs=1e-5)
    assert learn.history.rows == []


def test_weights_can_be_saved_and_loaded_with_the_optimiser(learn):
    learn.fit(1, 1e-3)
    learn.save('before')
    before, rates = weights_of(learn.model), learn.opt.hypers[0]['lr']
    learn.fit(1, 1e-2)
    learn.load('before')
    assert changed(before, learn.model) == 0
    assert learn.opt.hypers[0]['lr'] == rates


def test_callbacks_of_fastai_work(learn, tmp_path):
    callbacks = [
        EarlyStoppingCallback('valid_loss', min_delta=10, patience=1),
        SaveModelCallback('roc_auc', fname='best'),
        CSVLogger(tmp_path / 'log.csv'),
    ]
    learn.fit(5, 1e-3, cbs=callbacks)
    assert len(learn.history.rows) == 2  # no epoch improved the loss by 10
    assert (tmp_path / 'models/best.pth').exists()
    log = pd.read_csv(tmp_path / 'log.csv')
    assert log.valid_loss.tolist() == pytest.approx([row['valid_loss'] for row in learn.history.rows], abs=1e-6)
    learn.add_cb(MixUp(0.4))
    learn.fit(1, 1e-3)
    assert len(learn.history.rows) == 3


def test_gradient_accumulation_takes_one_step_for_several_batches(dls):
    torch.manual_seed(0)
    learn = cxr_learner(dls, 'baseline', cbs=GradientAccumulation(len(dls.train_ds) + 1))
    before = weights_of(learn.model)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    assert changed(before, learn.model) == 0  # the epoch ends before the step


def test_reduce_lr_on_plateau_of_fastai_reduces_the_rate_of_the_optimiser(learn):
    learn.fit(3, 1e-3, cbs=ReduceLROnPlateau('valid_loss', min_delta=10, patience=1, factor=10))
    rates = [row['lr'] for row in learn.history.rows]
    assert rates[0] == 1e-3 and rates[2] == pytest.approx(1e-4)
    assert learn.opt.opt.param_groups[0]['lr'] <= 1e-4


@pytest.mark.parametrize('own_loss', [FocalLossFlat(), CrossEntropyLossFlat(weight=torch.tensor([2.0, 1.0]))])
def test_metrics_and_loss_of_the_user_are_used(dls, own_loss):
    learn = cxr_learner(dls, 'baseline', metrics=[error_rate, RocAucBinary()], loss_func=own_loss)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        learn.fit_recipe('reference', epochs=1)
    assert learn.loss_func is own_loss
    assert learn.recipe is None  # it was not trained as the recipe says
    row = learn.history.rows[0]
    assert np.isnan(row['accuracy']) and row['roc_auc'] >= 0 and row['valid_loss'] > 0


def test_networks_of_torchvision_and_of_the_user_are_cut_and_trained(dls):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(self.pool(self.conv(x)).flatten(1))

    for arch in (resnet18, Mine()):
        learn = cxr_learner(dls, arch, pretrained=isinstance(arch, nn.Module))
        with learn.no_bar(), learn.no_logging():
            learn.fine_tune(1)
        assert learn.get_preds()[0].shape == (len(dls.valid_ds), 2)


# Recipes.


def test_fit_recipe_runs_the_phases_and_keeps_the_best_epoch(images):
    dls = CXRDataLoaders.from_folder(images, recipe='tuned', limit=8, **SMALL)
    learn = cxr_learner(dls, 'baseline')
    with learn.no_bar(), learn.no_logging():
        best = learn.fit_recipe('tuned', epochs=2)
        loss, *_ = learn.validate()
    assert [row['phase'] for row in learn.history.rows] == ['train', 'train']
    assert best in learn.history.rows and loss == pytest.approx(best['valid_loss'], rel=1e-5)
    assert learn.recipe.ema == 0.99 and learn.recipe.size == 32 and learn.recipe.epochs == 2


def test_a_recipe_whose_augmentation_the_loaders_do_not_have_warns(learn):
    with pytest.warns(CXRWarning, match=r"not prepared as the recipe tuned says .*Make the .* recipe='tuned'"):
        learn.fit_recipe('tuned', epochs=1)


def test_epochs_of_a_recipe_object_cannot_be_changed(learn):
    with pytest.raises(UsageError, match='^epochs: a Recipe has its own. Pass the name of a recipe'):
        learn.fit_recipe(learn.dls.recipe, epochs=3)
    with pytest.raises(UsageError, match='^lr, patience: a Recipe has its own'):
        learn.fit_recipe(learn.dls.recipe, lr=1e-3, patience=3)


def test_fit_recipe_takes_the_settings_of_the_command(learn):
    learn.fit_recipe('reference', epochs=3, patience=2, optimizer='adamw', ema=0.9, clip=1.0)
    recipe = learn.recipe
    assert (recipe.epochs, recipe.patience, recipe.optimizer, recipe.ema, recipe.clip) == (3, 2, 'adamw', 0.9, 1.0)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'patients': 2}, r'patients: not an argument of fit_recipe .did you mean patience.*It takes epochs, lr, cbs'),
        ({'size': 64}, 'size: about the images, which are those of the loaders. Pass size to CXRDataLoaders'),
        ({'batch_size': 4}, 'batch_size: about the images, .* Pass bs to CXRDataLoaders'),
        ({'workers': 2}, 'workers: about the images, .* Pass num_workers to CXRDataLoaders'),
        ({'freeze_epochs': 1}, '--freeze-epochs 1: this training has no frozen phase'),
    ],
)
def test_an_argument_that_fit_recipe_does_not_take_is_refused_with_what_helps(learn, fields, message):
    with pytest.raises(UsageError, match=message):
        learn.fit_recipe('reference', epochs=1, **fields)


def test_loaders_of_other_classes_and_sizes_are_refused(dls, images):
    other = dls.new_empty()
    other.vocab = ['cat', 'dog']
    with pytest.raises(UsageError, match='classes of the DataLoaders are cat, dog, but NORMAL, PNEUMONIA'):
        cxr_learner(other, 'baseline')
    with pytest.raises(UsageError, match=r'size 32: vit_tiny_patch16_224 accepts only 224 pixels'):
        cxr_learner(dls, 'vit_tiny_patch16_224', pretrained=False)


@pytest.mark.parametrize('field', ['arch', 'size'])
def test_a_recipe_of_another_network_or_of_other_images_is_refused(learn, field):
    recipe = make_recipe('baseline', epochs=1)
    recipe = replace(recipe, arch='resnet50') if field == 'arch' else recipe
    with pytest.raises(UsageError, match=f'the recipe is not that of this learner .*{field}'):
        learn.fit_recipe(recipe)


def test_a_recipe_keeps_the_optimiser_and_the_weight_decay_of_the_user(dls):
    learn = cxr_learner(dls, 'baseline', opt_func=Adam, wd=0.3)
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe('reference', epochs=2)
    assert learn.opt.hypers[0]['wd'] == 0.3 and not hasattr(learn.opt, 'opt')
    assert learn.recipe is None


class Rising(Callback):
    """Make the validation loss of the history rise."""

    order = 56

    def after_epoch(self):
        self.history.rows[-1]['valid_loss'] = float(self.epoch)


def test_the_plateau_of_a_recipe_reduces_the_rate_of_an_optimiser_of_fastai(dls):
    learn = cxr_learner(dls, 'baseline', opt_func=Adam)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 1e-3, cbs=[Rising(), ReduceOnPlateau(0.1, 0)])
    assert learn.history.rows[2]['lr'] == pytest.approx(1e-4)


def test_a_learner_from_a_file_trains_by_a_recipe(learn, dls):
    loaded = own_load_learner(learn.export('model.pkl'))
    loaded.dls = dls
    with loaded.no_bar(), loaded.no_logging():
        loaded.fit_recipe('reference', epochs=1)
    assert len(loaded.history.rows) == 1


def test_precision_is_set_once(learn):
    learn.to_fp16().to_bf16().to_bf16()
    assert len(learn.cbs.filter(lambda callback: isinstance(callback, MixedPrecision))) == 1


# Exported learners.


@pytest.mark.filterwarnings('ignore:load_learner')  # fastai warns that pickles can run code
def test_stock_load_learner_predicts_as_the_learner_that_was_exported(learn, dls):
    learn.fit(1, 1e-3, cbs=CSVLogger(learn.path / 'log.csv'))
    learn.add_cb(GradientAccumulation(4))
    path = learn.export('model.pkl')
    assert hasattr(learn, 'gradient_accumulation')  # the learner keeps its callbacks
    loaded = load_learner(path)
    image = dls.valid.items.path.iloc[0]
    pixels = np.asarray(Image.open(image).convert('L'))
    with loaded.no_bar():
        for item in (image, Path(image), Image.open(image), pixels):
            label, index, p = loaded.predict(item)
            assert label == VOCAB[int(index)]
            assert torch.allclose(p, learn.predict(image)[2], atol=1e-6)
        preds, _ = loaded.get_preds(dl=loaded.dls.test_dl([image, image], num_workers=0))
        with pytest.raises(CXRError, match='float64'):
            loaded.predict(pixels / 255)
    assert preds.shape == (2, 2)
    assert str(learn.path) not in path.read_bytes().decode('latin-1')
    assert loaded.export(learn.path / 'again.pkl').exists()


# The course.


def run_course(images: Path, folder: Path, size: int, epochs: int) -> str:
    """Run the script on `images`, with the new folder `out/course` below `folder`, and return its output."""
    command = [sys.executable, '-W', 'ignore', COURSE, images, 'out/course', size, epochs]
    environment = os.environ | {'MPLBACKEND': 'agg'}
    process = subprocess.run(
        [str(word) for word in command], cwd=folder, capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


def test_the_script_of_the_documentation_has_forty_lines_and_runs(images, tmp_path):
    code = COURSE.read_text(encoding='utf-8').partition('"""\n\n')[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    output = run_course(images, tmp_path, size=32, epochs=1)
    assert 'precision' in output and 'PNEUMONIA' in output
    assert (tmp_path / 'out/course/history.csv').exists()
    written = {file.name for file in (tmp_path / 'out/course/run').iterdir()}
    assert {'predictions.csv', 'metrics.json', 'report.html', 'bundle', 'history.csv'} <= written


@pytest.mark.slow
@pytest.mark.real
def test_the_script_runs_on_real_images(real_images, tmp_path):
    for label in VOCAB:
        folder = tmp_path / 'images' / label
        folder.mkdir(parents=True)
        for path in sorted((real_images / 'train' / label).iterdir())[:120]:
            shutil.copy(path, folder)
    run_course(tmp_path / 'images', tmp_path, size=64, epochs=1)
    assert (tmp_path / 'out/course/run/report.html').exists()
