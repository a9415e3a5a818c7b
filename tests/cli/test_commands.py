"""What a user types, and what comes back: exit codes, one clear line, and nothing lost."""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image

from cxr_fastai.cli import app, main
from cxr_fastai.core.errors import ImageError
from cxr_fastai.core.run import Run
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.pickles import load_learner
from cxr_fastai.inference.predictor import Predictor

README = (Path(__file__).parents[2] / 'README.md').read_text()


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith('error: ')]


def refused(capsys, argv: list, code: int, says: str) -> None:
    assert main([str(word) for word in argv]) == code
    (complaint,) = lines(capsys.readouterr().err)
    assert re.search(says, complaint), complaint


@pytest.fixture
def train(images, tmp_path):
    return ['train', '--data', images, '--out', tmp_path / 'run', '--epochs', '1', '--size', '48', '--workers', '0']


def test_help_is_quick_because_it_loads_neither_torch_nor_pandas():
    code = (
        'import sys; from cxr_fastai.cli import main; '
        'codes = [main([*words.split(), "--help"]) for words in ("", "train", "data demo")]; '
        'print(codes, *{"torch", "fastai", "pandas", "numpy", "matplotlib"} & set(sys.modules))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == '[0, 0, 0]' and done.stdout.count('Usage') == 3


def commands(group, path=()):
    for name, command in getattr(group, 'commands', {}).items():
        if hasattr(command, 'commands'):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands(__import__('typer').main.get_command(app)))


@pytest.mark.parametrize('name', COMMANDS, ids=' '.join)
def test_every_command_and_option_has_help_and_every_command_an_example(name):
    command = COMMANDS[name]
    assert f'Example: cxr-fastai {" ".join(name)}' in command.help
    assert all(parameter.help for parameter in command.params if parameter.name != 'help')


@pytest.mark.parametrize('name', COMMANDS, ids=' '.join)
def test_the_readme_names_every_command(name):
    assert f'cxr-fastai {" ".join(name)}' in README


def test_the_version_is_that_of_the_package(capsys):
    from importlib.metadata import version

    assert main(['--version', 'train']) == 0 and version('cxr_fastai') in capsys.readouterr().out


