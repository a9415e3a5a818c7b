"""Every figure against an independent implementation or golden values, and never without its interval."""

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import binomtest, norm
from sklearn import metrics as sk

from cxr_fastai.evaluation.intervals import (
    compare_auc,
    describe,
    difference,
    f1,
    predictive_values,
    proportion,
    roc_auc,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ('k', 'n', 'low', 'high'),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (390, 390, 0.9902, 1),
    ],
)
def test_wilsons_golden_values(k, n, low, high):
    assert list(proportion(k, n).values()) == pytest.approx([k / n, low, high], abs=5e-5)


def test_wilsons_interval_is_scipys():
    for k, n in RNG.integers(1, 500, (50, 2)):
        k = min(k, n)
        scipy = binomtest(k, n).proportion_ci(method='wilson')
        assert list(proportion(k, n).values()) == pytest.approx([k / n, scipy.low, scipy.high], abs=1e-12)


def test_fewer_effective_images_widen_an_interval_and_keep_its_value():
    whole, half = proportion(90, 100), proportion(90, 100, 50)
    assert half['value'] == whole['value'] and half['low'] < whole['low'] and half['high'] > whole['high']
    assert half['low'] == pytest.approx(proportion(45, 50)['low'])


def test_nothing_of_nothing_is_undefined():
    assert proportion(0, 0) == f1(0, 0, 0) == {'value': None, 'low': None, 'high': None}


def test_the_auc_is_scikit_learns_also_with_ties():
    for n in (10, 60, 624):
        targs, p = RNG.random(n) < 0.6, RNG.random(n).round(1 if n == 60 else 9)
        assert roc_auc(targs, p)['value'] == pytest.approx(sk.roc_auc_score(targs, p), abs=1e-12)


def wins(targs, p):
    """Each positive against each negative: (m, n) of 1, .5 and 0."""
    return (np.sign(np.subtract.outer(p[targs], p[~targs])) + 1) / 2


def test_delongs_interval_is_the_one_of_its_definition():
    targs = np.arange(80) < 50
    p = np.clip(RNG.normal(0.4 + 0.3 * targs, 0.2), 0, 1).round(2)
    auc = wins(targs, p).mean()
    variance = wins(targs, p).mean(1).var(ddof=1) / 50 + wins(targs, p).mean(0).var(ddof=1) / 30
    half = 1.959964 * np.sqrt(variance) / (auc * (1 - auc))
    assert list(roc_auc(targs, p).values()) == pytest.approx([auc, expit(logit(auc) - half), expit(logit(auc) + half)])


def test_delongs_paired_test_is_the_one_of_its_definition():
    targs = np.arange(90) < 40
    a = np.clip(RNG.normal(0.4 + 0.3 * targs, 0.2), 0, 1).round(2)
    b = np.clip(a + RNG.normal(0, 0.15, 90), 0, 1)
    above = np.cov(np.stack([wins(targs, a).mean(1), wins(targs, b).mean(1)]))
    below = np.cov(np.stack([wins(targs, a).mean(0), wins(targs, b).mean(0)]))
    covariance = above / 40 + below / 50
    gap = wins(targs, a).mean() - wins(targs, b).mean()
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    found = compare_auc(targs, a, b)
    assert found['value'] == pytest.approx(gap) and found['p'] == pytest.approx(2 * norm.sf(abs(gap) / error))
    assert [found['low'], found['high']] == pytest.approx([gap - 1.959964 * error, gap + 1.959964 * error])


def test_a_paired_test_is_fair_where_there_is_no_difference():
    rng, targs = np.random.default_rng(1), np.arange(120) < 60
    p = []
    for _ in range(400):
        truth = rng.normal(targs * 1.2, 1)
        p.append(compare_auc(targs, truth + rng.normal(0, 1, 120), truth + rng.normal(0, 1, 120))['p'])
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.085  # 5 % but for the chance of 400 trials


def test_a_curve_does_not_differ_from_itself():
    targs, p = np.arange(40) < 20, RNG.random(40)
    assert compare_auc(targs, p, p) == {'value': 0, 'low': None, 'high': None, 'p': 1}
    assert compare_auc(np.ones(4, bool), p[:4], p[:4])['p'] is None
    assert difference(0.1, 0) == {'value': 0.1, 'low': None, 'high': None, 'p': None}  # nothing varies


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
    assert few['value'] == pytest.approx(many['value']) == pytest.approx(16 / 19)
    assert few['low'] < many['low'] < many['value'] < many['high'] < few['high']


@pytest.mark.parametrize(('prevalence', 'ppv'), [(0.625, 0.942), (0.1, 0.521), (0.02, 0.167)])
def test_predictive_values_golden(prevalence, ppv):
    found, _ = predictive_values(proportion(98, 100), proportion(90, 100), 100, 100, prevalence)
    assert found['value'] == pytest.approx(ppv, abs=5e-4)


def test_predictive_values_are_those_of_the_images_at_their_own_prevalence():
    ppv, npv = predictive_values(proportion(180, 200), proportion(70, 100), 200, 100, 200 / 300)
    assert ppv['value'] == pytest.approx(180 / 210) and npv['value'] == pytest.approx(70 / 90)


def test_predictive_values_of_perfect_rates_are_not_certain():
    ppv, npv = predictive_values(proportion(50, 50), proportion(50, 50), 50, 50, 0.1)
    assert ppv['value'] == npv['value'] == ppv['high'] == 1 and ppv['low'] < 0.8 and 0.9 < npv['low'] < 1
    nothing, _ = predictive_values(proportion(0, 50), proportion(50, 50), 50, 50, 0.1)
    assert nothing['value'] is None  # no image is called pneumonia


@pytest.mark.parametrize('specificity', [0.9, 0.97, 0.99])
def test_the_intervals_of_predictive_values_cover(specificity):
    rng, truth = np.random.default_rng(2), 0.95 * 0.1 / (0.95 * 0.1 + (1 - specificity) * 0.9)
    hits = []
    for tp, tn in zip(rng.binomial(390, 0.95, 1000), rng.binomial(234, specificity, 1000), strict=True):
        ppv, _ = predictive_values(proportion(tp, 390), proportion(tn, 234), 390, 234, 0.1)
        hits.append(ppv['low'] <= truth <= ppv['high'])
    assert 0.93 < np.mean(hits) < 0.985


@pytest.mark.parametrize(
    ('estimate', 'said'),
    [
        ({'value': None, 'low': None, 'high': None}, 'undefined'),
        ({'value': 0.5, 'low': None, 'high': None}, '0.500'),
        ({'value': 0.5, 'low': 0.25, 'high': 0.75}, '0.500 (0.250 to 0.750)'),
    ],
)
def test_an_estimate_is_said_with_its_interval(estimate, said):
    assert describe(estimate) == said
