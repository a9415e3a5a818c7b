"""The numbers behind the curves, by hand."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from cxr_fastai.evaluation.thresholds import (
    SHOWN,
    net_benefit,
    precision_recall,
    precision_recall_band,
    risk_coverage,
    roc_band,
    roc_curve,
    threshold_table,
)

RNG = np.random.default_rng(0)
TARGS = RNG.random(200) < 0.6
P = np.clip(RNG.normal(0.35 + 0.3 * TARGS, 0.2), 0.001, 0.999)
IMAGES = pd.DataFrame(
    {'label': np.where(TARGS, 'PNEUMONIA', 'NORMAL'), 'p_pneumonia': P, 'patient': np.arange(200) // 2}
)


def test_the_area_under_the_curves_is_that_of_the_metrics():
    assert np.trapezoid(*roc_curve(IMAGES)[::-1]) == pytest.approx(sk.roc_auc_score(TARGS, P))
    recall, precision = precision_recall(IMAGES)
    assert (np.diff(recall) * precision[1:]).sum() == pytest.approx(sk.average_precision_score(TARGS, P))


@pytest.mark.parametrize(('band', 'curve'), [(roc_band, roc_curve), (precision_recall_band, precision_recall)])
def test_a_band_holds_the_middle_of_its_curve(band, curve):
    found, (x, y) = band(IMAGES), curve(IMAGES)
    inside = (found.x > 0.1) & (found.x < 0.9)
    along = np.interp(found.x, x, y)
    assert (found.low <= found.high).all()
    assert ((found.low <= along + 0.02) & (along <= found.high + 0.02))[inside].all()
    assert 0.01 < (found.high - found.low)[inside].mean() < 0.3


def test_the_threshold_table_counts():
    found = threshold_table(IMAGES, marked=[0.37])
    assert found.threshold.to_list() == sorted({*SHOWN, 0.37})
    row = found[found.threshold == 0.37].iloc[0]
    assert row.missed == (TARGS & (P < 0.37)).sum() and row.alarms == (~TARGS & (P >= 0.37)).sum()
    assert row.sensitivity['value'] == pytest.approx((P[TARGS] >= 0.37).mean())
    assert found.missed.is_monotonic_increasing and found.alarms.is_monotonic_decreasing


def test_net_benefit_is_that_of_its_definition():
    found = net_benefit(IMAGES, np.array([0.2, 0.5])).iloc[0]
    tp, fp = (TARGS & (P >= 0.2)).sum(), (~TARGS & (P >= 0.2)).sum()
    assert found.model == pytest.approx(tp / 200 - fp / 200 * 0.2 / 0.8)
    assert found['all'] == pytest.approx(TARGS.mean() - (1 - TARGS.mean()) * 0.25)


def test_the_least_certain_images_are_set_aside_first():
    found = risk_coverage(IMAGES, 0.4)
    assert found.coverage.iloc[-1] == 1 and found.accuracy.iloc[-1] == pytest.approx(((P >= 0.4) == TARGS).mean())
    odds = np.abs(np.log(P / (1 - P)) - np.log(0.4 / 0.6))
    half = np.argsort(-odds)[:100]
    assert found.accuracy.iloc[99] == pytest.approx(((P >= 0.4) == TARGS)[half].mean())
