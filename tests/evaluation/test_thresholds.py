"""Rules choose the threshold on the validation images, and trade-offs over all thresholds follow their definitions."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.evaluation.metrics import Sample, measure
from cxr_fastai.evaluation.thresholds import (
    RULES,
    TABLE_THRESHOLDS,
    decide,
    keep_sensitivity,
    net_benefit,
    parse_rule,
    precision_recall_band,
    precision_recall_curve,
    risk_coverage,
    roc_band,
    roc_curve,
    threshold_table,
)


def make_table(targs, p) -> pd.DataFrame:
    return pd.DataFrame({'label': np.where(targs, 'PNEUMONIA', 'NORMAL'), 'p_pneumonia': p})


def make_predictions(n=400, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Targets and probabilities of `n` images."""
    rng = np.random.default_rng(seed)
    targs = rng.random(n) < 0.7
    return targs, 1 / (1 + np.exp(-rng.normal(4 * targs - 2, 1.5)))


def sensitivity_and_specificity(targs, p, threshold) -> tuple[float, float]:
    return (p[targs] >= threshold).mean(), (p[~targs] < threshold).mean()


def test_a_fixed_threshold_is_used_as_given():
    assert decide(make_table(*make_predictions()), 'fixed:0.37').threshold == 0.37


def test_the_sensitivity_rule_chooses_the_highest_threshold_that_keeps_the_expected_sensitivity():
    targs, p = make_predictions()
    n = targs.sum()
    threshold = decide(make_table(targs, p), 'sensitivity:0.95').threshold
    missed = (p[targs] < threshold).sum()
    assert (missed + 1) / (n + 1) <= 0.05 < (missed + 2) / (n + 1)
    higher = np.sort(p[targs])[missed] + 1e-9  # misses one more image
    assert ((p[targs] < higher).sum() + 1) / (n + 1) > 0.05


def test_new_images_keep_the_sensitivity_on_average_with_a_small_margin():
    sensitivities = []
    for seed in range(300):
        targs, p = make_predictions(120, seed)
        threshold, _ = keep_sensitivity(Sample(targs, p, np.arange(120).astype(str)), 0.95)
        targs, p = make_predictions(4000, seed + 1000)
        sensitivities.append((p[targs] >= threshold).mean())
    assert 0.948 < np.mean(sensitivities) < 0.965


def new_patients(rng, images_per_patient) -> Sample:
    """Pneumonia images of as many patients as there are numbers of images; half of their variance is shared."""
    patients = np.repeat(np.arange(len(images_per_patient)), images_per_patient)
    z = rng.normal(1, 1, len(images_per_patient))[patients] + rng.normal(1, 1, len(patients))
    return Sample(np.ones(len(patients), bool), 1 / (1 + np.exp(-z)), patients.astype(str))


@pytest.mark.parametrize(
    'images_per_patient',
    [np.full(40, 20), np.r_[400, np.full(39, 10)], np.full(19, 3)],
    ids=['many images', 'one patient has half of the images', 'as few patients as possible'],
)
def test_images_of_new_patients_keep_the_sensitivity_on_average(images_per_patient):
    rng = np.random.default_rng(0)
    sensitivities = []
    for _ in range(200):
        threshold, margin = keep_sensitivity(new_patients(rng, images_per_patient), 0.95)
        sensitivities.append((new_patients(rng, np.full(400, 2)).p >= threshold).mean())
        assert 'Warning' not in margin
    assert np.mean(sensitivities) > 0.945


def test_a_patient_with_many_images_does_not_decide_the_threshold():
    few = np.r_[np.linspace(0.1, 0.2, 39), np.full(39, 0.9)]
    patients = np.r_[np.zeros(39), np.arange(1, 40)].astype(str)  # the low scores are all of one patient
    sample = Sample(np.ones(78, bool), few, patients)
    by_image = Sample(sample.targs, sample.p, np.arange(78).astype(str))
    threshold, _ = keep_sensitivity(sample, 0.95)
    assert (few < threshold).sum() == 39 and (few < keep_sensitivity(by_image, 0.95)[0]).sum() == 2


def test_many_images_of_few_patients_are_too_few_and_the_margin_says_so():
    rng = np.random.default_rng(1)
    sample = new_patients(rng, np.full(10, 20))
    threshold, margin = keep_sensitivity(sample, 0.95)
    assert (sample.p >= threshold).all()
    assert margin.startswith('Warning: 10 patients') and 'requires 19' in margin and 'at least 0.909' in margin
    assert 'Warning' not in keep_sensitivity(new_patients(rng, np.full(19, 20)), 0.95)[1]
    assert keep_sensitivity(new_patients(rng, np.full(18, 20)), 0.95)[1].startswith('Warning')


