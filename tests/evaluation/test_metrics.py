"""The metrics of a split are scikit-learn's, each with an interval that knows which images belong together."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from cxr_fastai.evaluation.metrics import MIN_GROUP_SIZE, Calls, Sample, measure, measure_groups

RNG = np.random.default_rng(0)
RATES = ('accuracy', 'sensitivity', 'specificity', 'ppv', 'npv', 'f1', 'balanced_accuracy', 'mcc')


def table(targs, p, **columns) -> pd.DataFrame:
    return pd.DataFrame({'label': np.where(targs, 'PNEUMONIA', 'NORMAL'), 'p_pneumonia': p} | columns)


TARGS = RNG.random(300) < 0.6
P = np.clip(RNG.normal(0.35 + 0.3 * TARGS, 0.2), 0.001, 0.999)


def sklearn_rates(targs, called) -> dict[str, float]:
    return {
        'accuracy': sk.accuracy_score(targs, called),
        'sensitivity': sk.recall_score(targs, called),
        'specificity': sk.recall_score(targs, called, pos_label=0),
        'ppv': sk.precision_score(targs, called),
        'npv': sk.precision_score(targs, called, pos_label=0),
        'f1': sk.f1_score(targs, called),
        'balanced_accuracy': sk.balanced_accuracy_score(targs, called),
        'mcc': sk.matthews_corrcoef(targs, called),
    }


def test_the_metrics_are_scikit_learns_at_the_threshold_and_at_one_half():
    m = measure(table(TARGS, P), 0.4, 'fixed:0.4')
    for found, threshold in ((m, 0.4), (m['at_half'], 0.5)):
        wanted = sklearn_rates(TARGS, threshold <= P)
        assert {name: found[name]['value'] for name in wanted} == pytest.approx(wanted)
        assert all(found[name]['low'] < found[name]['value'] < found[name]['high'] for name in wanted)
        assert list(found['confusion'].values()) == sk.confusion_matrix(TARGS, threshold <= P).ravel().tolist()
    assert m['auc']['value'] == pytest.approx(sk.roc_auc_score(TARGS, P), abs=1e-12)
    assert m['average_precision']['value'] == pytest.approx(sk.average_precision_score(TARGS, P), abs=1e-12)
    assert m['brier'] == pytest.approx(sk.brier_score_loss(TARGS, P))
    assert m['log_loss'] == pytest.approx(sk.log_loss(TARGS, P))
    assert (m['n'], m['positives'], m['patients'], m['threshold_rule']) == (300, TARGS.sum(), 300, 'fixed:0.4')


def test_a_probability_at_the_threshold_is_called():
    m = measure(table(TARGS[:4] | True, np.full(4, 0.5)), 0.5, 'fixed:0.5')
    assert m['sensitivity']['value'] == 1


def test_images_of_several_per_patient_widen_every_interval():
    alone = measure(table(TARGS, P), 0.4, 'x')
    thrice = measure(table(np.tile(TARGS, 3), np.tile(P, 3), patient=np.tile(np.arange(300), 3)), 0.4, 'x')
    assert thrice['intervals']['grouped_by_patient'] and not alone['intervals']['grouped_by_patient']
    assert thrice['patients'] == 300 and thrice['n'] == 900
    for name in (*RATES, 'auc', 'average_precision'):  # copies of an image tell nothing new
        assert thrice[name]['value'] == pytest.approx(alone[name]['value'])
        widths = [found[name]['high'] - found[name]['low'] for found in (thrice, alone)]
        assert widths[0] == pytest.approx(widths[1], rel=0.12), name


def test_the_intervals_of_grouped_images_cover_where_independent_ones_do_not():
    rng, hits = np.random.default_rng(3), {'patients': 0, 'images': 0}
    for _ in range(100):
        patients = np.repeat(np.arange(60), rng.integers(1, 9, 60))
        p = np.clip(0.5 + rng.normal(0.2, 0.2, 60)[patients] + rng.normal(0, 0.05, len(patients)), 0, 1)
        truth = 0.834  # of N(.7, .206) above .5
        for name, who in (('patients', patients), ('images', np.arange(len(patients)))):
            found = Calls(Sample(np.ones(len(p), bool), p, who.astype(str)), 0.5).share(['tp'], ['fn'])
            hits[name] += found['low'] <= truth <= found['high']
    assert hits['patients'] > 88 and hits['images'] < 84


@pytest.mark.parametrize('patients', [np.arange(40), np.arange(40) // 2])
def test_a_perfect_network_is_never_certain(patients):
    targs = np.arange(40) < 20
    m = measure(table(targs, targs * 0.98 + 0.01, patient=patients), 0.5, 'x')
    for name in ('auc', 'sensitivity', 'specificity', 'accuracy', 'balanced_accuracy', 'ppv', 'f1'):
        assert m[name]['value'] == m[name]['high'] == 1 and m[name]['low'] < 0.95, name
    for name in ('mcc', 'average_precision'):
        assert m[name] == {'value': 1, 'low': None, 'high': None}


def test_images_of_one_patient_alone_are_one_patient():
    m = measure(table(TARGS, P, patient='one'), 0.4, 'x')
    for name in ('auc', 'sensitivity', 'accuracy'):
        assert m[name]['high'] - m[name]['low'] > 0.5, name


def test_fewer_patients_are_less_certain_of_perfection():
    targs = np.arange(40) < 20
    low = {n: measure(table(targs, targs + 0.0, patient=np.arange(40) // n), 0.5, 'x') for n in (1, 4)}
    for name in ('auc', 'sensitivity'):
        assert low[4][name]['low'] < low[1][name]['low']


@pytest.mark.parametrize('label', [True, False])
def test_one_class_leaves_what_needs_two_undefined(label):
    m = measure(table(np.full(12, label), RNG.random(12)), 0.5, 'x')
    for name in ('auc', 'average_precision', 'balanced_accuracy', 'mcc'):
        assert m[name]['value'] is None
    assert m['specificity' if label else 'sensitivity']['value'] is None
    assert m['prevalences'][0]['ppv']['value'] is None and m['calibration']['slope']['value'] is None
    json.dumps(m, allow_nan=False)


def test_metrics_are_plain_json():
    m = measure(table(TARGS, P, kind=np.where(TARGS, 'virus', 'normal')), 0.4, 'x', 1.5, by=['kind'])
    assert json.loads(json.dumps(m, allow_nan=False)) == m


def test_prevalences_are_the_users_and_follow_bayes():
    m = measure(table(TARGS, P), 0.4, 'x', prevalences=[0.25])
    a, b = m['sensitivity']['value'], m['specificity']['value']
    (row,) = m['prevalences']
    assert row['ppv']['value'] == pytest.approx(a * 0.25 / (a * 0.25 + (1 - b) * 0.75))
    assert row['npv']['value'] == pytest.approx(b * 0.75 / (b * 0.75 + (1 - a) * 0.25))
    assert [row['prevalence'] for row in measure(table(TARGS, P), 0.4, 'x')['prevalences']] == [0.02, 0.1, 0.3]


def test_the_temperature_changes_calibration_and_nothing_else():
    cold, warm = (measure(table(TARGS, P), 0.4, 'x', temperature) for temperature in (1.0, 2.0))
    assert cold['calibrated'] == cold['calibration'] | {'temperature': 1.0}
    assert warm['calibrated']['brier'] != warm['calibration']['brier']
    assert {name: value for name, value in cold.items() if name != 'calibrated'} == {
        name: value for name, value in warm.items() if name != 'calibrated'
    }


def test_groups_are_told_apart_and_small_ones_hidden():
    kinds = np.where(TARGS, np.where(np.arange(300) % 2, 'virus', 'bacteria'), 'normal').astype(object)
    kinds[np.flatnonzero(TARGS)[: MIN_GROUP_SIZE - 1]] = 'rare'
    kinds[np.flatnonzero(TARGS)[MIN_GROUP_SIZE]] = None
    images = table(TARGS, P, kind=kinds)
    groups = {group['group']: group for group in measure_groups(images, 'kind', 0.4)}
    assert set(groups) == {'bacteria', 'normal', 'virus', None} and groups[None] == {
        'column': 'kind',
        'group': None,
        'suppressed': 2,
    }
    virus = images[images.kind == 'virus']
    assert groups['virus']['sensitivity']['value'] == pytest.approx((virus.p_pneumonia >= 0.4).mean())
    assert groups['virus']['specificity']['value'] is None and groups['virus']['n'] == len(virus)
    both = images[(images.kind == 'virus') | ~TARGS]
    assert groups['virus']['auc']['value'] == pytest.approx(
        sk.roc_auc_score(both.label == 'PNEUMONIA', both.p_pneumonia)
    )
    assert groups['normal']['specificity']['value'] == pytest.approx((P[~TARGS] < 0.4).mean())


def test_a_rate_of_few_images_is_not_told():
    images = table(TARGS, P, sex=np.where(TARGS | (np.cumsum(~TARGS) < MIN_GROUP_SIZE), 'f', 'm'))  # one normal image too few
    f, m = measure_groups(images, 'sex', 0.4)
    assert f['specificity']['value'] is None and f['sensitivity']['value'] is not None
    assert m['sensitivity']['value'] is None and m['specificity']['value'] is not None


def test_a_group_of_both_classes_has_its_own_auc():
    images = table(TARGS, P, sex=np.where(np.arange(300) % 2, 'f', 'm'))
    found = measure_groups(images, 'sex', 0.4)[0]
    inside = images[images.sex == 'f']
    assert found['auc']['value'] == pytest.approx(sk.roc_auc_score(inside.label == 'PNEUMONIA', inside.p_pneumonia))
