"""A run on all images takes the out-of-fold predictions of a cross-validation for its threshold and its metrics."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxr_fastai.cli import main
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.core.series import Series
from cxr_fastai.evaluation.cross_validation import evaluate_folds
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.evaluation.out_of_fold import adopt_out_of_fold
from cxr_fastai.evaluation.robustness import evaluate_robustness
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.publishing.exporting import read_gate_samples
from cxr_fastai.publishing.model_card import render_card, reproduce
from cxr_fastai.publishing.reporting import report
from cxr_fastai.training.training import train


@pytest.fixture(scope='module')
def series(folds, tmp_path_factory) -> Series:
    """A copy of the folds, which adopting their predictions evaluates."""
    folder = tmp_path_factory.mktemp('series') / 'folds'
    shutil.copytree(folds.path, folder)
    return Series.open(folder)


@pytest.fixture(scope='module')
def final(once, folds, images) -> Run:
    """A run on all images by the recipe of the folds; not to be changed by a test."""
    recipe = replace(folds.recipe, valid='none')
    return Run(once('final', lambda folder: train(recipe, images, folder)))


@pytest.fixture
def copy(final, series, tmp_path) -> Run:
    """A copy of the run with the predictions of the folds."""
    shutil.copytree(final.path, tmp_path / 'run')
    adopt_out_of_fold(tmp_path / 'run', series)
    return Run(tmp_path / 'run')


def test_a_run_without_validation_trains_on_all_images_and_keeps_the_last_epoch(final, images):
    counts = final.items.split.value_counts()
    assert 'valid' not in counts and counts['train'] == 48
    assert final.kept_epoch == final.recipe.epochs and final.history.valid_loss.isna().all()
    with pytest.raises(UsageError, match='trained on all images'):
        evaluate(final, images, 'valid')


def test_its_validation_metrics_and_its_threshold_are_those_of_the_folds(copy, series):
    metrics = evaluate(copy, split='valid', rule='sensitivity:0.8')
    expected = evaluate_folds(series, rule='sensitivity:0.8', again=False)
    assert metrics['out_of_fold'] == 3 and metrics['n'] == 48
    assert metrics['auc'] == expected['metrics']['auc'] and metrics['threshold'] == expected['decision']['threshold']
    assert metrics['calibrated']['temperature'] == expected['decision']['temperature']
    assert Predictor.load(copy.path).threshold == metrics['threshold']


def test_the_test_images_are_predicted_by_the_run_itself(copy, images):
    metrics = evaluate(copy, images, 'test', rule='youden')
    paths = [images / path for path in copy.predicted('test').path]
    own = [row['p_pneumonia'] for row in Predictor.load(copy.path).predict(paths)]
    assert np.allclose(copy.predicted('test').p_pneumonia, own)
    assert 'out_of_fold' not in metrics and copy.metrics['valid']['out_of_fold'] == 3
    oof = copy.out_of_fold.set_index('path').p_pneumonia
    assert (copy.predicted('valid').set_index('path').p_pneumonia == oof).all()


def test_predictions_and_errors_name_the_evaluation_that_the_run_needs(final, copy, images, capsys):
    image = str(next((images / 'test/NORMAL').iterdir()))
    for run, command in (
        (final, f'cxr-fastai evaluate {final.path} --out-of-fold FOLDS'),
        (copy, f'cxr-fastai evaluate {copy.path}'),
    ):
        assert main(['predict', str(run.path), image]) == 0
        shown = ' '.join(capsys.readouterr().out.split())
        assert f'evaluate the run: `{command} --threshold sensitivity:0.95`.' in shown
        with pytest.raises(UsageError, match=f'Omit --calibrated, or evaluate the run: `{command}`.$'):
            Predictor.load(run.path, calibrated=True)
    evaluate(copy, images)
    assert Predictor.load(copy.path, calibrated=True).config.temperature
    with pytest.raises(UsageError, match=f'`cxr-fastai evaluate {copy.path} --out-of-fold FOLDS --tta`'):
        Predictor.load(copy.path).with_tta(True)


def test_other_out_of_fold_predictions_give_other_metrics(copy):
    first = evaluate(copy, split='valid')
    table = copy.out_of_fold
    table.p_pneumonia = 1 - table.p_pneumonia
    table.to_csv(copy / 'out_of_fold.csv', index=False)
    second = evaluate(copy, split='valid', again=False)
    assert second['auc']['value'] == pytest.approx(1 - first['auc']['value'])


def test_card_and_gate_say_and_do_what_is_possible_without_validation_images(copy):
    evaluate(copy, split='valid')
    card = ' '.join(render_card(copy, 'valid').split())
    assert 'those of 3 other networks' in card and 'selected the epoch' not in card
    samples = read_gate_samples(copy, Predictor.load(copy.path))
    train_images, valid_images = [images.reshape(len(images), -1) for _, images in samples.values()]
    assert len(train_images) + len(valid_images) == 48
    assert not {row.tobytes() for row in train_images} & {row.tobytes() for row in valid_images}


def test_the_report_says_which_networks_the_predictions_are_of(copy):
    evaluate(copy, split='valid')
    page = ' '.join(report(copy).read_text().split())
    assert 'those of 3 other networks' in page and 'train: 48' in page
    assert 'was trained on all images, so it has no validation images.' in page
    assert 'validation metrics by epoch' not in page, 'an empty figure'


def test_the_commands_in_the_report_train_the_folds_first(copy):
    evaluate(copy, split='valid')
    folds, training, evaluation, _ = reproduce(copy, 'valid').splitlines()
    assert folds.endswith('--folds 3 --out FOLDS') and '--valid none' not in folds
    assert '--valid none' in training and training.endswith('--out RUN')
    assert evaluation.startswith('cxr-fastai evaluate RUN --out-of-fold FOLDS')


def test_robustness_on_images_of_the_training_is_refused(copy):
    with pytest.raises(UsageError, match='the network was trained on the images'):
        evaluate_robustness(copy)


def test_another_recipe_other_images_and_own_validation_images_are_refused(final, series, run, tmp_path):
    with pytest.raises(UsageError, match='trained by another recipe than the folds'):
        adopt_out_of_fold(run, series)
    shutil.copytree(final.path, tmp_path / 'fewer')
    items = pd.read_csv(tmp_path / 'fewer/items.csv', dtype=str)
    items.iloc[:-1].to_csv(tmp_path / 'fewer/items.csv', index=False)
    with pytest.raises(UsageError, match='48 images, and .* was trained on 47'):
        adopt_out_of_fold(tmp_path / 'fewer', series)
    with pytest.raises(UsageError, match='validation images of its own'):
        adopt_out_of_fold(series.open_runs()[0], series)


def test_folds_that_could_stop_early_are_refused_with_what_helps(final, series, tmp_path):
    copied = Series.open(shutil.copytree(series.path, tmp_path / 'folds'))
    recipe = copied.folder_of_first / 'recipe.json'
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {'patience': 2}))
    with pytest.raises(UsageError, match='--patience, .* Train the folds without --patience'):
        adopt_out_of_fold(final, copied)


def test_the_command_evaluates_with_the_folds(final, series, tmp_path, capsys):
    shutil.copytree(final.path, tmp_path / 'run')
    assert main(['evaluate', str(tmp_path / 'run'), '--out-of-fold', str(series.path), '--json']) == 0
    document = json.loads(capsys.readouterr().out)
    assert document['split'] == 'valid' and document['runs'][0]['metrics']['out_of_fold'] == 3
    assert main(['evaluate', str(tmp_path / 'run'), '--split', 'valid']) == 0
    assert 'those of 3 other networks' in ' '.join(capsys.readouterr().out.split())
    assert main(['evaluate', str(tmp_path / 'run'), str(final.path), '--out-of-fold', str(series.path)]) == 2
    assert 'Name a single run' in capsys.readouterr().err


def test_folds_and_the_run_that_adopts_their_predictions_are_evaluated_with_views(final, series, tmp_path, capsys):
    plain = evaluate_folds(series, again=False, tta=False)
    run = Run(Path(shutil.copytree(final.path, tmp_path / 'run')))
    assert main(['evaluate', str(run.path), '--out-of-fold', str(series.path), '--tta']) == 0
    averaged = evaluate_folds(series, again=False)  # with the views of before
    assert averaged['decision']['tta'] and not plain['decision']['tta']
    assert averaged['metrics']['calibration']['brier'] != plain['metrics']['calibration']['brier']
    assert run.decision['tta'] and run.decision['threshold'] == averaged['decision']['threshold']
    assert Predictor.load(run.path).tta and run.out_of_fold.tta.all()
    assert main(['evaluate', str(series.path)]) == 0
    assert 'sensitivity:0.95, with test-time views' in ' '.join(capsys.readouterr().out.split())
    with pytest.raises(UsageError, match='--no-tta: the out-of-fold predictions .* were made with test-time views'):
        evaluate(run, split='valid', tta=False)


def test_out_of_fold_predictions_are_read_once(copy, images, monkeypatch):
    table = copy.out_of_fold
    reads = []
    monkeypatch.setattr(Run, 'out_of_fold', property(lambda run: reads.append(run) or table))
    for split in ('valid', 'test'):
        reads.clear()
        evaluate(copy, images, split)
        assert len(reads) == 1
