"""Every figure against an independent implementation, and never without its interval."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn import metrics as sk

from cxr_fastai.core import FilmError, UsageError
from cxr_fastai.evaluation import COLUMNS, evaluate, f1, find_split, measure, proportion, roc_auc
from cxr_fastai.run import Run

RNG = np.random.default_rng(0)


def table(targs, p, **columns) -> pd.DataFrame:
    return pd.DataFrame({'label': np.where(targs, 'PNEUMONIA', 'NORMAL'), 'p_pneumonia': p} | columns)


@pytest.mark.parametrize(('k', 'n', 'low', 'high'), [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718),
    (390, 390, 0.9902, 1)])
def test_wilsons_golden_values(k, n, low, high):
    assert list(proportion(k, n).values()) == pytest.approx([k/n, low, high], abs=5e-5)


def test_nothing_of_nothing_is_undefined():
    assert proportion(0, 0) == f1(0, 0, 0) == {'value': None, 'low': None, 'high': None}


def test_the_auc_is_scikit_learns_also_with_ties():
    for n in (10, 60, 624):
        targs, p = RNG.random(n) < 0.6, RNG.random(n).round(1 if n == 60 else 9)
        assert roc_auc(targs, p)['value'] == pytest.approx(sk.roc_auc_score(targs, p), abs=1e-12)


def test_delongs_interval_is_the_one_of_its_definition():
    targs = np.arange(80) < 50
    p = np.clip(RNG.normal(0.4 + 0.3*targs, 0.2), 0, 1).round(2)
    wins = (np.sign(np.subtract.outer(p[targs], p[~targs])) + 1)/2  # each positive against each negative
    auc = wins.mean()
    variance = wins.mean(1).var(ddof=1)/50 + wins.mean(0).var(ddof=1)/30
    half = 1.959964*np.sqrt(variance)/(auc*(1 - auc))
    assert list(roc_auc(targs, p).values()) == pytest.approx([auc, expit(logit(auc) - half), expit(logit(auc) + half)])


def test_complete_separation_is_never_certain():
    targs = np.arange(40) < 20
    perfect, reversed_ = roc_auc(targs, targs.astype(float)), roc_auc(targs, 1.0 - targs)
    assert perfect['value'] == perfect['high'] == 1 and 0.8 < perfect['low'] < 0.99
    assert reversed_['value'] == reversed_['low'] == 0 and reversed_['high'] == pytest.approx(1 - perfect['low'])
    fewer = roc_auc(np.arange(10) < 5, (np.arange(10) < 5).astype(float))
    assert fewer['low'] < perfect['low']


def test_one_class_has_no_auc():
    assert roc_auc(np.ones(4, bool), np.arange(4.0))['value'] is None


def test_an_auc_without_variance_still_has_an_interval():
    for targs, p in [(np.arange(40) < 20, np.full(40, 0.5)), (np.arange(3) < 1, np.array([0.5, 0.1, 0.9]))]:
        estimate = roc_auc(targs, p)
        assert estimate['value'] == 0.5 and 0 < estimate['low'] < 0.45 and 0.55 < estimate['high'] < 1


def test_the_interval_of_f1_holds_f1_and_shrinks():
    few, many = f1(8, 1, 2), f1(800, 100, 200)
    assert few['value'] == pytest.approx(many['value']) == pytest.approx(16/19)
    assert few['low'] < many['low'] < many['value'] < many['high'] < few['high']


def test_the_metrics_are_scikit_learns():
    targs, p = RNG.random(200) < 0.6, RNG.random(200)
    m = measure(table(targs, p), 0.4, 'fixed:0.4')
    called = p >= 0.4
    wanted = {'accuracy': sk.accuracy_score(targs, called), 'sensitivity': sk.recall_score(targs, called),
              'specificity': sk.recall_score(targs, called, pos_label=0), 'ppv': sk.precision_score(targs, called),
              'npv': sk.precision_score(targs, called, pos_label=0), 'f1': sk.f1_score(targs, called),
              'auc': sk.roc_auc_score(targs, p)}
    assert {name: m[name]['value'] for name in wanted} == pytest.approx(wanted)
    assert all(m[name]['low'] < m[name]['value'] < m[name]['high'] for name in wanted)
    assert m['brier'] == pytest.approx(sk.brier_score_loss(targs, p))
    assert list(m['confusion'].values()) == sk.confusion_matrix(targs, called).ravel().tolist()
    assert (m['n'], m['positives'], m['threshold'], m['threshold_rule']) == (200, targs.sum(), 0.4, 'fixed:0.4')


@pytest.fixture
def copy(run, tmp_path) -> Run:
    shutil.copytree(run.path, tmp_path/'run')
    return Run(tmp_path/'run')


def test_evaluating_writes_the_contracts_files(copy, films):
    measured = evaluate(copy, films, 'test')
    predictions = pd.read_csv(copy/'predictions.csv')
    assert list(predictions) == COLUMNS and len(predictions) == measured['n'] == 12
    assert json.loads((copy/'metrics.json').read_text()) == {'test': measured}
    right = predictions.p_pneumonia.where(predictions.label == 'PNEUMONIA', 1 - predictions.p_pneumonia)
    assert np.allclose(predictions.loss, -np.log(right), atol=1e-5)
    assert measured == measure(predictions, 0.5, 'fixed:0.5')


def test_a_second_split_joins_the_first_and_a_second_time_replaces_it(copy):
    for split in ('test', 'valid', 'test'): evaluate(copy, None, split)
    assert set(copy.metrics) == {'test', 'valid'}
    assert copy.predictions.split.value_counts().to_dict() == {'test': 12, 'valid': 12}


def test_the_validation_figures_are_those_of_the_best_epoch(copy):
    measured, best = evaluate(copy, None, 'valid'), copy.noted('end')['best']
    assert measured['auc']['value'] == pytest.approx(best['roc_auc'], abs=1e-9)
    assert copy.predictions.loss.mean() == pytest.approx(best['valid_loss'], rel=1e-4)


def test_a_folder_with_only_test_films_is_enough(copy, films, tmp_path):
    shutil.copytree(films/'test', tmp_path/'elsewhere/test')
    assert evaluate(copy, tmp_path/'elsewhere', 'test')['n'] == 12


def test_without_data_the_films_are_those_it_was_trained_on(run, films, monkeypatch):
    monkeypatch.setenv('CXR_DATA', '/nowhere')
    root, items = find_split(run, None, 'valid')
    assert root == films and items.path.to_list() == run.items[run.items.split == 'valid'].path.to_list()


def test_valid_means_the_split_of_the_training_also_when_its_folder_is_named(copy, films):
    moved = copy.items.assign(split=lambda t: t.split.where(t.split == 'test', 'train'))
    moved.loc[moved.index[:5], 'split'] = 'valid'
    moved.to_csv(copy/'items.csv', index=False)
    assert find_split(copy, films, 'valid')[1].path.to_list() == moved.path[:5].to_list()


def test_valid_in_a_copy_of_the_folder_is_still_the_split_of_the_training(copy, films, tmp_path):
    shutil.copytree(films, tmp_path/'moved')
    trained = copy.items.assign(split=lambda t: t.split.replace({'train': 'valid', 'valid': 'train'}))
    trained.to_csv(copy/'items.csv', index=False)
    root, items = find_split(copy, tmp_path/'moved', 'valid')
    assert root == tmp_path/'moved' and set(items.path) == set(trained[trained.split == 'valid'].path)
    next((tmp_path/'moved/train').rglob('*.jpeg')).unlink()
    with pytest.raises(UsageError, match='are among those of the run, but not all'):
        find_split(copy, tmp_path/'moved', 'valid')


def test_a_patient_called_by_a_number_keeps_its_zeros(copy):
    copy.items.assign(patient='007').to_csv(copy/'items.csv', index=False)
    assert set(copy.items.patient) == {'007'}


def test_an_empty_split_says_what_there_is(copy, films, tmp_path):
    shutil.copytree(films/'train', tmp_path/'elsewhere/train')
    with pytest.raises(UsageError, match='the split test has no films; found train 36, valid 0, test 0'):
        evaluate(copy, tmp_path/'elsewhere', 'test')


def test_an_unreadable_film_is_named_and_nothing_is_written(copy, films, tmp_path):
    shutil.copytree(films/'test', tmp_path/'elsewhere/test')
    next((tmp_path/'elsewhere').rglob('IM*.jpeg')).write_bytes(b'broken')
    with pytest.raises(FilmError, match=r'IM-\d+-\d+.jpeg: E_FORMAT.*Remove or mend it'):
        evaluate(copy, tmp_path/'elsewhere', 'test')
    assert not (copy/'metrics.json').exists() and not (copy/'predictions.csv').exists()
