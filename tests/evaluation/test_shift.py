"""A run is measured on the soft images that its training held out, and its threshold can be chosen on them."""

import json
import shutil

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from cxr_fastai.cli import main
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.recipe import SHIFT
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.evaluation.metrics import Sample
from cxr_fastai.evaluation.shift import evaluate_shift, measure_shift, shift_table, specificity_at
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.publishing.reporting import render
from cxr_fastai.training.training import train


@pytest.fixture(scope='module')
def shifted(once, images) -> Run:
    """A run that held out soft images, evaluated on them; not to be changed by a test."""

    def make(folder):
        recipe = make_recipe('baseline', epochs=1, size=32, batch_size=8, valid='patients', shift_pct=0.3, workers=0)
        evaluate_shift(train(recipe, images, folder), rule='sensitivity:0.5')

    return Run(once('shifted', make))


@pytest.fixture
def copy(shifted, tmp_path) -> Run:
    shutil.copytree(shifted.path, tmp_path / 'run')
    return Run(tmp_path / 'run')


def test_the_figures_are_those_of_the_predictions_of_each_split(shifted):
    results = measure_shift(shifted)
    for split in ('valid', SHIFT):
        predictions = shifted.predicted(split)
        targs = predictions.label == 'PNEUMONIA'
        assert results['splits'][split]['n'] == len(predictions)
        assert results['splits'][split]['auc']['value'] == pytest.approx(roc_auc_score(targs, predictions.p_pneumonia))
        positive = predictions.p_pneumonia >= results['thresholds']['valid']['threshold']
        row = results['thresholds']['valid'][split]
        assert row['sensitivity']['value'] == pytest.approx(positive[targs].mean())
        assert row['specificity']['value'] == pytest.approx(1 - positive[~targs].mean())
    assert list(shift_table(results).split) == ['valid', SHIFT]


def test_the_specificity_is_that_of_the_roc_curve_at_the_sensitivity():
    rng = np.random.default_rng(3)
    targs = np.arange(200) % 3 > 0
    p = np.clip(rng.normal(0.4 + 0.2 * targs, 0.2), 0, 1)
    false_positives, sensitivities, _ = roc_curve(targs, p, drop_intermediate=False)
    for sensitivity in (0.5, 0.95, 1.0):
        expected = 1 - false_positives[np.flatnonzero(sensitivities >= sensitivity - 1e-9)[0]]
        estimate = specificity_at(Sample(targs, p, np.arange(200).astype(str)), sensitivity)
        assert estimate['value'] == pytest.approx(expected) and estimate['low'] < expected < estimate['high']
    assert specificity_at(Sample(targs[:1], p[:1], np.array(['a'])), 0.95)['value'] is None


def test_the_threshold_is_chosen_on_the_soft_images_on_request_and_stays_so(copy):
    on_valid = evaluate(copy, split=SHIFT)
    on_shift = evaluate(copy, split=SHIFT, rule='sensitivity:0.5@shift')
    scores = np.sort(copy.predicted(SHIFT).query('label == "PNEUMONIA"').p_pneumonia)
    assert (scores >= on_shift['threshold']).mean() >= 0.5 and on_shift['threshold'] != on_valid['threshold']
    assert 'soft images of pneumonia' in copy.decision['margin']
    assert evaluate(copy, split='valid')['threshold_rule'] == 'sensitivity:0.5@shift'
    assert evaluate(copy, split='valid', rule='sensitivity:0.5')['threshold'] == on_valid['threshold']


def test_the_command_prints_both_splits_and_the_trade(copy, capsys):
    main(['evaluate', str(copy.path), '--shift', '--choose-on', 'shift', '--threshold', 'sensitivity:0.5', '--json'])
    document = json.loads(capsys.readouterr().out)
    shift = document['runs'][0]['shift']
    assert document['split'] == SHIFT and set(shift['splits']) == {'valid', SHIFT}
    assert document['runs'][0]['metrics']['threshold'] == shift['thresholds'][SHIFT]['threshold']
    main(['evaluate', str(copy.path), '--shift'])
    text = capsys.readouterr().out
    assert 'specificity at' in text and 'chosen on' in text and 'held out of training' in text


def test_the_report_has_a_section_once_both_splits_are_evaluated(copy, images):
    assert 'Soft images</h2>' in render(copy, SHIFT)
    evaluate(copy, split='valid')
    predictions, metrics = copy.predicted('valid'), copy.metrics
    copy.write_results(predictions, {'valid': metrics['valid']}, copy.decision)
    assert 'Soft images</h2>' not in render(copy, 'valid')


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--choose-on', 'test'], 'choose valid or shift'),
        (['--choose-on', 'shift', '--threshold', 'fixed:0.5'], 'a fixed threshold is not chosen'),
        (['--shift', '--split', 'valid'], 'Omit one of them'),
    ],
)
def test_options_that_do_not_go_together_are_refused(shifted, capsys, words, message):
    assert main(['evaluate', str(shifted.path), *words]) == 2
    assert message in ' '.join(capsys.readouterr().err.split())


def test_the_rule_of_choose_on_without_a_threshold_is_said(shifted, capsys):
    assert main(['evaluate', str(shifted.path), '--choose-on', 'shift', '--shift', '--limit', '3']) == 2
    assert '--choose-on shift without --threshold: the rule is sensitivity:0.95.' in capsys.readouterr().out


def test_a_run_without_such_images_says_how_to_get_them(run, images):
    for split, rule in ((SHIFT, None), ('valid', 'youden@shift')):
        with pytest.raises(UsageError, match='shift_pct=0.2'):
            evaluate(run, images, split, rule=rule)
    with pytest.raises(UsageError, match='shift_pct=0.2'):
        evaluate_shift(run, images)
