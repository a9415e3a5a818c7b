"""Calibration metrics agree with their definitions and with scikit-learn; temperature scaling keeps the order."""

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import t
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss

from cxr_fastai.evaluation.calibration import (
    calibration_error,
    chance_error,
    fit_temperature,
    measure_calibration,
    recalibrate,
    reliability,
)
from cxr_fastai.inference.config import logits, temper

RNG = np.random.default_rng(0)
P = RNG.random(624)
TARGS = RNG.random(624) < P  # perfectly calibrated
ONE_IMAGE_EACH = np.arange(624)


def error_by_definition(targs, p):
    total = 0
    for low in np.arange(15) / 15:
        inside = (p >= low) & (p < low + 1 / 15)
        if inside.any():
            total += inside.sum() * abs(targs[inside].mean() - p[inside].mean())
    return total / len(p)


def test_the_expected_calibration_error_follows_its_definition():
    assert calibration_error(TARGS, P) == pytest.approx(error_by_definition(TARGS, P))
    assert calibration_error(np.array([True, False]), np.array([1.0, 0.0])) == 0


def test_a_calibrated_model_has_an_error_within_that_expected_by_chance():
    simulated = [error_by_definition(RNG.random(624) < P, P) for _ in range(300)]
    chance = chance_error(P)
    assert chance['chance'] == pytest.approx(np.mean(simulated), abs=0.002)
    assert chance['chance_high'] == pytest.approx(np.percentile(simulated, 95), abs=0.004)
    assert calibration_error(TARGS, P) < chance['chance_high'] < calibration_error(TARGS, temper(P, 0.3))


def test_the_error_expected_by_chance_decreases_with_the_number_of_images():
    assert chance_error(np.tile(P, 16))['chance'] == pytest.approx(chance_error(P)['chance'] / 4, rel=0.05)


def test_slope_and_intercept_are_those_of_logistic_regressions():
    p = expit(2 * logits(P) - 0.5)
    regression = LogisticRegression(C=np.inf, tol=1e-9).fit(logits(p)[:, None], TARGS)
    slope, intercept = recalibrate(TARGS, p, ONE_IMAGE_EACH).values()
    assert slope['value'] == pytest.approx(regression.coef_[0, 0], abs=1e-4) == pytest.approx(0.5, abs=0.1)
    assert slope['low'] < 0.5 < slope['high']
    root = brentq(lambda a: expit(logits(p) + a).sum() - TARGS.sum(), -9, 9)  # the estimating equation
    assert intercept['value'] == pytest.approx(root, abs=1e-6)


def test_a_calibrated_model_has_slope_1_and_intercept_0():
    slope, intercept = recalibrate(TARGS, P, ONE_IMAGE_EACH).values()
    assert slope['low'] < 1 < slope['high'] and intercept['low'] < 0 < intercept['high']


def test_copies_of_the_images_of_a_patient_do_not_narrow_the_interval_of_the_slope():
    images = TARGS[:200], P[:200], ONE_IMAGE_EACH[:200]
    widths = []
    for copies in (1, 3):
        slope = recalibrate(*[np.tile(column, copies) for column in images])['slope']
        widths.append(slope['high'] - slope['low'])
    assert widths[1] == pytest.approx(widths[0], rel=0.02)


@pytest.mark.parametrize(
    ('targs', 'p'),
    [
        (np.array([True, True, False, False]), np.array([0.9, 0.8, 0.2, 0.1])),
        (np.ones(4, bool), np.arange(4) / 4),
        *((np.array([True, False] * 20), np.full(40, p)) for p in (0.5, 0.62, 0.9, 0.0, 1.0)),
    ],
)
def test_the_slope_is_undefined_for_separated_classes_one_class_and_equal_probabilities(targs, p):
    assert recalibrate(targs, p, np.arange(len(p)))['slope']['value'] is None


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
def test_the_temperature_of_scaled_probabilities_is_recovered(temperature):
    p, targs = np.tile(P, 20), RNG.random(624 * 20) < np.tile(P, 20)
    assert fit_temperature(targs, temper(p, 1 / temperature)) == pytest.approx(temperature, rel=0.05)


def test_temperature_scaling_reduces_the_log_loss_on_the_images_that_it_was_fitted_on():
    p = expit(3 * logits(P))
    assert log_loss(TARGS, temper(p, fit_temperature(TARGS, p))) < log_loss(TARGS, p)


@pytest.mark.parametrize('targs', [np.arange(10) > 4, np.ones(10, bool), np.zeros(10, bool)])
def test_the_temperature_is_1_for_separated_classes_and_for_one_class(targs):
    assert fit_temperature(targs, np.arange(10) / 10) == 1


def test_temperature_scaling_keeps_the_order_and_one_half():
    p = np.sort(P)
    assert (np.diff(temper(p, 2.5)) >= 0).all() and temper(0.5, 2.5) == 0.5 and (temper(p, 1) == p).all()
    assert np.isfinite(temper(np.array([0.0, 1.0]), 0.5)).all()


def test_brier_score_and_log_loss_are_those_of_scikit_learn_and_have_intervals():
    metrics = measure_calibration(TARGS, P, ONE_IMAGE_EACH)
    for name, value in (('brier', brier_score_loss(TARGS, P)), ('log_loss', log_loss(TARGS, P))):
        assert metrics[name]['value'] == pytest.approx(value)
        assert metrics[name]['low'] < value < metrics[name]['high']