def test_missing_images_say_how_to_get_some(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(capsys, ['train'], 1, 'data/chest_xray: no such folder.*--data DIR.*cxr-fastai data download.*data demo')
    refused(capsys, ['train', '--data', 'nowhere'], 1, 'nowhere: no such folder')


def test_cxr_data_is_found(images, monkeypatch, tmp_path):
    monkeypatch.setenv('CXR_DATA', str(images))
    monkeypatch.chdir(tmp_path)
    for folder in ('runs/baseline', 'runs/baseline-2'):
        assert main(['train', '--epochs', '1', '--size', '48', '--limit', '2', '--workers', '0']) == 0
        assert (tmp_path / folder / 'learner.pkl').is_file()


def test_one_class_or_an_empty_split_is_wrong_usage(capsys, images, tmp_path):
    one, empty = tmp_path / 'one', tmp_path / 'empty'
    shutil.copytree(images / 'train/NORMAL', one / 'train/NORMAL')
    shutil.copytree(images / 'train', empty / 'train')
    refused(capsys, ['train', '--data', one], 2, r'train holds 14 NORMAL and 0 PNEUMONIA')
    refused(capsys, ['train', '--data', empty], 2, 'valid holds no image')


@pytest.mark.parametrize(
    ('options', 'code', 'says'),
    [
        (['--arch', 'vgg'], 2, 'vgg is unknown: choose baseline, resnet50, efficientnet_lite0, or'),
        (['--recipe', 'magic'], 2, 'magic is unknown: choose reference or tuned'),
        (['--valid', 'random'], 2, 'choose official or patients'),
        (['--epochs', '0'], 2, 'at least 1'),
        (['--lr', '-1'], 2, 'a positive number'),
        (['--lr', 'nan'], 2, 'a positive number'),
        (['--weights', 'nowhere.pth'], 2, 'neither a file nor known for baseline'),
    ],
)
def test_wrong_options_of_train(capsys, train, tmp_path, options, code, says):
    refused(capsys, [*train, *options], code, says)
    assert not (tmp_path / 'run').exists()


def test_a_leak_is_refused_unless_it_is_allowed_and_recorded(capsys, images, tmp_path):
    leaky = Path(shutil.copytree(images, tmp_path / 'leaky'))
    image = sorted((leaky / 'train/PNEUMONIA').iterdir())[0]
    shutil.copy(image, leaky / 'test/PNEUMONIA' / f'{image.stem}0.jpeg')
    argv = ['train', '--data', leaky, '--out', tmp_path / 'run', '--epochs', '1', '--size', '48', '--workers', '0']
    refused(capsys, argv, 2, 'patients with images in two splits: 1.*data audit.*--allow-leakage')
    assert not (tmp_path / 'run').exists()
    assert main([str(word) for word in [*argv, '--allow-leakage', '--limit', '3']]) == 0
    assert '"allow_leakage": true' in (tmp_path / 'run/recipe.json').read_text()


@pytest.mark.parametrize('resize', ['pad', 'crop'])
def test_the_way_to_resize_travels_from_training_to_prediction(train, images, tmp_path, resize):
    tall = tmp_path / 'tall.png'
    Image.open(next((images / 'test').rglob('*.jpeg'))).resize((96, 180)).save(tall)
    assert main([str(word) for word in [*train, '--resize', resize, '--limit', '3']]) == 0
    predictor = Predictor.load(tmp_path / 'run')
    assert predictor.config.resize == resize and Run.open(tmp_path / 'run').recipe.resize == resize
    (row,) = predictor.predict([tall])
    score = lambda seen: predictor.scores(seen.load(tall)[None].copy())[0]
    assert row['p_pneumonia'] == score(Preprocessing(48, resize)) != score(Preprocessing(48))


def test_odd_images_are_predicted_with_a_note_and_others_rejected(run, images, tmp_path):
    from imagefiles import DEEP, dicom, encoded

    folder = tmp_path / 'in'
    folder.mkdir()
    odd = {'a.png': encoded(DEEP), 'b.dcm': dicom(), 'c.dcm': dicom(Modality='CT'), 'd.tif': b'II*'}
    for name, data in odd.items():
        (folder / name).write_bytes(data)
    assert main(['predict', str(run.path), str(folder), '--out', str(tmp_path / 'p.csv')]) == 3
    table = pd.read_csv(tmp_path / 'p.csv')
    assert table.status.to_list() == ['ok', 'ok', 'rejected', 'error']
    assert table.code.fillna('').to_list() == ['', '', 'E_DICOM_MODALITY', 'E_FORMAT']
    assert table.message[:2].str.contains('window 1014 to 3985').all() and table.message.str.len().max() <= 200


def test_weights_of_the_wrong_shape_leave_no_run(capsys, train, tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / 'w.pth')
    refused(capsys, [*train, '--arch', 'resnet50', '--weights', tmp_path / 'w.pth'], 1, 'w.pth: does not fit')
    assert not (tmp_path / 'run').exists()


def test_an_existing_run_is_refused_and_kept(capsys, run, images):
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob('*')}
    refused(capsys, ['train', '--data', images, '--out', run.path], 2, 'exists already and nothing in it was over')
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob('*')} == before


@pytest.fixture
def with_a_bad_image(images, tmp_path) -> tuple[Path, Path]:
    shutil.copytree(images, tmp_path / 'images')
    bad = sorted((tmp_path / 'images/train/NORMAL').iterdir())[1]  # fastai looks at the first one beforehand
    bad.write_bytes(bad.read_bytes()[:500])
    return tmp_path / 'images', bad


def training(data, out, workers='0') -> list:
    return ['train', '--data', data, '--out', out, '--epochs', '1', '--size', '48', '--workers', workers]


@pytest.mark.parametrize('workers', ['0', '2'])
def test_an_image_that_goes_bad_during_training_is_named(capsys, with_a_bad_image, tmp_path, workers, monkeypatch):
    monkeypatch.setattr('cxr_fastai.training.training.find_unreadable', lambda _: {})
    data, bad = with_a_bad_image
    refused(capsys, training(data, tmp_path / 'run', workers), 1, f'^error: {re.escape(str(bad))}: E_TRUNCATED')


