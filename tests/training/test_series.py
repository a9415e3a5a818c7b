"""Folds and seeds are trained one after the other, are ordinary runs, and continue where they were stopped."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cxr_fastai.cli import main
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.core.series import Series, is_folds, is_series
from cxr_fastai.data import shift
from cxr_fastai.data.items import read_items, read_recipe_items
from cxr_fastai.data.splits import split_patients
from cxr_fastai.evaluation.comparison import find_runs
from cxr_fastai.evaluation.cross_validation import evaluate_folds
from cxr_fastai.evaluation.metrics import Sample, measure_auc
from cxr_fastai.images.synthetic import make_demo
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training import series as training_series
from cxr_fastai.training import training
from cxr_fastai.training.extending import extend_recipe
from cxr_fastai.training.series import resume_series, train_folds, train_seeds

RECIPE = make_recipe('baseline', epochs=1, size=48, batch_size=8, seed=3, workers=0)


def copy_of(series: Series, folder) -> Series:
    shutil.copytree(series.path, folder)
    return Series.open(folder)


def test_every_image_is_in_the_validation_of_one_fold_apart_from_all_images_of_its_patient(folds):
    valid = [run.items[run.items.split == 'valid'] for run in folds.open_runs()]
    together = pd.concat(valid)
    assert together.path.is_unique
    pool = folds.open_runs()[0].items
    assert set(together.path) == set(pool[pool.split != 'test'].path)
    for one in valid:
        others = together[~together.path.isin(one.path)]
        assert not set(one.patient) & set(others.patient)


def test_a_fold_is_an_ordinary_run_with_the_number_in_its_recipe(folds):
    assert is_series(folds.path) and is_folds(folds.path) and not is_series(folds.open_runs()[0].path)
    assert [run.path.name for run in folds.open_runs()] == ['fold-0', 'fold-1', 'fold-2']
    assert [(run.recipe.fold, run.recipe.valid) for run in folds.open_runs()] == [(n, 'patients') for n in range(3)]
    assert all((run.path / 'model.safetensors').is_file() for run in folds.open_runs())


def test_folds_are_drawn_alike_and_their_number_is_limited_by_the_patients(images):
    items = read_items(images)
    first, again = split_patients(items, 1, 0.25, 2), split_patients(items, 1, 0.25, 2)
    assert first.split.equals(again.split) and not first.split.equals(split_patients(items, 1, 0.25, 1).split)
    with pytest.raises(UsageError, match='fold 99: there are .* parts of the patients'):
        split_patients(items, 1, 0.01, 99)


def test_seeds_differ_in_the_seed_alone(images, tmp_path):
    series = train_seeds(RECIPE, images, tmp_path / 'seeds', 2)
    assert [run.path.name for run in series.open_runs()] == ['seed-3', 'seed-4']
    assert [replace(run.recipe, seed=3) for run in series.open_runs()] == [RECIPE, RECIPE]
    with pytest.raises(UsageError, match='there are no folds'):
        evaluate_folds(series)


def test_the_precision_of_the_first_training_is_that_of_the_others(images, tmp_path, monkeypatch):
    trials = []

    def choose(recipe, device, n_images, compiled):
        trials.append(compiled)
        return {'precision': 'bf16', 'reason': 'a test', 'milliseconds': {}}

    monkeypatch.setattr(training, 'choose_precision', choose)
    series = train_folds(RECIPE, images, tmp_path / 'folds', 2, precision='auto')
    assert [run.recipe.precision for run in series.open_runs()] == ['bf16', 'bf16'] and trials == [False]


def interrupt(series: Series) -> None:
    """Leave the series as if it had been stopped after the first epoch of its second training."""
    shutil.rmtree(series.folder('fold-2'))
    fold = series.folder('fold-1')
    journal = fold / 'journal.jsonl'
    journal.write_text(''.join(line for line in journal.read_text().splitlines(True) if '"event": "end"' not in line))
    for name in ('model.safetensors', 'learner.pkl'):
        (fold / name).unlink()


def test_an_interrupted_series_continues_with_the_missing_trainings(folds, images, tmp_path):
    series = copy_of(folds, tmp_path / 'folds')
    interrupt(series)
    assert series.find_missing() == ['fold-1', 'fold-2']
    with pytest.raises(UsageError, match=r'fold-1, fold-2 of 3 trainings not finished.*--resume'):
        series.open_runs()
    with pytest.raises(UsageError, match='not finished'):
        find_runs([series.path])
    before = (series.folder('fold-0') / 'journal.jsonl').read_bytes()
    resume_series(series.path, images)
    assert (series.folder('fold-0') / 'journal.jsonl').read_bytes() == before
    for old, new in zip(folds.open_runs(), series.open_runs(), strict=True):
        assert (old / 'model.safetensors').read_bytes() == (new / 'model.safetensors').read_bytes()


def test_one_fold_is_not_trained_longer_alone(folds, images, tmp_path, capsys):
    series = copy_of(folds, tmp_path / 'folds')
    fold = series.folder('fold-1')
    assert main(['train', '--resume', str(fold), '--epochs', '3']) == 2
    options = f'--data {images.resolve()} --recipe {fold}/recipe.json --epochs 3 --folds 3 --out DIR'
    advice = f'`cxr-fastai train {options}`, or extend a copy'
    error = ' '.join(capsys.readouterr().err.split())
    assert f'{fold} is one of 3 folds' in error and advice in error
    copied = Run.open(shutil.copytree(fold, tmp_path / 'copied'))
    longer = extend_recipe(copied, 3)
    assert longer.extensions == 1
    Run(fold).extend(longer)
    with pytest.raises(UsageError, match='fold-1 was trained in another way than fold-0 .*and 2 epochs of extension'):
        evaluate_folds(series)


def test_a_training_that_was_stopped_before_it_began_is_started_again(folds, images, tmp_path):
    series = copy_of(folds, tmp_path / 'folds')
    shutil.rmtree(series.folder('fold-2'))
    Run.create(series.folder('fold-2'))
    assert not resume_series(series.path, images).find_missing()


def test_a_series_keeps_its_images(folds, images, tmp_path):
    series = copy_of(folds, tmp_path / 'folds')
    interrupt(series)
    make_demo(tmp_path / 'others', images=50, size=96, seed=9)
    with pytest.raises(UsageError, match='its trainings so far have other images'):
        resume_series(series.path, tmp_path / 'others')


def test_other_images_are_no_out_of_fold_images(folds, tmp_path):
    make_demo(tmp_path / 'others', images=50, size=96, seed=9)
    for path in list((tmp_path / 'others').rglob('*.jpeg')):
        path.rename(path.with_name(f'other_{path.name}'))
    before = sorted(path for path in folds.path.rglob('*') if path.is_file())
    with pytest.raises(UsageError, match='the validation images of fold-0 are not in'):
        evaluate_folds(folds, tmp_path / 'others')
    assert sorted(path for path in folds.path.rglob('*') if path.is_file()) == before


def test_a_class_with_few_patients_limits_the_folds_before_a_folder_is_made(images, tmp_path):
    with pytest.raises(UsageError, match=r'--folds 90: (NORMAL|PNEUMONIA) has only \d+ patients. Choose at most'):
        train_folds(RECIPE, images, tmp_path / 'folds', 90)
    assert not (tmp_path / 'folds').exists()


def test_a_series_is_trained_in_a_single_process(images, tmp_path, monkeypatch):
    for name, value in {'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '1'}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match='--seeds trains in a single process'):
        train_seeds(RECIPE, images, tmp_path / 'seeds', 2)
    assert not (tmp_path / 'seeds').exists()


def test_the_last_seed_is_a_seed(images, tmp_path):
    with pytest.raises(UsageError, match='the last seed would be'):
        train_seeds(replace(RECIPE, seed=2**32), images, tmp_path / 'seeds', 2)


def test_out_of_fold_metrics_are_those_of_the_predictions_of_all_folds(folds, tmp_path):
    series = copy_of(folds, tmp_path / 'folds')
    results = evaluate_folds(series)
    table = pd.read_csv(series.path / 'out_of_fold.csv')
    expected = pd.concat([run.predicted('valid') for run in series.open_runs()]).sort_values('path', ignore_index=True)
    assert table.path.to_list() == expected.path.to_list()
    assert np.allclose(table.p_pneumonia, expected.p_pneumonia) and set(table.fold) == set(series.recipes)
    assert results['metrics']['auc'] == measure_auc(Sample.from_predictions(expected))
    assert results['metrics']['n'] == len(table) == sum(fold['n'] for fold in results['folds'].values())
    aucs = [fold['auc'] for fold in results['folds'].values()]
    assert results['spread']['auc'] == pytest.approx(
        {'mean': np.mean(aucs), 'sd': np.std(aucs, ddof=1), 'low': min(aucs), 'high': max(aucs)}
    )
    stored = json.loads((series.path / 'out_of_fold.json').read_text())
    assert stored['decision']['valid']['n'] == len(table)
    assert {'roc.png', 'confusion.png'} <= {path.name for path in (series.path / 'figures').iterdir()}


@pytest.mark.parametrize('number', [1, 101])
def test_the_number_of_folds_is_limited(number, images, tmp_path):
    with pytest.raises(UsageError, match=f'--folds {number}: a whole number from 2 to 100'):
        train_folds(RECIPE, images, tmp_path / 'folds', number)
    assert not (tmp_path / 'folds').exists()


def test_a_damaged_series_is_refused(folds, tmp_path):
    series = copy_of(folds, tmp_path / 'folds')
    file = series.path / 'series.json'
    file.write_text(file.read_text().replace('"number": 3', '"number": "3"'))
    with pytest.raises(UsageError, match='number'):
        Series.open(series.path)
    with pytest.raises(UsageError, match='not a series of trainings'):
        Series.open(tmp_path)


def test_the_commands_train_continue_and_evaluate_folds(images, tmp_path, capsys):
    out = tmp_path / 'folds'
    options = ['--data', str(images), '--size', '48', '--epochs', '1', '--batch-size', '8', '--workers', '0']
    assert main(['train', *options, '--folds', '2', '--out', str(out)]) == 0
    assert f'2 runs trained. Next: cxr-fastai evaluate {out}' in capsys.readouterr().out
    assert main(['train', '--resume', str(out)]) == 0
    assert capsys.readouterr().out.count('trained already') == 2
    assert main(['evaluate', str(out)]) == 0
    output = capsys.readouterr().out
    assert 'out-of-fold' in output and 'fold-1' in output and 'sd' in output
    assert main(['evaluate', str(out), '--json']) == 0
    assert json.loads(capsys.readouterr().out)['folds'].keys() == {'fold-0', 'fold-1'}


@pytest.mark.parametrize(
    ('options', 'reason'),
    [
        (['--folds', '2', '--seeds', '2'], 'choose one of them'),
        (['--folds', '2', '--valid', 'official'], 'Omit --valid'),
        (['--folds', '2', '--set', 'fold=1'], 'Omit --set fold'),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, reason, images, tmp_path, capsys):
    assert main(['train', '--data', str(images), '--out', str(tmp_path / 'run'), *options]) == 2
    assert reason in capsys.readouterr().err and not (tmp_path / 'run').exists()


def test_options_that_folds_do_not_have_are_refused(folds, run, capsys):
    for argv, reason in {
        ('evaluate', folds.path, '--limit', '3', '--robustness'): '--limit, --robustness: not available for the out-of',
        ('train', '--resume', folds.path, '--epochs', '3', '--set', 'ema=0'): '--epochs, --set and --resume',
        ('train', '--resume', run.path, '--folds', '3'): '--folds and --resume',
    }.items():
        assert main([str(word) for word in argv]) == 2
        assert reason in capsys.readouterr().err


def test_the_images_are_listed_and_their_detail_is_measured_once_for_all_folds(images, tmp_path, monkeypatch):
    measured, listed = [], []

    def measure(paths, *args):
        measured.append(paths)
        return np.arange(len(paths), dtype=float)

    def read(root):
        listed.append(root)
        return read_items(root)

    def train_nothing(recipe, data, out, *, items, **options):
        Run.create(out).start(recipe, items)

    monkeypatch.setattr(shift, 'measure_detail', measure)
    monkeypatch.setattr(training_series, 'read_items', read)
    monkeypatch.setattr(training_series, 'train', train_nothing)
    series = train_folds(replace(RECIPE, shift_pct=0.2), images, tmp_path / 'folds', 3)
    assert len(measured) == len(listed) == 1
    for name, recipe in series.recipes.items():
        assert Run(series.folder(name)).items.equals(pd.DataFrame(read_recipe_items(images, recipe)))
