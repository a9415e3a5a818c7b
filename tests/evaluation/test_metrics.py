"""Metrics agree with scikit-learn, and their intervals account for patients with several images."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from cxr_fastai.evaluation.intervals import MIN_GROUP_SIZE, describe_suppressed, too_few
from cxr_fastai.evaluation.metrics import (
    RANKING_METRICS,
    THRESHOLD_METRICS,
    ConfusionMatrix,
    Sample,
    interval_warnings,
    is_complete,
    measure,
    measure_groups,
    name_metric,
)

RNG = np.random.default_rng(0)
RATES = ('accuracy', 'sensitivity', 'specificity', 'ppv', 'npv', 'f1', 'balanced_accuracy', 'mcc')


def table(targs, p, **columns) -> pd.DataFrame:
    return pd.DataFrame({'label': np.where(targs, 'PNEUMONIA', 'NORMAL'), 'p_pneumonia': p} | columns)


TARGS = RNG.random(300) < 0.6
P = np.clip(RNG.normal(0.35 + 0.3 * TARGS, 0.2), 0.001, 0.999)


def sklearn_metrics(targs, positive) -> dict[str, float]:
    return {
        'accuracy': sk.accuracy_score(targs, positive),
        'sensitivity': sk.recall_score(targs, positive),
        'specificity': sk.recall_score(targs, positive, pos_label=0),
        'ppv': sk.precision_score(targs, positive),
        'npv': sk.precision_score(targs, positive, pos_label=0),
        'f1': sk.f1_score(targs, positive),
        'balanced_accuracy': sk.balanced_accuracy_score(targs, positive),
        'mcc': sk.matthews_corrcoef(targs, positive),
    }


@pytest.fixture(scope='module')
def metrics() -> dict:
    return measure(table(TARGS, P), 0.4, 'fixed:0.4')


@pytest.mark.parametrize('threshold', [0.4, 0.5])
def test_metrics_at_both_thresholds_are_those_of_scikit_learn(metrics, threshold):
    at_threshold = metrics if threshold == 0.4 else metrics['at_half']
    expected = sklearn_metrics(TARGS, threshold <= P)
    assert {name: at_threshold[name]['value'] for name in expected} == pytest.approx(expected)
    for name in expected:
        assert at_threshold[name]['low'] < at_threshold[name]['value'] < at_threshold[name]['high']
    confusion = sk.confusion_matrix(TARGS, threshold <= P)
    assert list(at_threshold['confusion'].values()) == confusion.ravel().tolist()


def test_metrics_without_a_threshold_are_those_of_scikit_learn(metrics):
    assert metrics['auc']['value'] == pytest.approx(sk.roc_auc_score(TARGS, P), abs=1e-12)
    assert metrics['average_precision']['value'] == pytest.approx(sk.average_precision_score(TARGS, P), abs=1e-12)
    assert metrics['brier'] == pytest.approx(sk.brier_score_loss(TARGS, P))
    assert metrics['log_loss'] == pytest.approx(sk.log_loss(TARGS, P))


def test_metrics_contain_the_size_of_the_split_and_the_rule(metrics):
    assert (metrics['n'], metrics['positives']) == (300, TARGS.sum())
    assert (metrics['patients'], metrics['unknown_patients']) == ('unknown', 300)
    assert metrics['patients_by_class'] == {'NORMAL': (~TARGS).sum(), 'PNEUMONIA': TARGS.sum()}
    assert metrics['threshold_rule'] == 'fixed:0.4'


def test_metrics_without_one_of_the_tables_are_not_complete(metrics):
    assert is_complete(metrics)
    for name in (*RANKING_METRICS, *THRESHOLD_METRICS, 'calibration'):
        assert not is_complete({key: value for key, value in metrics.items() if key != name})


def test_a_metric_is_named_by_its_abbreviation_or_its_key_in_words():
    assert (name_metric('ppv'), name_metric('brier')) == ('PPV', 'Brier score')
    assert name_metric('average_precision') == 'average precision'


def test_a_probability_equal_to_the_threshold_is_positive():
    metrics = measure(table(np.ones(4, bool), np.full(4, 0.5)), 0.5, 'fixed:0.5')
    assert metrics['sensitivity']['value'] == 1


def test_copies_of_images_of_the_same_patients_do_not_narrow_any_interval():
    metrics = measure(table(TARGS, P), 0.4, 'x')
    three_copies = table(np.tile(TARGS, 3), np.tile(P, 3), patient=np.tile(np.arange(300), 3))
    grouped = measure(three_copies, 0.4, 'x')
    assert grouped['intervals']['grouped_by_patient'] and not metrics['intervals']['grouped_by_patient']
    assert grouped['patients'] == 300 and grouped['n'] == 900
    for name in (*RATES, 'auc', 'average_precision'):
        assert grouped[name]['value'] == pytest.approx(metrics[name]['value'])
        width = metrics[name]['high'] - metrics[name]['low']
        assert grouped[name]['high'] - grouped[name]['low'] == pytest.approx(width, rel=0.12), name


def test_intervals_grouped_by_patient_cover_the_true_value_where_intervals_by_image_do_not():
    rng = np.random.default_rng(3)
    true_sensitivity = 0.834  # of N(0.7, 0.206) above 0.5
    covered = {'patients': 0, 'images': 0}
    for _ in range(100):
        patients = np.repeat(np.arange(60), rng.integers(1, 9, 60))
        n = len(patients)
        p = np.clip(0.5 + rng.normal(0.2, 0.2, 60)[patients] + rng.normal(0, 0.05, n), 0, 1)
        for unit, groups in (('patients', patients), ('images', np.arange(n))):
            sample = Sample(np.ones(n, bool), p, groups.astype(str))
            sensitivity = ConfusionMatrix(sample, 0.5).rate('sensitivity')
            covered[unit] += sensitivity['low'] <= true_sensitivity <= sensitivity['high']
    assert covered['patients'] > 88 and covered['images'] < 84


@pytest.mark.parametrize('patients', [np.arange(40), np.arange(40) // 2])
def test_intervals_of_a_perfect_network_have_a_lower_limit_below_1(patients):
    targs = np.arange(40) < 20
    metrics = measure(table(targs, targs * 0.98 + 0.01, patient=patients), 0.5, 'x')
    for name in ('auc', 'sensitivity', 'specificity', 'accuracy', 'balanced_accuracy', 'ppv', 'f1'):
        assert metrics[name]['value'] == metrics[name]['high'] == 1 and metrics[name]['low'] < 0.95, name
    for name in ('mcc', 'average_precision'):
        assert metrics[name] == {'value': 1, 'low': None, 'high': None}


def test_there_is_no_interval_where_all_images_belong_to_one_patient():
    metrics = measure(table(TARGS, P, patient='one'), 0.4, 'x', by=['patient'])
    values = measure(table(TARGS, P), 0.4, 'x')
    for name in (*RATES, 'auc', 'average_precision'):
        assert metrics[name] == {'value': pytest.approx(values[name]['value']), 'low': None, 'high': None}, name
    for name in ('brier', 'log_loss', 'slope', 'intercept'):
        assert metrics['calibration'][name]['low'] is metrics['calibration'][name]['high'] is None
    assert metrics['prevalences'][0]['ppv']['low'] is None and metrics['subgroups'][0]['auc']['low'] is None
    assert any('fewer than 2 patients, there is no interval' in text for text in interval_warnings(metrics))


def test_fewer_patients_lower_the_lower_limit_of_a_perfect_network():
    targs = np.arange(40) < 20
    many, few = (measure(table(targs, targs + 0.0, patient=np.arange(40) // n), 0.5, 'x') for n in (1, 4))
    for name in ('auc', 'sensitivity'):
        assert few[name]['low'] < many[name]['low']


@pytest.mark.parametrize('label', [True, False])
def test_metrics_that_need_two_classes_are_undefined_for_one(label):
    metrics = measure(table(np.full(12, label), RNG.random(12)), 0.5, 'x')
    for name in ('auc', 'average_precision', 'balanced_accuracy', 'mcc'):
        assert metrics[name]['value'] is None
    assert metrics['specificity' if label else 'sensitivity']['value'] is None
    assert metrics['prevalences'][0]['ppv']['value'] is None
    assert metrics['calibration']['slope']['value'] is None
    json.dumps(metrics, allow_nan=False)


def test_metrics_are_unchanged_by_writing_and_reading_json():
    metrics = measure(table(TARGS, P, kind=np.where(TARGS, 'virus', 'normal')), 0.4, 'x', 1.5, by=['kind'])
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_predictive_values_at_given_prevalences_follow_bayes_rule(metrics):
    assert [row['prevalence'] for row in metrics['prevalences']] == [0.02, 0.1, 0.3]
    (row,) = measure(table(TARGS, P), 0.4, 'x', prevalences=[0.25])['prevalences']
    a = metrics['sensitivity']['value']
    b = metrics['specificity']['value']
    assert row['ppv']['value'] == pytest.approx(a * 0.25 / (a * 0.25 + (1 - b) * 0.75))
    assert row['npv']['value'] == pytest.approx(b * 0.75 / (b * 0.75 + (1 - a) * 0.25))


def test_the_temperature_changes_only_the_calibrated_metrics():
    metrics, tempered = (measure(table(TARGS, P), 0.4, 'x', temperature) for temperature in (1.0, 2.0))
    assert metrics.pop('calibrated') == metrics['calibration'] | {'temperature': 1.0}
    assert tempered.pop('calibrated')['brier'] != tempered['calibration']['brier']
    assert metrics == tempered


def test_small_groups_are_only_counted():
    kinds = np.where(TARGS, np.where(np.arange(300) % 2, 'virus', 'bacteria'), 'normal').astype(object)
    kinds[np.flatnonzero(TARGS)[: MIN_GROUP_SIZE - 1]] = 'rare'
    kinds[np.flatnonzero(TARGS)[MIN_GROUP_SIZE]] = None
    images = table(TARGS, P, kind=kinds)
    groups = {group['group']: group for group in measure_groups(images, 'kind', 0.4)}
    assert set(groups) == {'bacteria', 'normal', 'virus', None}
    assert groups[None] == {'column': 'kind', 'group': None, 'suppressed': 2}


@pytest.mark.parametrize(
    ('n', 'positives', 'sensitivity', 'specificity'),
    [
        (30, 15, '', ''),
        (12, 7, 'too few (7)', 'too few (5)'),
        (20, 10, '', ''),
        (14, 14, '', ''),
        (19, 9, 'too few (9)', ''),
    ],
)
def test_a_rate_that_is_not_reported_names_the_number_of_images(n, positives, sensitivity, specificity):
    group = {'n': n, 'positives': positives}
    assert (too_few(group, 'sensitivity'), too_few(group, 'specificity')) == (sensitivity, specificity)


@pytest.mark.parametrize(
    ('n', 'text'), [(1, '1 group with too few images (fewer than 10)'), (3, '3 groups with too few')]
)
def test_groups_that_are_only_counted_are_described(n, text):
    assert describe_suppressed({'column': 'kind', 'group': None, 'suppressed': n}).startswith(text)


def test_a_group_of_one_class_is_compared_with_all_images_of_the_other():
    kinds = np.where(TARGS, np.where(np.arange(300) % 2, 'virus', 'bacteria'), 'normal')
    images = table(TARGS, P, kind=kinds)
    groups = {group['group']: group for group in measure_groups(images, 'kind', 0.4)}
    virus = images[images.kind == 'virus']
    assert groups['virus']['n'] == len(virus)
    assert groups['virus']['sensitivity']['value'] == pytest.approx((virus.p_pneumonia >= 0.4).mean())
    assert groups['virus']['specificity']['value'] is None
    compared = images[(images.kind == 'virus') | ~TARGS]
    auc = sk.roc_auc_score(compared.label == 'PNEUMONIA', compared.p_pneumonia)
    assert groups['virus']['auc']['value'] == pytest.approx(auc)
    assert groups['normal']['specificity']['value'] == pytest.approx((P[~TARGS] < 0.4).mean())


def test_a_rate_of_few_images_is_undefined():
    one_normal_too_few = TARGS | (np.cumsum(~TARGS) < MIN_GROUP_SIZE)
    female, male = measure_groups(table(TARGS, P, sex=np.where(one_normal_too_few, 'f', 'm')), 'sex', 0.4)
    assert female['specificity']['value'] is None and female['sensitivity']['value'] is not None
    assert male['sensitivity']['value'] is None and male['specificity']['value'] is not None


def test_a_group_of_both_classes_has_its_own_auc():
    images = table(TARGS, P, sex=np.where(np.arange(300) % 2, 'f', 'm'))
    group = measure_groups(images, 'sex', 0.4)[0]
    inside = images[images.sex == 'f']
    auc = sk.roc_auc_score(inside.label == 'PNEUMONIA', inside.p_pneumonia)
    assert group['auc']['value'] == pytest.approx(auc)