@pytest.mark.parametrize('when', ['before', 'during'])
def test_a_bad_image_can_be_skipped_and_is_named(capsys, with_a_bad_image, tmp_path, monkeypatch, when):
    if when == 'during':
        monkeypatch.setattr('cxr_fastai.training.training.find_unreadable', lambda _: {})
    data, bad = with_a_bad_image
    assert main([*map(str, training(data, tmp_path / 'run')), '--on-bad-image', 'skip']) == 0
    assert f'{bad}: E_TRUNCATED' in (errors := capsys.readouterr().err) and 'skipped' in errors
    assert Run.open(tmp_path / 'run').noted('start')['unreadable'] == (
        [bad.relative_to(data).as_posix()] if when == 'before' else []
    )
    # The exported learner owes an answer for every image, and so complains.
    with pytest.raises(ImageError):
        load_learner(tmp_path / 'run' / 'learner.pkl').predict(bad)


def test_unreadable_images_are_named_before_training_starts(capsys, images, tmp_path):
    shutil.copytree(images, tmp_path / 'images')
    for bad in sorted((tmp_path / 'images/val/NORMAL').iterdir())[:4]:
        bad.write_bytes(b'')
    refused(
        capsys,
        ['train', '--data', tmp_path / 'images', '--out', tmp_path / 'run'],
        1,
        f'{re.escape(str(bad.parent))}.*E_EMPTY.*; and 1 more. Remove or mend',
    )
    assert not (tmp_path / 'run').exists()


def test_a_loss_that_is_no_number_ends_with_six(capsys, train):
    refused(capsys, [*train, '--lr', '1e30'], 6, 'Train again with a lower --lr')


def test_a_full_disk_ends_with_six_and_one_line(capsys, train, tmp_path):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, unlimited[1]))
    try:
        refused(capsys, [*train, '--limit', '4'], 6, r'state.pt: cannot be written \(File too large\)')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not list((tmp_path / 'run').glob('*learner.pkl*'))


@pytest.mark.parametrize(
    ('name', 'says'), [('recipe.json', 'damaged'), ('items.csv', 'is missing: `cxr-fastai train`')]
)
def test_a_damaged_run_is_told_in_one_line(capsys, run, images, tmp_path, name, says):
    shutil.copytree(run.path, tmp_path / 'run')
    (tmp_path / 'run' / name).write_text('{') if name.endswith('json') else (tmp_path / 'run' / name).unlink()
    refused(capsys, ['evaluate', tmp_path / 'run', '--data', images], 2, says)


def test_a_name_too_long_for_the_system_is_told_in_one_line(capsys):
    refused(capsys, ['train', '--data', 'x' * 300], 1, 'File name too long')


def unwritable(tmp_path):
    """A folder in which nobody, not even root, can make anything."""
    if not Path('/sys').is_dir():
        pytest.skip('needs a file system that refuses new files')
    return Path('/sys/cxr')


def test_a_read_only_output_is_one_line(capsys, train, run, images, tmp_path):
    where = unwritable(tmp_path)
    refused(capsys, [*train[:4], where / 'run'], 6, 'cannot be written')
    refused(capsys, ['data', 'demo', where], 6, 'cannot be written')
    image = next((images / 'test').rglob('*.jpeg'))
    refused(capsys, ['predict', run.path, image, '--out', where.with_suffix('.csv')], 6, 'cannot be written')


def test_evaluate_shows_the_targets_and_draws(capsys, run, images, tmp_path):
    shutil.copytree(run.path, tmp_path / 'run')
    assert main(['evaluate', str(tmp_path / 'run'), '--data', str(images), '--split', 'test']) == 0
    shown = capsys.readouterr()
    assert 'sensitivity' in shown.out and re.search('met|missed', shown.out)
    drawn = {path.name for path in (tmp_path / 'run/figures').iterdir()}
    curves = ('calibration', 'confusion', 'net_benefit', 'precision_recall', 'risk_coverage', 'roc', 'scores')
    assert drawn == {'images', 'history.png', *(f'{name}_test.png' for name in curves)}