def test_the_margin_promises_nothing_about_patients_who_are_unknown():
    targs, p = make_predictions()
    margin = decide(make_table(targs, p), 'sensitivity:0.95').margin
    assert 'for a new image, estimated from 257 images' in margin and 'Their patients are unknown' in margin
    some = make_table(targs, p).assign(patient=[f'unknown:{n}' if n < 300 else f'{n}' for n in range(400)])
    assert 'of these patients are single images whose patient is unknown' in decide(some, 'sensitivity:0.95').margin
    known = make_table(targs, p).assign(patient=range(400))
    decision = decide(known, 'sensitivity:0.95')
    assert 'unknown' not in decision.margin
    assert decision.valid['patients'] == 400 and decision.valid['unknown_patients'] == 0


def test_with_too_few_images_all_pneumonias_are_detected_and_the_margin_says_so():
    targs = np.arange(16) >= 8
    p = np.r_[np.linspace(0.1, 0.5, 8), np.linspace(0.4, 0.9, 8)]
    decision = decide(make_table(targs, p), 'sensitivity:0.95')
    assert (p[targs] >= decision.threshold).all()
    assert 'too few for a sensitivity of 0.95' in decision.margin and 'new image is at least 0.888' in decision.margin


def test_the_margin_counts_images_with_equal_scores():
    targs = np.arange(200) >= 100
    p = np.r_[np.linspace(0, 0.9, 100), np.ones(100)]
    margin = decide(make_table(targs, p), 'sensitivity:0.95').margin
    assert margin.startswith('100 of 100 validation images of pneumonia are classified as pneumonia (1.000)')


def test_a_temperature_at_the_limit_of_its_range_comes_with_a_warning():
    targs = np.arange(12) >= 6
    p = np.r_[np.linspace(0.48, 0.49, 6), np.linspace(0.4899, 0.6, 6)]  # almost separated
    with pytest.warns(CXRWarning, match=r'The temperature 0\.05 is at the limit of its range'):
        decision = decide(make_table(targs, p), 'fixed:0.5')
    metrics = measure(make_table(targs, p), 0.5, 'fixed:0.5', decision.temperature)
    assert any('at the limit of its range' in note for note in metrics['calibrated']['notes'])


def test_youden_chooses_the_best_of_all_thresholds():
    targs, p = make_predictions()
    best = max(sum(sensitivity_and_specificity(targs, p, threshold)) for threshold in p)
    threshold = decide(make_table(targs, p), 'youden').threshold
    assert sum(sensitivity_and_specificity(targs, p, threshold)) == pytest.approx(best)


@pytest.mark.parametrize(('missed_cost', 'alarm_cost'), [(1, 1), (10, 1), (1, 20), (1, 10**6)])
def test_the_cost_rule_chooses_the_least_cost_of_all_thresholds(missed_cost, alarm_cost):
    targs, p = make_predictions()

    def cost(threshold):
        return missed_cost * (p[targs] < threshold).sum() + alarm_cost * (p[~targs] >= threshold).sum()

    threshold = decide(make_table(targs, p), f'cost:{missed_cost}/{alarm_cost}').threshold
    assert cost(threshold) == min(map(cost, [*p, 1.1]))


@pytest.mark.parametrize('rule', ['sensitivity:0.9', 'youden', 'cost:5/1'])
def test_the_threshold_is_short_and_does_not_depend_on_the_last_digits_of_a_score(rule):
    targs, p = make_predictions()
    threshold = decide(make_table(targs, p), rule).threshold
    nearly_p = p + np.random.default_rng(0).uniform(-1e-9, 1e-9, len(p))
    assert len(repr(threshold)) <= 8 and ((p >= threshold) == (nearly_p >= threshold)).all()


def test_images_with_equal_scores_get_the_same_class():
    targs = np.arange(40) >= 20
    assert decide(make_table(targs, np.full(40, 0.5)), 'sensitivity:0.9').threshold <= 0.5
    assert np.isfinite(decide(make_table(targs, np.ones(40)), 'cost:1/9').threshold)


def test_a_decision_contains_the_performance_on_the_validation_images():
    targs, p = make_predictions()
    decision = decide(make_table(targs, p), 'youden', model='abc')
    valid = decision.valid
    rates = sensitivity_and_specificity(targs, p, decision.threshold)
    assert valid['n'] == 400 and valid['positives'] == targs.sum() and decision.model == 'abc'
    assert (valid['sensitivity']['value'], valid['specificity']['value']) == rates


