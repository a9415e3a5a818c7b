"""The threshold by its rule, on validation images alone, with no more margin than they demand."""

import numpy as np
import pandas as pd
import pytest

from cxr_fastai.core.errors import UsageError
from cxr_fastai.evaluation.thresholds import RULES, decide, keep_sensitivity, parse_rule

RNG = np.random.default_rng(0)


def valid(targs, p) -> pd.DataFrame:
    return pd.DataFrame({'label': np.where(targs, 'PNEUMONIA', 'NORMAL'), 'p_pneumonia': p})


def images(n=400, seed=0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targs = rng.random(n) < 0.7
    return targs, 1 / (1 + np.exp(-rng.normal(4 * targs - 2, 1.5)))


def rates(targs, p, threshold) -> tuple[float, float]:
    return (p[targs] >= threshold).mean(), (p[~targs] < threshold).mean()


def test_a_fixed_threshold_is_itself():
    assert decide(valid(*images()), 'fixed:0.37').threshold == 0.37


def test_the_threshold_is_the_highest_that_keeps_the_sensitivity_with_its_margin():
    targs, p = images()
    n, chosen = targs.sum(), decide(valid(targs, p), 'sensitivity:0.95').threshold
    missed = (p[targs] < chosen).sum()
    assert (missed + 1) / (n + 1) <= 0.05 < (missed + 2) / (n + 1)
    higher = np.sort(p[targs])[missed] + 1e-9  # one more image is missed
    assert ((p[targs] < higher).sum() + 1) / (n + 1) > 0.05


def test_new_images_keep_the_sensitivity_on_average_and_no_more_than_the_size_demands():
    kept = []
    for seed in range(300):
        chosen, _ = keep_sensitivity(*images(120, seed), 0.95)
        targs, p = images(4000, seed + 1000)
        kept.append((p[targs] >= chosen).mean())
    assert 0.948 < np.mean(kept) < 0.965


def test_too_few_images_are_all_called_and_it_is_said():
    targs, p = np.arange(16) >= 8, np.r_[np.linspace(0.1, 0.5, 8), np.linspace(0.4, 0.9, 8)]
    found = decide(valid(targs, p), 'sensitivity:0.95')
    assert (p[targs] >= found.threshold).all() and 'too few to show' in found.margin and '0.89' in found.margin


def test_youden_is_the_best_of_all_thresholds():
    targs, p = images()
    best = max(sum(rates(targs, p, threshold)) for threshold in p)
    assert sum(rates(targs, p, decide(valid(targs, p), 'youden').threshold)) == pytest.approx(best)


@pytest.mark.parametrize(('missed', 'alarm'), [(1, 1), (10, 1), (1, 20), (1, 10**6)])
def test_the_cost_is_the_least_of_all_thresholds(missed, alarm):
    targs, p = images()
    cost = lambda threshold: missed * (p[targs] < threshold).sum() + alarm * (p[~targs] >= threshold).sum()
    found = decide(valid(targs, p), f'cost:{missed}/{alarm}').threshold
    assert cost(found) == min(map(cost, [*p, 1.1]))


@pytest.mark.parametrize('rule', ['sensitivity:0.9', 'youden', 'cost:5/1'])
def test_the_number_is_short_and_does_not_hang_on_last_digits(rule):
    targs, p = images()
    found = decide(valid(targs, p), rule).threshold
    near = p + RNG.uniform(-1e-9, 1e-9, len(p))
    assert len(repr(found)) <= 8 and ((p >= found) == (near >= found)).all()


def test_equal_scores_are_called_alike():
    targs, p = np.arange(40) >= 20, np.r_[np.full(20, 0.5), np.full(20, 0.5)]
    assert decide(valid(targs, p), 'sensitivity:0.9').threshold <= 0.5
    assert np.isfinite(decide(valid(targs, np.ones(40)), 'cost:1/9').threshold)


def test_what_the_threshold_does_on_its_images_is_told():
    targs, p = images()
    found = decide(valid(targs, p), 'youden', model='abc')
    sensitivity, specificity = rates(targs, p, found.threshold)
    assert found.valid['n'] == 400 and found.valid['positives'] == targs.sum() and found.model == 'abc'
    assert (found.valid['sensitivity']['value'], found.valid['specificity']['value']) == (sensitivity, specificity)


@pytest.mark.parametrize(
    ('rule', 'says'),
    [
        ('best', 'choose a rule: fixed:T, sensitivity:S, youden, cost:FN/FP'),
        ('fixed', 'a number from 0 to 1: fixed:T'),
        ('fixed:2', 'a number from 0 to 1'),
        ('fixed:x', 'a number from 0 to 1'),
        ('sensitivity:1', 'above 0 and below 1'),
        ('sensitivity:95', 'above 0 and below 1'),
        ('youden:3', 'nothing'),
        ('cost:1', 'two positive numbers'),
        ('cost:0/1', 'two positive numbers'),
        ('cost:1/nan', 'two positive numbers'),
        ('fixed:nan', 'from 0 to 1'),
    ],
)
def test_a_rule_that_is_none_is_refused(rule, says):
    with pytest.raises(UsageError, match=says):
        parse_rule(rule)


def test_a_fixed_threshold_needs_no_second_class():
    found = decide(valid(np.ones(9, bool), np.arange(9) / 9), 'fixed:0.5')
    assert found.threshold == 0.5 and found.temperature == 1 and found.valid['specificity']['value'] is None


def test_the_margin_counts_equal_scores_as_they_are_called():
    found = decide(valid(np.arange(200) >= 100, np.r_[np.linspace(0, 0.9, 100), np.ones(100)]), 'sensitivity:0.95')
    assert found.margin.startswith('100 of 100 validation images of pneumonia are called (1.0000)')


@pytest.mark.parametrize('rule', ['sensitivity:0.95', 'youden', 'cost:1/1'])
def test_one_class_shows_no_threshold(rule):
    assert rule.partition(':')[0] in RULES
    with pytest.raises(UsageError, match='all PNEUMONIA'):
        decide(valid(np.ones(9, bool), np.arange(9) / 9), rule)
