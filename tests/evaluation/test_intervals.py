"""Intervals agree with independent implementations and golden values; bootstrap draws agree with scikit-learn."""

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import binomtest, norm
from sklearn import metrics as sk

from cxr_fastai.evaluation.intervals import (
    auc_draws,
    auc_interval,
    average_precision_draws,
    compare_auc,
    count_draws,
    difference_interval,
    draw_patients,
    f1_interval,
    format_estimate,
    predictive_values,
    roc_draws,
    standard_error,
    wilson_interval,
)

UNDEFINED = {'value': None, 'low': None, 'high': None}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ('count', 'total', 'low', 'high'),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (390, 390, 0.9902, 1),
    ],
)
def test_wilson_intervals_have_their_golden_values(count, total, low, high):
    assert list(wilson_interval(count, total).values()) == pytest.approx([count / total, low, high], abs=5e-5)


def test_wilson_intervals_are_those_of_scipy(rng):
    for count, total in rng.integers(1, 500, (50, 2)):
        count = min(count, total)
        scipy = binomtest(count, total).proportion_ci(method='wilson')
        expected = [count / total, scipy.low, scipy.high]
        assert list(wilson_interval(count, total).values()) == pytest.approx(expected, abs=1e-12)


def test_a_smaller_effective_size_widens_a_wilson_interval_and_keeps_its_value():
    all_images = wilson_interval(90, 100)
    effective = wilson_interval(90, 100, 50)
    assert effective['value'] == all_images['value']
    assert effective['low'] < all_images['low'] and effective['high'] > all_images['high']
    assert effective['low'] == pytest.approx(wilson_interval(45, 50)['low'])


def test_a_fractional_effective_size_follows_wilsons_formula():
    p, n, z = 5 / 9, 3.3, norm.ppf(0.975)
    half_width = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    limits = [(p + z**2 / (2 * n) + sign * half_width) / (1 + z**2 / n) for sign in (-1, 1)]
    assert list(wilson_interval(5, 9, 3.3).values()) == pytest.approx([p, *limits], abs=1e-12)


def test_a_proportion_of_no_images_is_undefined():
    assert wilson_interval(0, 0) == f1_interval(0, 0, 0) == UNDEFINED


def test_the_f1_interval_contains_f1_and_narrows_with_more_images():
    few = f1_interval(8, 1, 2)
    many = f1_interval(800, 100, 200)
    assert few['value'] == pytest.approx(many['value']) == pytest.approx(16 / 19)
    assert few['low'] < many['low'] < many['value'] < many['high'] < few['high']


@pytest.mark.parametrize(('n', 'decimals'), [(10, 9), (60, 1), (624, 9)])
def test_the_auc_is_that_of_scikit_learn_with_and_without_ties(rng, n, decimals):
    targs = rng.random(n) < 0.6
    p = rng.random(n).round(decimals)
    assert auc_interval(targs, p)['value'] == pytest.approx(sk.roc_auc_score(targs, p), abs=1e-12)


def wins(targs, p):
    """Compare each positive with each negative: (positives, negatives) of 1, 0.5 and 0."""
    return (np.sign(np.subtract.outer(p[targs], p[~targs])) + 1) / 2


def test_the_auc_interval_follows_delongs_definition(rng):
    targs = np.arange(80) < 50
    p = np.clip(rng.normal(0.4 + 0.3 * targs, 0.2), 0, 1).round(2)
    auc = wins(targs, p).mean()
    variance = wins(targs, p).mean(1).var(ddof=1) / 50 + wins(targs, p).mean(0).var(ddof=1) / 30
    half_width = 1.959964 * np.sqrt(variance) / (auc * (1 - auc))
    expected = [auc, expit(logit(auc) - half_width), expit(logit(auc) + half_width)]
    assert list(auc_interval(targs, p).values()) == pytest.approx(expected)


def test_complete_separation_has_a_one_sided_interval():
    targs = np.arange(40) < 20
    perfect = auc_interval(targs, targs.astype(float))
    reversed_ = auc_interval(targs, 1.0 - targs)
    assert perfect['value'] == perfect['high'] == 1 and 0.8 < perfect['low'] < 0.99
    assert reversed_['value'] == reversed_['low'] == 0
    assert reversed_['high'] == pytest.approx(1 - perfect['low'])
    few_targs = np.arange(10) < 5
    assert auc_interval(few_targs, few_targs.astype(float))['low'] < perfect['low']


