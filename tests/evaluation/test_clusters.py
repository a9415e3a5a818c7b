"""Intervals of images grouped by patient agree with independent implementations, also where patients are few."""

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.special import expit
from scipy.stats import norm, t

from cxr_fastai.evaluation.clusters import (
    MANY_PATIENTS,
    clustered_auc,
    compare_clustered_auc,
    effective_size,
    mean_spread,
)
from cxr_fastai.evaluation.intervals import auc_interval, compare_auc, newcombe_interval, wilson_interval


def make_images(
    patients_per_class: int, seed: int, images_per_patient: int = 10, shared: float = 0.5, distance: float = 2.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets, scores and patients; the images of a patient share the proportion `shared` of the variance."""
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(2 * patients_per_class), images_per_patient)
    targs = patients >= patients_per_class
    patient_part = rng.normal(0, np.sqrt(shared), 2 * patients_per_class)[patients]
    scores = patient_part + rng.normal(0, np.sqrt(1 - shared), len(patients)) + distance * targs
    return targs, scores, patients


def variance_by_definition(targs, first, second, patients) -> tuple[float, float]:
    """Difference of two AUCs (`second` may be None) and Obuchowski's variance, with sums over pairs of images."""

    def wins(scores):
        return (np.sign(np.subtract.outer(scores[targs], scores[~targs])) + 1) / 2

    pairs = wins(first) if second is None else wins(first) - wins(second)
    value = pairs.mean()
    names = set(patients)
    above = {i: (pairs.mean(1) - value)[patients[targs] == i].sum() for i in names}
    below = {i: (pairs.mean(0) - value)[patients[~targs] == i].sum() for i in names}
    m, n = pairs.shape
    k, k_above, k_below = len(names), len(set(patients[targs])), len(set(patients[~targs]))
    variance = k_above / (k_above - 1) * sum(v**2 for v in above.values()) / m**2
    variance += k_below / (k_below - 1) * sum(v**2 for v in below.values()) / n**2
    variance += 2 * k / (k - 1) * sum(above[i] * below[i] for i in names) / (m * n)
    return value, variance


@pytest.mark.parametrize('mixed', [False, True], ids=['one class per patient', 'both classes'])
def test_the_interval_of_many_patients_has_obuchowskis_variance(mixed):
    targs, scores, patients = make_images(80, 0, 4)
    if mixed:
        patients = patients % 80
    auc, variance = variance_by_definition(targs, scores, None, patients)
    interval = clustered_auc(targs, scores, patients)
    logits = np.log(np.divide([interval['low'], interval['high']], 1 - np.array([interval['low'], interval['high']])))
    quantile = np.ptp(logits) / 2 * auc * (1 - auc) / np.sqrt(variance)
    assert interval['value'] == pytest.approx(auc)
    assert norm.ppf(0.975) < quantile < t.ppf(0.975, 40)
    assert expit(logits.mean()) == pytest.approx(auc)


def test_the_interval_of_few_patients_is_newcombes_for_the_effective_numbers_of_images():
    targs, scores, patients = make_images(8, 1)
    auc, variance = variance_by_definition(targs, scores, None, patients)
    _, independent = variance_by_definition(targs, scores, None, np.arange(len(targs)))
    interval = clustered_auc(targs, scores, patients)
    most_images = 80 * independent / variance  # with the normal quantile; that of t makes them fewer
    widest, narrowest = (newcombe_interval(auc, n, n) for n in (most_images / 4, most_images))
    assert widest['low'] < interval['low'] < narrowest['low'] < auc
    assert auc < narrowest['high'] < interval['high'] < widest['high']


def test_the_comparison_has_obuchowskis_variance():
    targs, scores, patients = make_images(60, 2, 5)
    other = scores + np.random.default_rng(0).normal(0, 0.3, 120)[patients] - 0.2 * targs
    difference, variance = variance_by_definition(targs, scores, other, patients)
    comparison = compare_clustered_auc(targs, scores, other, patients)
    assert comparison['value'] == pytest.approx(difference)
    half_width = (comparison['high'] - comparison['low']) / 2
    assert norm.ppf(0.975) < half_width / np.sqrt(variance) < t.ppf(0.975, 20)
    assert comparison['p'] > 2 * norm.sf(abs(difference) / np.sqrt(variance))


def test_a_patient_for_each_image_gives_delongs_variance():
    targs, scores, _ = make_images(60, 3, 2)
    other = scores + np.random.default_rng(1).normal(0, 0.5, 240)
    own = np.arange(240)
    for clustered, independent in (
        (clustered_auc(targs, scores, own), auc_interval(targs, scores)),
        (compare_clustered_auc(targs, scores, other, own), compare_auc(targs, scores, other)),
    ):
        for limit in ('value', 'low', 'high'):
            assert clustered[limit] == pytest.approx(independent[limit], abs=0.005)


@pytest.mark.parametrize('seed', range(20))
def test_an_interval_is_never_narrower_than_that_of_independent_images(seed):
    targs, scores, patients = make_images(3 + 5 * seed, seed, 2, shared=0.05, distance=seed / 5)
    clustered, independent = clustered_auc(targs, scores, patients), auc_interval(targs, scores)
    assert clustered['low'] <= independent['low'] and clustered['high'] >= independent['high']
    correct = scores > 0.5
    size = effective_size(correct, patients)
    assert size <= len(correct)


def test_the_variance_of_a_mean_is_the_cluster_robust_one_of_statsmodels():
    rng = np.random.default_rng(4)
    patients = rng.integers(0, 25, 200)
    values = rng.random(25)[patients] + rng.random(200)
    fit = sm.OLS(values, np.ones(200)).fit(cov_type='cluster', cov_kwds={'groups': patients})
    assert mean_spread(values, patients).variance == pytest.approx(fit.bse[0] ** 2)


def test_degrees_of_freedom_are_the_patients_but_one_unless_few_patients_matter():
    even = mean_spread(np.tile([0.0, 1, 0, 1], 10), np.repeat(np.arange(20), 2) // 2)
    assert mean_spread(np.repeat([0.0, 1], 20), np.arange(40) // 2).df == 19 and even.variance == 0
    one_patient_differs = np.r_[np.ones(10), np.zeros(190)]
    assert mean_spread(one_patient_differs, np.arange(200) // 10).df < 4


def test_effective_sizes_of_extreme_proportions_are_the_numbers_of_patients():
    patients = np.arange(60) // 10
    assert effective_size(np.ones(60, bool), patients) == effective_size(np.zeros(60, bool), patients) == 6
    assert effective_size(np.ones(60, bool), np.arange(60)) == 60


def test_one_patient_of_a_class_gives_no_interval():
    targs, scores, patients = make_images(2, 5)
    patients = np.where(targs, 9, patients)
    assert clustered_auc(targs, scores, patients)['low'] is None
    assert compare_clustered_auc(targs, scores, -scores, patients)['p'] is None
    assert effective_size(scores > 1, np.zeros(40)) is None


def test_one_class_has_no_auc():
    scores = np.arange(6.0)
    for targs in (np.ones(6, bool), np.zeros(6, bool)):
        assert clustered_auc(targs, scores, np.arange(6) // 2)['value'] is None
        assert compare_clustered_auc(targs, scores, scores, np.arange(6) // 2)['value'] is None


def test_complete_separation_has_the_interval_of_the_patients():
    targs, _, patients = make_images(4, 6)
    assert clustered_auc(targs, targs.astype(float), patients) == newcombe_interval(1.0, 4, 4)


@pytest.mark.parametrize(('n_patients', 'shared'), [(2, 0.5), (3, 0.8), (5, 0.5), (10, 0.8), (20, 0.8)])
def test_intervals_of_few_patients_cover_the_true_value(n_patients, shared):
    assert n_patients < MANY_PATIENTS
    trials = 120
    covered = {'auc': 0, 'sensitivity': 0, 'independent': 0}
    for seed in range(trials):
        targs, scores, patients = make_images(n_patients, seed, shared=shared)
        auc, independent = clustered_auc(targs, scores, patients), auc_interval(targs, scores)
        covered['auc'] += auc['low'] <= norm.cdf(2 / np.sqrt(2)) <= auc['high']
        covered['independent'] += independent['low'] <= norm.cdf(2 / np.sqrt(2)) <= independent['high']
        detected = scores[targs] > 2 - norm.ppf(0.9)  # with a true sensitivity of 0.9
        size = effective_size(detected, patients[targs])
        rate = wilson_interval(detected.sum(), len(detected), size)
        covered['sensitivity'] += rate['low'] <= 0.9 <= rate['high']
    assert covered['auc'] / trials > 0.92 and covered['sensitivity'] / trials > 0.9
    assert covered['independent'] / trials < 0.8


def test_the_test_of_a_true_null_hypothesis_with_few_patients_rejects_it_rarely():
    rng = np.random.default_rng(8)
    rejected = 0
    for seed in range(200):
        targs, scores, patients = make_images(5, seed)
        first, second = (scores + rng.normal(0, 0.5, 10)[patients] for _ in range(2))
        rejected += compare_clustered_auc(targs, first, second, patients)['p'] < 0.05
    assert rejected / 200 < 0.09
