"""What a threshold buys: the numbers behind the curves over all thresholds."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from cxr_fastai.evaluation.bootstrap import draw_patients, rate_draws
from cxr_fastai.evaluation.metrics import Calls, Sample, at_prevalence, truth
from cxr_fastai.inference.temperature import logits

SHOWN = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Thresholds of `threshold_table`."""
BAND_DRAWS = 500
GRID = np.linspace(0, 1, 201)
"""Where a band is drawn."""


def roc_curve(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates along the thresholds, from (0, 0) to (1, 1)."""
    from sklearn.metrics import roc_curve as curve
    fpr, tpr, _ = curve(*truth(predictions))
    return fpr, tpr


def precision_recall(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Sensitivity (recall) and PPV (precision) along the thresholds, from the highest score on."""
    from sklearn.metrics import precision_recall_curve
    precision, recall, _ = precision_recall_curve(*truth(predictions))
    return recall[::-1], precision[::-1]


def roc_band(predictions: pd.DataFrame) -> pd.DataFrame:
    """The middle 95 % of the sensitivities at each false positive rate over the bootstrap of patients, point by point:
    columns x, low, high."""
    tp, fp = rate_draws(*_drawn(predictions))
    return _band(fp/np.maximum(fp[:, -1:], 1), tp/np.maximum(tp[:, -1:], 1))


def precision_recall_band(predictions: pd.DataFrame) -> pd.DataFrame:
    """The middle 95 % of the PPVs at each sensitivity over the bootstrap of patients: columns x, low, high."""
    tp, fp = rate_draws(*_drawn(predictions))
    precision = np.where(tp + fp > 0, tp/np.maximum(tp + fp, 1), 1)  # nothing called: 1, as scikit-learn has it
    return _band(tp/np.maximum(tp[:, -1:], 1), precision)


def threshold_table(predictions: pd.DataFrame, marked: Sequence[float] = (), prevalence: float = 0.1) -> pd.DataFrame:
    """A row for each threshold of `SHOWN` and each `marked` one: threshold, sensitivity, specificity, missed and alarms
    (counts), ppv and npv at `prevalence`, each figure an `Estimate`."""
    sample = Sample.of(predictions)
    rows = []
    for threshold in sorted({*SHOWN, *marked}):
        calls = Calls(sample, threshold)
        rates, values = calls.rates(), at_prevalence(calls, prevalence)
        rows.append((threshold, rates['sensitivity'], rates['specificity'], calls.n['fn'], calls.n['fp'], values['ppv'],
                     values['npv']))
    return pd.DataFrame(rows, columns=['threshold', 'sensitivity', 'specificity', 'missed', 'alarms', 'ppv', 'npv'])


def _drawn(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sample = Sample.of(predictions)
    return draw_patients(sample.patients, BAND_DRAWS), sample.targs, sample.p


def _band(x: np.ndarray, y: np.ndarray) -> pd.DataFrame:
    """Where the middle 95 % of the curves `y` over `x`, (draws, points), lie."""
    curves = np.stack([np.interp(GRID, *curve) for curve in zip(x, y, strict=True)])
    low, high = np.percentile(curves, [2.5, 97.5], axis=0)
    return pd.DataFrame({'x': GRID, 'low': low, 'high': high})


def net_benefit(predictions: pd.DataFrame, odds_at: np.ndarray) -> pd.DataFrame:
    """What acting on the probabilities is worth, in true positives a film, where a false alarm costs the odds of the
    threshold probability (Vickers and Elkin 2006): columns threshold, model, all (everybody is treated)."""
    targs, p = truth(predictions)
    called = p >= odds_at[:, None]
    cost = odds_at/(1 - odds_at)
    model = (called & targs).mean(axis=1) - (called & ~targs).mean(axis=1)*cost
    return pd.DataFrame({'threshold': odds_at, 'model': model, 'all': targs.mean() - (1 - targs.mean())*cost})


def risk_coverage(predictions: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Accuracy when the least certain films are set aside for a human (El-Yaniv and Wiener 2010): columns coverage (the
    share that is kept) and accuracy among it. Certain is what lies far from `threshold` on the logit scale."""
    targs, p = truth(predictions)
    order = np.argsort(-np.abs(logits(p) - logits(threshold)), kind='stable')
    right = ((p >= threshold) == targs)[order]
    kept = np.arange(1, len(p) + 1)
    return pd.DataFrame({'coverage': kept/len(p), 'accuracy': np.cumsum(right)/kept})
