"""The commands `train` and `lr-find`: where images come from, what is refused, and what is written."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import torchvision
from commandlines import small_training
from PIL import Image

from cxr_fastai.cli import main
from cxr_fastai.core.errors import ImageError
from cxr_fastai.core.run import Run
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.training import training
from cxr_fastai.training.restoring import load_learner


def test_images_are_found_by_the_variable_cxr_data(images, monkeypatch, tmp_path):
    monkeypatch.setenv('CXR_DATA', str(images))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'runs/baseline').mkdir(parents=True)
    assert main(['train', '--epochs', '1', '--size', '48', '--limit', '2', '--workers', '0']) == 0
    assert (tmp_path / 'runs/baseline-2/learner.pkl').is_file()


def test_a_missing_class_or_an_empty_split_is_a_usage_error(fails, images, tmp_path):
    one_class = tmp_path / 'one'
    no_valid = tmp_path / 'empty'
    shutil.copytree(images / 'train/NORMAL', one_class / 'train/NORMAL')
    shutil.copytree(images / 'train', no_valid / 'train')
    official = ['--valid', 'official']
    fails(['train', '--data', one_class], 2, 'two patients of each class; found .* NORMAL and 0 PNEUMONIA')
    fails(['train', '--data', one_class, *official], 2, 'train holds 14 NORMAL and 0 PNEUMONIA')
    fails(['train', '--data', no_valid, *official], 2, 'valid holds no image')


def test_images_without_a_validation_folder_are_validated_by_patients(images, tmp_path):
    folder = tmp_path / 'images'
    shutil.copytree(images / 'train', folder / 'train')
    assert main([*small_training(folder, tmp_path / 'run'), '--batch-size', '8']) == 0
    run = Run.open(tmp_path / 'run')
    assert run.recipe.valid == 'patients' and set(run.items.split) == {'train', 'valid'}


def test_images_without_patients_are_drawn_one_by_one_with_a_warning(images, tmp_path, capsys):
    listing = tmp_path / 'images.csv'
    folder = tmp_path / 'unnamed'
    rows = []
    for number, path in enumerate(sorted((images / 'train').rglob('*.jpeg'))):
        copy = folder / f'{number}.jpeg'
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
        rows.append((copy.relative_to(tmp_path).as_posix(), path.parent.name))
    pd.DataFrame(rows, columns=['path', 'label']).to_csv(listing, index=False)
    options = ['--epochs', '1', '--size', '48', '--workers', '0', '--out', str(tmp_path / 'run')]
    assert main(['train', '--csv', str(listing), *options]) == 0
    output = capsys.readouterr()
    assert 'the patient of all images is unknown. They are drawn one by one' in output.err
    assert 'validation: 10% of the images, whose patients are unknown, of train and val (' in output.out


@pytest.mark.parametrize(
    ('options', 'pattern'),
    [
        (['--arch', 'vgg'], 'vgg is unknown: choose baseline, resnet50, efficientnet_lite0, .*torchvision.NAME, or'),
        (['--recipe', 'magic'], 'magic is unknown: choose reference or tuned'),
        (['--valid', 'random'], 'choose official or patients'),
        (['--valid', 'val'], r'--valid val \(did you mean official\?\): choose official or patients or none'),
        (['--valid', 'patiens'], r'did you mean patients\?'),
        (['--precision', 'bfloat16'], r'--precision bfloat16 \(did you mean bf16\?\): choose .*fp32'),
        (['--epochs', '0'], 'at least 1'),
        (['--freeze-epochs', '2'], '--freeze-epochs 2: this training has no frozen phase, but train at 0.001. Omit'),
        (['--patience', '-1'], 'patience -1: a number from 0 to 1000 is needed'),
        (['--patience', '2', '--valid', 'none'], '--patience 2 and --valid none: without validation images'),
        (['--lr', '-1'], 'a positive number'),
        (['--lr', 'nan'], 'a positive number'),
        (['--weights', 'nowhere.pth'], 'nowhere.pth: neither a file nor known for baseline'),
    ],
)
def test_an_invalid_option_is_refused_before_a_run_exists(fails, train_argv, tmp_path, options, pattern):
    fails([*train_argv, *options], 2, pattern)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('word', 'option'),
    [('resnet50', '--arch'), ('tuned', '--recipe'), ('my.csv', '--csv'), ('12', '--epochs'), (Path('data'), '--data')],
)
def test_a_word_without_its_option_gets_the_option_that_was_meant(fails, tmp_path, word, option):
    if isinstance(word, Path):
        word = tmp_path / word
        word.mkdir()
    message = f'{word}: `cxr-fastai {{}}` has no arguments, only options. Did you mean {option} {word}?'
    fails(['train', word, '--out', tmp_path / 'run'], 2, re.escape(message.format('train')))
    if option != '--epochs':
        fails(['lr-find', word], 2, re.escape(message.format('lr-find')))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('argv', 'advice'),
    [
        (['train', 'no/such/data'], 'Did you mean --data no/such/data?'),
        (['train', 'resnet5O'], 'Did you mean --arch resnet5O?'),
        (['train', '--arch', 'baseline', 'resnet50'], 'Omit it, or write its option before it.'),
        (['train', 'quickly'], 'Omit it, or write its option before it.'),
        (['lr-find', '12'], 'Omit it, or write its option before it.'),
    ],
)
def test_only_an_option_that_can_be_meant_is_suggested(fails, argv, advice):
    fails(argv, 2, re.escape(f'{argv[-1]}: `cxr-fastai {argv[0]}` has no arguments, only options. {advice}'))


def test_a_patient_in_two_splits_is_refused_unless_allowed_and_recorded(fails, images, tmp_path):
    leaky = Path(shutil.copytree(images, tmp_path / 'leaky'))
    image = sorted((leaky / 'train/PNEUMONIA').iterdir())[0]
    shutil.copy(image, leaky / 'test/PNEUMONIA' / f'{image.stem}0.jpeg')
    argv = small_training(leaky, tmp_path / 'run')
    fails(argv, 2, 'patients with images in two splits: 1.*data audit.*--allow-leakage')
    assert not (tmp_path / 'run').exists()
    assert main([*argv, '--allow-leakage', '--limit', '3']) == 0
    assert '"allow_leakage": true' in (tmp_path / 'run/recipe.json').read_text()


@pytest.mark.parametrize('resize', ['pad', pytest.param('crop', marks=pytest.mark.slow)])
def test_prediction_resizes_images_as_training_did(train_argv, images, tmp_path, resize):
    tall = tmp_path / 'tall.png'
    Image.open(next((images / 'test').rglob('*.jpeg'))).resize((96, 180)).save(tall)
    assert main([*train_argv, '--resize', resize, '--limit', '3']) == 0
    predictor = Predictor.load(tmp_path / 'run')
    assert predictor.config.resize == resize
    assert Run.open(tmp_path / 'run').recipe.resize == resize

    def score(preprocessing: Preprocessing) -> float:
        return predictor.scores(preprocessing.load(tall)[None].copy())[0]

    (row,) = predictor.predict([tall])
    assert row['p_pneumonia'] == score(Preprocessing(48, resize))
    assert row['p_pneumonia'] != score(Preprocessing(48))


def test_weights_of_the_wrong_shape_leave_no_run(fails, train_argv, tmp_path):
    weights = tmp_path / 'w.pth'
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), weights)
    fails([*train_argv, '--arch', 'resnet50', '--weights', weights], 1, 'w.pth: does not fit')
    assert not (tmp_path / 'run').exists()


def test_an_existing_run_is_refused_and_unchanged(fails, run, images):
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob('*')}
    fails(['train', '--data', images, '--out', run.path], 2, 'exists already and nothing in it was overwritten')
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob('*')} == before


@pytest.fixture
def truncated(images, tmp_path) -> tuple[Path, Path]:
    """A copy of the images, and its one truncated training image."""
    folder = Path(shutil.copytree(images, tmp_path / 'images'))
    image = sorted((folder / 'train/NORMAL').iterdir())[1]  # fastai reads the first one before training
    image.write_bytes(image.read_bytes()[:500])
    return folder, image


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_image_that_breaks_during_training_is_named(fails, truncated, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(training, 'find_unreadable', lambda *_: {})  # as if it had been readable before
    folder, image = truncated
    fails(small_training(folder, tmp_path / 'run', workers), 1, f'^error: {re.escape(str(image))}: E_TRUNCATED')


@pytest.mark.parametrize('when', ['before', 'during'])
def test_an_unreadable_image_can_be_skipped_and_is_named(capsys, truncated, tmp_path, monkeypatch, when):
    if when == 'during':
        monkeypatch.setattr(training, 'find_unreadable', lambda *_: {})
    folder, image = truncated
    assert main([*small_training(folder, tmp_path / 'run'), '--on-bad-image', 'skip']) == 0
    errors = capsys.readouterr().err
    assert f'{image}: E_TRUNCATED' in errors
    assert 'skipped' in errors
    recorded = [image.relative_to(folder).as_posix()] if when == 'before' else []
    assert Run.open(tmp_path / 'run').unreadable == recorded
    # A prediction needs a result for each image, so the exported learner raises.
    with pytest.raises(ImageError):
        load_learner(tmp_path / 'run' / 'learner.pkl').predict(image)


def test_unreadable_images_are_named_before_training_starts(fails, images, tmp_path):
    folder = Path(shutil.copytree(images, tmp_path / 'images'))
    broken = sorted((folder / 'val/NORMAL').iterdir())[:4]
    for image in broken:
        image.write_bytes(b'')
    pattern = f'{re.escape(str(folder / "val/NORMAL"))}.*E_EMPTY.*; and 1 more. Remove or repair'
    fails(small_training(folder, tmp_path / 'run'), 1, pattern)
    assert not (tmp_path / 'run').exists()


def test_an_infinite_loss_exits_with_six_and_advises_a_lower_rate(fails, train_argv):
    fails([*train_argv, '--lr', '1e30'], 6, 'Train again with a lower --lr')


@pytest.mark.parametrize(
    ('name', 'pattern'),
    [
        ('lr.csv', r'must end with \.png'),
        ('no/lr.png', 'no does not exist'),
        ('existing.png', 'existing.csv already exists and was not overwritten'),
    ],
)
def test_lr_find_overwrites_nothing(fails, images, tmp_path, name, pattern):
    (tmp_path / 'existing.csv').write_text('path,label')
    fails(['lr-find', '--data', images, '--out', tmp_path / name], 2, pattern)


def test_a_recipe_file_repeats_a_training_exactly(images, run, tmp_path):
    again = tmp_path / 'again'
    assert main(['train', '--data', str(images), '--recipe', str(run / 'recipe.json'), '--out', str(again)]) == 0
    assert (again / 'recipe.json').read_bytes() == (run / 'recipe.json').read_bytes()
    assert (again / 'model.safetensors').read_bytes() == (run / 'model.safetensors').read_bytes()
    measured = [table.drop(columns='seconds') for table in (Run(again).history, run.history)]
    pd.testing.assert_frame_equal(*measured)


def test_options_replace_fields_of_a_recipe_file(images, run, tmp_path):
    options = ['--seed', '7', '--epochs', '1', '--set', 'flip=0', '--limit', '3']
    argv = ['train', '--data', images, '--recipe', run / 'recipe.json', '--out', tmp_path / 'run', *options]
    assert main([str(word) for word in argv]) == 0
    recipe = Run(tmp_path / 'run').recipe
    assert (recipe.seed, recipe.epochs, recipe.flip, recipe.limit) == (7, 1, 0, 3)
    assert (recipe.size, recipe.batch_size) == (run.recipe.size, run.recipe.batch_size)


@pytest.mark.parametrize(
    ('change', 'pattern'),
    [
        ({'size': 'large'}, "recipe.json: not a recipe of this version: the field size is 'large': a whole number"),
        ({'arch': 'vgg'}, '--arch vgg is unknown'),
        ({'weights': 'gone.pth'}, '--weights gone.pth: neither a file nor known for baseline'),
        ({'phases': []}, 'the recipe reference has no phases'),
        ({'name': 'custom'}, 'the recipe custom describes a network that was trained by hand'),
        ({'name': 'best'}, '--recipe best is unknown: choose reference or tuned, or a file such as RUN/recipe.json'),
    ],
)
def test_a_recipe_file_that_cannot_be_trained_by_is_refused(fails, images, run, tmp_path, change, pattern):
    file = tmp_path / 'recipe.json'
    file.write_text(json.dumps(json.loads((run / 'recipe.json').read_text()) | change))
    argv = ['train', '--data', images, '--recipe', file, '--out', tmp_path / 'new']
    fails(argv, 2, pattern)
    fails(['lr-find', '--data', images, '--recipe', file, '--out', tmp_path / 'lr.png'], 2, pattern)
    assert not (tmp_path / 'new').exists()


def test_a_recipe_file_that_is_missing_or_of_a_resumed_run_is_refused(fails, images, run):
    fails(['train', '--data', images, '--recipe', 'no.json'], 2, 'no.json: no such file. Name the recipe.json of a run')
    argv = ['train', '--resume', run.path, '--recipe', run / 'recipe.json']
    fails(argv, 2, 'a resumed run keeps its recipe. Omit --recipe')


def test_lr_find_suggests_a_rate_and_draws_the_curve(capsys, images, tmp_path):
    picture = tmp_path / 'lr.png'
    size = ['--size', '48', '--steps', '25', '--batch-size', '8', '--workers', '0']
    assert main(['lr-find', '--data', str(images), '--out', str(picture), *size]) == 0
    assert re.search(r'--lr \d\.\de-\d\d.*recipe.*1\.0e-03', capsys.readouterr().out)
    curve = pd.read_csv(tmp_path / 'lr.csv')
    assert curve.lr.is_monotonic_increasing and curve.loss.notna().all()
    assert picture.read_bytes().startswith(b'\x89PNG')
