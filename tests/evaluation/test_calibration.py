"""Calibration is measured as scikit-learn and statsmodels would, and mended without changing an order."""

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import expit
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
from cxr_fastai.evaluation.intervals import draw_patients
from cxr_fastai.inference.config import logits, temper

RNG = np.random.default_rng(0)
P = RNG.random(624)
TARGS = RNG.random(624) < P  # perfectly calibrated
ALONE = np.arange(624)


def error_by_hand(targs, p):
    total = 0
    for low in np.arange(15) / 15:
        inside = (p >= low) & (p < low + 1 / 15)
        if inside.any():
            total += inside.sum() * abs(targs[inside].mean() - p[inside].mean())
    return total / len(p)


def test_the_error_is_that_of_its_definition():
    assert calibration_error(TARGS, P) == pytest.approx(error_by_hand(TARGS, P))
    assert calibration_error(np.array([True, False]), np.array([1.0, 0.0])) == 0


def test_chance_gives_an_error_too_and_a_calibrated_model_has_no_more():
    simulated = [error_by_hand(RNG.random(624) < P, P) for _ in range(300)]
    chance = chance_error(P)
    assert chance['chance'] == pytest.approx(np.mean(simulated), abs=0.002)
    assert chance['chance_high'] == pytest.approx(np.percentile(simulated, 95), abs=0.004)
    assert calibration_error(TARGS, P) < chance['chance_high'] < calibration_error(TARGS, temper(P, 0.3))


def test_the_null_band_shrinks_with_images():
    assert chance_error(np.tile(P, 16))['chance'] == pytest.approx(chance_error(P)['chance'] / 4, rel=0.05)


def test_slope_and_intercept_are_those_of_their_regressions():
    p = expit(2 * logits(P) - 0.5)
    fitted = LogisticRegression(C=np.inf, tol=1e-9).fit(logits(p)[:, None], TARGS)
    found = recalibrate(TARGS, p, ALONE)
    assert found['slope']['value'] == pytest.approx(fitted.coef_[0, 0], abs=1e-4) == pytest.approx(0.5, abs=0.1)
    large = brentq(lambda a: expit(logits(p) + a).sum() - TARGS.sum(), -9, 9)  # its estimating equation
    assert found['intercept']['value'] == pytest.approx(large, abs=1e-6)
    assert found['slope']['low'] < 0.5 < found['slope']['high']


def test_a_calibrated_model_has_slope_one_and_intercept_nought():
    slope, intercept = recalibrate(TARGS, P, ALONE).values()
    assert slope['low'] < 1 < slope['high'] and intercept['low'] < 0 < intercept['high']


def test_copied_images_of_a_patient_do_not_make_a_slope_surer():
    once = recalibrate(TARGS[:200], P[:200], ALONE[:200])
    thrice = recalibrate(np.tile(TARGS[:200], 3), np.tile(P[:200], 3), np.tile(ALONE[:200], 3))
    width = lambda found: found['slope']['high'] - found['slope']['low']
    assert width(thrice) == pytest.approx(width(once), rel=0.02)


@pytest.mark.parametrize(
    ('targs', 'p'),
    [
        (np.array([True, True, False, False]), np.array([0.9, 0.8, 0.2, 0.1])),
        (np.ones(4, bool), np.arange(4) / 4),
        *((np.array([True, False] * 20), np.full(40, p)) for p in (0.5, 0.62, 0.9, 0.0, 1.0)),
    ],
)
def test_slopes_that_do_not_exist_are_undefined(targs, p):
    assert recalibrate(targs, p, np.arange(len(p)))['slope']['value'] is None


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
def test_the_temperature_is_found(temperature):
    p, targs = np.tile(P, 20), RNG.random(624 * 20) < np.tile(P, 20)
    assert fit_temperature(targs, temper(p, 1 / temperature)) == pytest.approx(temperature, rel=0.05)


def test_a_temperature_never_worsens_the_log_loss_where_it_was_fitted():
    p = expit(3 * logits(P))
    assert log_loss(TARGS, temper(p, fit_temperature(TARGS, p))) < log_loss(TARGS, p)


@pytest.mark.parametrize('targs', [np.arange(10) > 4, np.ones(10, bool), np.zeros(10, bool)])
def test_where_no_temperature_is_the_best_it_changes_nothing(targs):
    assert fit_temperature(targs, np.arange(10) / 10) == 1


def test_tempering_keeps_order_and_one_half():
    p = np.sort(P)
    assert (np.diff(temper(p, 2.5)) >= 0).all() and temper(0.5, 2.5) == 0.5 and (temper(p, 1) == p).all()
    assert np.isfinite(temper(np.array([0.0, 1.0]), 0.5)).all()


def test_brier_score_and_log_loss_are_scikit_learns_with_intervals():
    found = measure_calibration(TARGS, P, ALONE, draw_patients(ALONE))
    for name, value in (('brier', brier_score_loss(TARGS, P)), ('log_loss', log_loss(TARGS, P))):
        assert found[name]['value'] == pytest.approx(value) and found[name]['low'] < value < found[name]['high']


def test_reliability_has_every_image_once():
    bins = reliability(TARGS, P)
    assert bins.n.sum() == 624 and len(bins) == 10 and bins.p.is_monotonic_increasing
    assert (bins.n * bins.share).sum() == pytest.approx(TARGS.sum()) and (bins.low <= bins.share).all()
    few = reliability(np.array([True, False, True]), np.array([0.5, 0.5, 0.5]))
    assert few.n.to_list() == [3]