def test_evaluate_needs_a_run(capsys, tmp_path):
    refused(capsys, ['evaluate', tmp_path], 2, 'is not a run folder')


@pytest.mark.parametrize('model', ['run', 'pkl'])
def test_predict_writes_a_row_an_image_and_fails_only_for_the_bad_one(capsys, run, images, tmp_path, model):
    (tmp_path / 'bad.jpeg').write_bytes(b'')
    source = run.path if model == 'run' else run / 'learner.pkl'
    code = main(
        ['predict', str(source), str(images / 'test'), str(tmp_path / 'bad.jpeg'), '--out', str(tmp_path / 'p.csv')]
    )
    table = pd.read_csv(tmp_path / 'p.csv')
    assert code == 3 and table.status.to_list() == ['ok'] * 12 + ['error'] and table.code[12] == 'E_EMPTY'
    told = capsys.readouterr().err
    assert lines(told) == [f'error: {tmp_path / "bad.jpeg"}: E_EMPTY: the file is empty']
    assert told.count('has no input gate') == 1


def test_predict_overwrites_nothing(capsys, run, images, tmp_path):
    (tmp_path / 'p.csv').write_text('precious')
    refused(capsys, ['predict', run.path, images, '--out', tmp_path / 'p.csv'], 2, 'exists already and was left alone')
    assert (tmp_path / 'p.csv').read_text() == 'precious'


def test_predict_without_a_model_says_what_a_model_is(capsys, images, tmp_path):
    refused(capsys, ['predict', tmp_path / 'nothing', images], 2, 'name a run folder')


def test_a_name_with_brackets_is_shown_as_it_is(capsys, run, images, tmp_path):
    odd = tmp_path / '[red]image[-red].jpeg'
    shutil.copy(next((images / 'test').rglob('*.jpeg')), odd)
    assert main(['predict', str(run.path), str(odd)]) == 0
    assert '[red]image[-red].jpeg' in capsys.readouterr().out.replace('\n', '')


def test_a_bug_keeps_its_traceback(monkeypatch, images):
    def bug(*_):
        raise ZeroDivisionError

    monkeypatch.setattr('cxr_fastai.data.items.data_root', bug)
    with pytest.raises(ZeroDivisionError):
        main(['train', '--data', str(images)])


def test_the_demo_goes_the_whole_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        'cxr_fastai.publishing.exporting.verify_afresh', lambda _: None
    )  # as for the bundle of other tests
    assert main(['demo', '--out', str(tmp_path / 'demo'), '--images', '40', '--size', '48', '--epochs', '1']) == 0
    made = {path.name for path in (tmp_path / 'demo').iterdir()}
    assert made == {'images', 'audit', 'run', 'bundle', 'predictions.csv'}
    assert (tmp_path / 'demo/run/metrics.json').is_file()
    refused(capsys, ['demo', '--out', tmp_path / 'demo'], 2, 'exists already')


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, '-m', 'cxr_fastai', '--version'], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.startswith('cxr_fastai ')


@pytest.mark.parametrize(
    ('name', 'says'),
    [('lr.csv', 'ends in .png'), ('no/lr.png', 'no does not exist'), ('there.png', 'there.csv exists already')],
)
def test_lr_find_writes_over_nothing(capsys, images, tmp_path, name, says):
    (tmp_path / 'there.csv').write_text('path,label')
    refused(capsys, ['lr-find', '--data', images, '--out', tmp_path / name], 2, says)


def test_lr_find_suggests_and_draws(capsys, images, tmp_path):
    assert (
        main(
            [
                'lr-find',
                '--data',
                str(images),
                '--out',
                str(tmp_path / 'lr.png'),
                '--size',
                '48',
                '--steps',
                '40',
                '--workers',
                '0',
                '--batch-size',
                '8',
            ]
        )
        == 0
    )
    assert re.search(r'--lr \d\.\de-\d\d is suggested; the recipe has 1.0e-03', capsys.readouterr().out)
    curve = pd.read_csv(tmp_path / 'lr.csv')
    assert curve.lr.is_monotonic_increasing and curve.loss.notna().all()
    assert (tmp_path / 'lr.png').read_bytes().startswith(b'\x89PNG')