@pytest.mark.parametrize(
    ('rule', 'message'),
    [
        ('best', 'Choose one of fixed:T, sensitivity:S, youden, cost:FN/FP'),
        ('fixed', 'a number from 0 to 1. Write fixed:T'),
        ('fixed:2', 'a number from 0 to 1'),
        ('fixed:x', 'a number from 0 to 1'),
        ('sensitivity:1', 'above 0 and below 1'),
        ('sensitivity:95', 'above 0 and below 1'),
        ('youden:3', 'no number'),
        ('cost:1', 'two positive numbers'),
        ('cost:0/1', 'two positive numbers'),
        ('cost:1/nan', 'two positive numbers'),
        ('fixed:nan', 'from 0 to 1'),
    ],
)
def test_an_invalid_rule_is_refused(rule, message):
    with pytest.raises(UsageError, match=message):
        parse_rule(rule)


def test_a_fixed_threshold_needs_only_one_class():
    decision = decide(make_table(np.ones(9, bool), np.arange(9) / 9), 'fixed:0.5')
    assert decision.threshold == 0.5 and decision.temperature == 1
    assert decision.valid['specificity']['value'] is None


@pytest.mark.parametrize('rule', ['sensitivity:0.95', 'youden', 'cost:1/1'])
def test_other_rules_need_both_classes(rule):
    assert rule.partition(':')[0] in RULES
    with pytest.raises(UsageError, match='all PNEUMONIA'):
        decide(make_table(np.ones(9, bool), np.arange(9) / 9), rule)


RNG = np.random.default_rng(0)
TARGS = RNG.random(200) < 0.6
P = np.clip(RNG.normal(0.35 + 0.3 * TARGS, 0.2), 0.001, 0.999)
PREDICTIONS = make_table(TARGS, P).assign(patient=np.arange(200) // 2)


def test_the_areas_under_the_curves_are_those_of_scikit_learn():
    fpr, tpr = roc_curve(PREDICTIONS)
    assert np.trapezoid(tpr, fpr) == pytest.approx(sk.roc_auc_score(TARGS, P))
    recall, precision = precision_recall_curve(PREDICTIONS)
    average_precision = (np.diff(recall) * precision[1:]).sum()
    assert average_precision == pytest.approx(sk.average_precision_score(TARGS, P))


@pytest.mark.parametrize(('band', 'curve'), [(roc_band, roc_curve), (precision_recall_band, precision_recall_curve)])
def test_a_bootstrap_band_contains_its_curve(band, curve):
    limits = band(PREDICTIONS)
    x, y = curve(PREDICTIONS)
    middle = (limits.x > 0.1) & (limits.x < 0.9)
    curve_at_x = np.interp(limits.x, x, y)
    assert (limits.low <= limits.high).all()
    assert ((limits.low <= curve_at_x + 0.02) & (curve_at_x <= limits.high + 0.02))[middle].all()
    assert 0.01 < (limits.high - limits.low)[middle].mean() < 0.3


def test_the_threshold_table_counts_missed_pneumonias_and_false_alarms():
    table = threshold_table(PREDICTIONS, marked=[0.37])
    assert table.threshold.to_list() == sorted({*TABLE_THRESHOLDS, 0.37})
    row = table[table.threshold == 0.37].iloc[0]
    assert row.missed == (TARGS & (P < 0.37)).sum() and row.alarms == (~TARGS & (P >= 0.37)).sum()
    assert row.sensitivity['value'] == pytest.approx((P[TARGS] >= 0.37).mean())
    assert table.missed.is_monotonic_increasing and table.alarms.is_monotonic_decreasing


def test_net_benefit_follows_its_definition():
    row = net_benefit(PREDICTIONS, np.array([0.2, 0.5])).iloc[0]
    tp = (TARGS & (P >= 0.2)).sum()
    fp = (~TARGS & (P >= 0.2)).sum()
    assert row.model == pytest.approx(tp / 200 - fp / 200 * 0.2 / 0.8)
    assert row['all'] == pytest.approx(TARGS.mean() - (1 - TARGS.mean()) * 0.25)


def test_the_least_certain_images_are_left_out_first():
    curve = risk_coverage(PREDICTIONS, 0.4)
    correct = (P >= 0.4) == TARGS
    assert curve.coverage.iloc[-1] == 1 and curve.accuracy.iloc[-1] == pytest.approx(correct.mean())
    distance = np.abs(np.log(P / (1 - P)) - np.log(0.4 / 0.6))
    most_certain_half = np.argsort(-distance)[:100]
    assert curve.accuracy.iloc[99] == pytest.approx(correct[most_certain_half].mean())


@pytest.mark.parametrize('rule', ['0.3', '30%'])
def test_a_number_alone_is_no_rule_and_the_error_says_how_to_write_it(rule):
    with pytest.raises(UsageError, match=r'unknown rule.* for a fixed threshold, write fixed:0\.3'):
        parse_rule(rule)