def test_images_of_one_class_have_no_auc():
    assert auc_interval(np.ones(4, bool), np.arange(4.0))['value'] is None


@pytest.mark.parametrize(
    ('targs', 'p'),
    [
        pytest.param(np.arange(40) < 20, np.full(40, 0.5), id='equal scores'),
        pytest.param(np.arange(3) < 1, np.array([0.5, 0.1, 0.9]), id='one positive'),
    ],
)
def test_an_auc_without_variance_still_has_an_interval(targs, p):
    auc = auc_interval(targs, p)
    assert auc['value'] == 0.5 and 0 < auc['low'] < 0.45 and 0.55 < auc['high'] < 1


def test_the_paired_auc_test_follows_delongs_definition(rng):
    targs = np.arange(90) < 40
    a = np.clip(rng.normal(0.4 + 0.3 * targs, 0.2), 0, 1).round(2)
    b = np.clip(a + rng.normal(0, 0.15, 90), 0, 1)
    above = np.cov(np.stack([wins(targs, a).mean(1), wins(targs, b).mean(1)]))
    below = np.cov(np.stack([wins(targs, a).mean(0), wins(targs, b).mean(0)]))
    covariance = above / 40 + below / 50
    difference = wins(targs, a).mean() - wins(targs, b).mean()
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    comparison = compare_auc(targs, a, b)
    limits = [difference - 1.959964 * error, difference + 1.959964 * error]
    assert comparison['value'] == pytest.approx(difference)
    assert [comparison['low'], comparison['high']] == pytest.approx(limits)
    assert comparison['p'] == pytest.approx(2 * norm.sf(abs(difference) / error))


def test_the_paired_auc_test_rejects_a_true_null_hypothesis_in_5_percent_of_trials():
    rng = np.random.default_rng(1)
    targs = np.arange(120) < 60
    p_values = []
    for _ in range(400):
        signal = rng.normal(targs * 1.2, 1)
        comparison = compare_auc(targs, signal + rng.normal(0, 1, 120), signal + rng.normal(0, 1, 120))
        p_values.append(comparison['p'])
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.085  # 5% within the chance of 400 trials


def test_a_curve_does_not_differ_from_itself(rng):
    targs = np.arange(40) < 20
    p = rng.random(40)
    assert compare_auc(targs, p, p) == {'value': 0, 'low': None, 'high': None, 'p': 1}
    assert compare_auc(np.ones(4, bool), p[:4], p[:4])['p'] is None


def test_a_difference_without_standard_error_has_no_p_value():
    assert difference_interval(0.1, 0) == {'value': 0.1, 'low': None, 'high': None, 'p': None}


@pytest.mark.parametrize(('prevalence', 'expected'), [(0.625, 0.942), (0.1, 0.521), (0.02, 0.167)])
def test_predictive_values_have_their_golden_values(prevalence, expected):
    ppv, _ = predictive_values(wilson_interval(98, 100), wilson_interval(90, 100), 100, 100, prevalence)
    assert ppv['value'] == pytest.approx(expected, abs=5e-4)


def test_predictive_values_at_the_prevalence_of_the_images_are_those_of_the_images():
    ppv, npv = predictive_values(wilson_interval(180, 200), wilson_interval(70, 100), 200, 100, 200 / 300)
    assert ppv['value'] == pytest.approx(180 / 210) and npv['value'] == pytest.approx(70 / 90)


def test_predictive_values_of_perfect_rates_have_an_interval():
    perfect = wilson_interval(50, 50)
    ppv, npv = predictive_values(perfect, perfect, 50, 50, 0.1)
    assert ppv['value'] == npv['value'] == ppv['high'] == 1 and ppv['low'] < 0.8 and 0.9 < npv['low'] < 1


def test_the_ppv_is_undefined_where_no_image_is_classified_as_pneumonia():
    ppv, _ = predictive_values(wilson_interval(0, 50), wilson_interval(50, 50), 50, 50, 0.1)
    assert ppv['value'] is None