def test_each_image_is_in_one_bin_of_the_reliability_diagram():
    bins = reliability(TARGS, P, ONE_IMAGE_EACH)
    assert bins.n.sum() == 624 and len(bins) == 10 and bins.p.is_monotonic_increasing
    assert (bins.n * bins.share).sum() == pytest.approx(TARGS.sum()) and (bins.low <= bins.share).all()


def test_equal_probabilities_are_in_the_same_bin_of_the_reliability_diagram():
    bins = reliability(np.array([True, False, True]), np.array([0.5, 0.5, 0.5]), np.arange(3))
    assert bins.n.to_list() == [3]


def test_bins_of_the_reliability_diagram_that_are_close_are_merged():
    p = np.repeat([0.1, 0.11, 0.5, 0.9, 0.93], 10)
    targs = np.arange(50) % 2 == 0
    apart = reliability(targs, p, np.arange(50), bins=5)
    merged = reliability(targs, p, np.arange(50), bins=5, min_distance=0.05)
    assert apart.n.sum() == merged.n.sum() == 50 and len(apart) > len(merged)
    assert merged.p.to_list() == pytest.approx([0.105, 0.5, 0.915])
    assert merged.share.to_list() == [0.5, 0.5, 0.5]


def test_intervals_of_slope_and_intercept_are_those_of_statsmodels_with_quantiles_of_t():
    patients = np.arange(624) // 8
    z = logits(P)
    fits = [
        sm.GLM(TARGS * 1.0, x, sm.families.Binomial(), offset=offset).fit(
            cov_type='cluster', cov_kwds={'groups': patients}
        )
        for x, offset in ((np.column_stack([z, np.ones(624)]), None), (np.ones((624, 1)), z))
    ]
    quantile = t.ppf(0.975, 77)
    for estimate, fit, tolerance in zip(recalibrate(TARGS, P, patients).values(), fits, (1e-6, 0.03), strict=True):
        limits = fit.params[0] + quantile * fit.bse[0] * np.array([-1, 1])
        assert [estimate['low'], estimate['high']] == pytest.approx(limits, abs=tolerance)


def test_the_intercept_is_defined_where_probabilities_are_exactly_0_and_1():
    extreme = (P > 0.5).astype(float)
    for p in (extreme, np.where(P > 0.9, 1.0, P), np.where(P < 0.1, 1e-20, P)):
        intercept = recalibrate(TARGS, p, ONE_IMAGE_EACH)['intercept']
        assert intercept['low'] < intercept['value'] < intercept['high']
        assert expit(logits(p) + intercept['value']).sum() == pytest.approx(TARGS.sum())
        (note,) = measure_calibration(TARGS, p, ONE_IMAGE_EACH)['notes']
        assert 'Logits are limited to ±34.5' in note


@pytest.mark.parametrize(
    ('targs', 'p', 'reason'),
    [
        (TARGS, np.full(624, 0.3), 'all probabilities are nearly equal'),
        (TARGS, 0.3 + 1e-6 * P, 'all probabilities are nearly equal'),
        (TARGS, np.where(TARGS, 0.8, 0.4), 'separate the classes completely'),
        (TARGS, np.where(TARGS, P, -P) / 4 + 0.5, 'separate the classes completely'),
        (TARGS, np.where(TARGS, 0.4, 0.8), 'separate the classes completely'),  # the wrong way round
        (
            TARGS,
            np.where(TARGS | (np.cumsum(~TARGS) == 1), 0.8, 0.4),
            'separate the classes completely',
        ),  # ties
        (TARGS, 0.6 + 0.01 * P, 'these images do not determine it (it, or half its interval, is beyond 20)'),
        (TARGS[:12], 0.3 + 0.03 * P[:12], 'these images do not determine it'),
        (np.ones(624, bool), P, 'a single class'),
    ],
)
def test_a_note_says_why_the_slope_is_undefined(targs, p, reason):
    metrics = measure_calibration(targs, p, np.arange(len(p)))
    assert metrics['slope']['value'] is None and reason in ' '.join(metrics['notes'])


def test_a_slope_that_the_images_determine_is_reported_though_it_is_large():
    slope = recalibrate(TARGS, expit(logits(P) / 15), ONE_IMAGE_EACH)['slope']
    assert slope['value'] == pytest.approx(15, abs=3) and slope['low'] < 15 < slope['high']


def test_a_network_with_ordinary_probabilities_has_no_notes():
    assert measure_calibration(TARGS, P, ONE_IMAGE_EACH)['notes'] == []


def test_the_interval_of_a_brier_score_covers_the_true_value_with_few_patients():
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        patients = np.arange(80) // 10
        p = expit(rng.normal(0, 1.5, 8)[patients] + rng.normal(0, 0.5, 80))
        brier = measure_calibration(rng.random(80) < p, p, patients)['brier']
        covered += brier['low'] <= 0.172 <= brier['high']  # the mean of p (1 - p)
    assert covered / 200 > 0.9


def test_intervals_of_the_reliability_diagram_account_for_patients():
    own, grouped = (reliability(TARGS, P, patients) for patients in (ONE_IMAGE_EACH, np.arange(624) // 60))
    assert (own.share == grouped.share).all() and (grouped.high - grouped.low).mean() > (own.high - own.low).mean()
    assert reliability(TARGS, P, np.zeros(624)).low.isna().all()