@pytest.mark.parametrize('specificity', [0.9, 0.97, 0.99])
def test_intervals_of_predictive_values_cover_the_true_value(specificity):
    rng = np.random.default_rng(2)
    true_ppv = 0.95 * 0.1 / (0.95 * 0.1 + (1 - specificity) * 0.9)
    trials = 1000
    covered = 0
    for tp, tn in zip(rng.binomial(390, 0.95, trials), rng.binomial(234, specificity, trials), strict=True):
        ppv, _ = predictive_values(wilson_interval(tp, 390), wilson_interval(tn, 234), 390, 234, 0.1)
        covered += ppv['low'] <= true_ppv <= ppv['high']
    assert 0.93 < covered / trials < 0.985


@pytest.mark.parametrize(
    ('estimate', 'text'),
    [
        (UNDEFINED, 'undefined'),
        ({'value': 0.5, 'low': None, 'high': None}, '0.500'),
        ({'value': 0.5, 'low': 0.25, 'high': 0.75}, '0.500 (0.250 to 0.750)'),
    ],
)
def test_an_estimate_is_formatted_with_its_interval(estimate, text):
    assert format_estimate(estimate) == text


PATIENTS = np.random.default_rng(0).integers(0, 30, 80)
TARGS = PATIENTS % 3 > 0
SCORES = np.clip(np.random.default_rng(1).normal(0.4 + 0.2 * TARGS, 0.2), 0, 1).round(1)  # with ties
WEIGHTS = draw_patients(PATIENTS, draws=40)


def test_a_draw_contains_all_images_of_a_patient_and_as_many_patients_as_there_are():
    for patient in set(PATIENTS):
        images = WEIGHTS[:, patient == PATIENTS].T
        assert (images == images[0]).all()
    first_images = [np.flatnonzero(patient == PATIENTS)[0] for patient in set(PATIENTS)]
    assert (WEIGHTS[:, first_images].sum(axis=1) == len(first_images)).all()


def test_the_same_seed_gives_the_same_draws_and_another_seed_others():
    assert (draw_patients(PATIENTS, 40) == WEIGHTS).all()
    assert (draw_patients(PATIENTS, 40, seed=1) != WEIGHTS).any()


def test_the_auc_and_average_precision_of_draws_are_those_of_scikit_learn():
    auc = [sk.roc_auc_score(TARGS, SCORES, sample_weight=weights) for weights in WEIGHTS]
    precision = [sk.average_precision_score(TARGS, SCORES, sample_weight=weights) for weights in WEIGHTS]
    assert auc_draws(WEIGHTS, TARGS, SCORES) == pytest.approx(auc)
    assert average_precision_draws(WEIGHTS, TARGS, SCORES) == pytest.approx(precision)


def test_counts_of_draws_are_those_of_repeated_images():
    positive = SCORES >= 0.5
    cells = np.stack(count_draws(WEIGHTS, TARGS, positive), axis=1)
    for weights, (tp, fp, fn, tn) in zip(WEIGHTS, cells, strict=True):
        repeated = np.repeat(np.arange(80), weights.astype(int))
        confusion = sk.confusion_matrix(TARGS[repeated], positive[repeated], labels=[False, True])
        assert confusion.ravel().tolist() == [tn, fp, fn, tp]


def test_true_and_false_positives_rise_from_none_to_all_as_the_threshold_falls():
    tp, fp = roc_draws(WEIGHTS, TARGS, SCORES)
    assert (tp[:, 0] == 0).all() and (tp[:, -1] == WEIGHTS[:, TARGS].sum(axis=1)).all()
    assert (fp[:, -1] == WEIGHTS[:, ~TARGS].sum(axis=1)).all() and (np.diff(tp) >= 0).all()


def test_patients_with_one_image_vary_like_the_binomial_distribution():
    positive = np.arange(400) < 300
    draws = draw_patients(np.arange(400))[:, positive].sum(axis=1) / 400
    assert standard_error(draws) == pytest.approx(np.sqrt(0.75 * 0.25 / 400), rel=0.08)


def test_draws_without_one_of_the_classes_are_left_out():
    weights = np.array([[1.0, 1], [2, 0], [0, 2]])
    auc = auc_draws(weights, np.array([True, False]), np.array([0.9, 0.1]))
    assert auc[0] == 1 and np.isnan(auc[1:]).all() and standard_error(auc) == 0
