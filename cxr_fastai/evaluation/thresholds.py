"""How a probability becomes a decision: threshold and temperature, chosen on validation images alone, by a rule.

fixed:0.5          the number itself
sensitivity:0.95   the highest threshold that keeps this sensitivity, with the margin that few images demand
youden             the greatest sensitivity + specificity
cost:10/1          the least cost, where a missed pneumonia costs 10 and a false alarm 1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from cxr_fastai.core.errors import UsageError
from cxr_fastai.evaluation.calibration import fit_temperature
from cxr_fastai.evaluation.intervals import draw_patients, rate_draws
from cxr_fastai.evaluation.metrics import SHARES, TARGETS, Calls, Sample, at_prevalence, truth
from cxr_fastai.inference.config import logits
from cxr_fastai.inference.decision import Decision

DEFAULT = 'sensitivity:0.95'
DIGITS = range(2, 18)
"""Decimals that a threshold may have; as few as tell it from the scores on both sides."""


def decide(valid: pd.DataFrame, rule: str, model: str = '') -> Decision:
    """The threshold that `rule` chooses on `valid`, a predictions table, and the temperature fitted there.

    Raises `UsageError` for a rule that does not exist, and for one that needs images of both classes and has not.
    """
    choose, numbers = parse_rule(rule)
    sample = Sample.of(valid)
    targs, p = sample.targs, sample.p
    if choose is not fixed and (targs.all() or not targs.any()):
        raise UsageError(
            f'--threshold {rule}: the validation images are all {valid.label.iloc[0]}, which shows no '
            'threshold: use images of both classes.'
        )
    threshold, margin = choose(targs, p, *numbers)
    calls = Calls(sample, threshold)
    found = {'n': len(p), 'positives': int(targs.sum()), **{name: calls.share(*SHARES[name]) for name in TARGETS}}
    return Decision(threshold, rule, fit_temperature(targs, p), model, margin, found)


def fixed(targs: np.ndarray, p: np.ndarray, threshold: float) -> tuple[float, str]:
    """The `threshold` itself."""
    return threshold, ''


def keep_sensitivity(targs: np.ndarray, p: np.ndarray, target: float) -> tuple[float, str]:
    """The highest threshold at which the next pneumonia is called with a probability of at least `target`.

    Of n positive scores a new one, exchangeable with them, falls below the j-th lowest with a probability of j/(n + 1)
    (the order statistics of conformal prediction; Vovk, Gammerman and Shafer 2005). So j is the largest number with
    j/(n + 1) <= 1 - target: no more margin than n images demand.
    """
    n = int(targs.sum())
    wanted = math.floor((1 - target) * (n + 1) + 1e-9)
    j = max(wanted, 1)
    threshold = _below(np.sort(p[targs])[j - 1], p)
    if not wanted:
        return threshold, (
            f'{n} validation images of pneumonia are too few to show a sensitivity of '
            f'{target:g}: all are called, and {n / (n + 1):.2f} is to be expected of others.'
        )
    called = int((p[targs] >= threshold).sum())
    return threshold, (
        f'{called} of {n} validation images of pneumonia are called ({called / n:.4f}), so that at least '
        f'{1 - j / (n + 1):.4f} are to be expected of others: the margin for {n} images.'
    )


def youden(targs: np.ndarray, p: np.ndarray) -> tuple[float, str]:
    """The threshold of the greatest sensitivity + specificity (Youden 1950); the lowest where it ties."""
    return _best(targs, p, lambda missed, alarms: missed / targs.sum() + alarms / (~targs).sum()), ''


def least_cost(targs: np.ndarray, p: np.ndarray, missed_cost: float, alarm_cost: float) -> tuple[float, str]:
    """The threshold of the least cost at the prevalence of these images; the lowest where it ties."""
    return _best(targs, p, lambda missed, alarms: missed_cost * missed + alarm_cost * alarms), (
        f'The least cost at a prevalence of {targs.mean():.2f}, which is that of the validation images.'
    )


RULES: dict[str, tuple[Callable[..., tuple[float, str]], str, str]] = {
    'fixed': (fixed, 'T', 'a number from 0 to 1'),
    'sensitivity': (keep_sensitivity, 'S', 'a number above 0 and below 1'),
    'youden': (youden, '', 'nothing'),
    'cost': (least_cost, 'FN/FP', 'two positive numbers'),
}
"""Rule -> what chooses, the form of its numbers, and those numbers in words."""


def parse_rule(rule: str) -> tuple[Callable[..., tuple[float, str]], tuple[float, ...]]:
    """The function and the numbers that `rule` means. Raises `UsageError`."""
    name, _, text = rule.partition(':')
    if name not in RULES:
        known = ', '.join(f'{name}:{form}' if form else name for name, (_, form, _) in RULES.items())
        raise UsageError(f'--threshold {rule}: choose a rule: {known}.')
    choose, form, words = RULES[name]
    try:
        numbers = tuple(float(number) for number in text.split('/')) if text else ()
    except ValueError:
        numbers = (math.nan,)
    fits = {
        'fixed': lambda t: 0 <= t <= 1,
        'sensitivity': lambda s: 0 < s < 1,
        'youden': lambda: True,
        'cost': lambda fn, fp: 0 < fn < math.inf and 0 < fp < math.inf,
    }[name]
    if len(numbers) != (form.count('/') + 1 if form else 0) or not fits(*numbers):
        raise UsageError(f'--threshold {rule}: after {name} comes {words}{": " + name + ":" + form if form else ""}.')
    return choose, numbers


def _best(targs: np.ndarray, p: np.ndarray, cost: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
    """The threshold of the least `cost(missed, alarms)`, which takes the numbers of images for every cut."""
    cuts = np.append(np.unique(p), np.inf)
    missed = np.searchsorted(np.sort(p[targs]), cuts)
    alarms = (~targs).sum() - np.searchsorted(np.sort(p[~targs]), cuts)
    return _below(cuts[np.argmin(cost(missed, alarms))], p)


def _below(score: float, p: np.ndarray) -> float:
    """A short number between `score` and the next lower one in `p`: it calls the same images as `score` itself, also
    where the last digits of a prediction differ."""
    lower = p[p < score]
    low, high = (lower.max() if len(lower) else 0.0), min(score, np.nextafter(1, 2))
    return next((t for digits in DIGITS if low < (t := round(float(low + high) / 2, digits)) <= high), float(high))


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
    return _band(fp / np.maximum(fp[:, -1:], 1), tp / np.maximum(tp[:, -1:], 1))


def precision_recall_band(predictions: pd.DataFrame) -> pd.DataFrame:
    """The middle 95 % of the PPVs at each sensitivity over the bootstrap of patients: columns x, low, high."""
    tp, fp = rate_draws(*_drawn(predictions))
    precision = np.where(tp + fp > 0, tp / np.maximum(tp + fp, 1), 1)  # nothing called: 1, as scikit-learn has it
    return _band(tp / np.maximum(tp[:, -1:], 1), precision)


def threshold_table(predictions: pd.DataFrame, marked: Sequence[float] = (), prevalence: float = 0.1) -> pd.DataFrame:
    """A row for each threshold of `SHOWN` and each `marked` one: threshold, sensitivity, specificity, missed and alarms
    (counts), ppv and npv at `prevalence`, each figure an `Estimate`."""
    sample = Sample.of(predictions)
    rows = []
    for threshold in sorted({*SHOWN, *marked}):
        calls = Calls(sample, threshold)
        rates, values = calls.rates(), at_prevalence(calls, prevalence)
        rows.append(
            (
                threshold,
                rates['sensitivity'],
                rates['specificity'],
                calls.n['fn'],
                calls.n['fp'],
                values['ppv'],
                values['npv'],
            )
        )
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
    """What acting on the probabilities is worth, in true positives an image, where a false alarm costs the odds of the
    threshold probability (Vickers and Elkin 2006): columns threshold, model, all (everybody is treated)."""
    targs, p = truth(predictions)
    called = p >= odds_at[:, None]
    cost = odds_at / (1 - odds_at)
    model = (called & targs).mean(axis=1) - (called & ~targs).mean(axis=1) * cost
    return pd.DataFrame({'threshold': odds_at, 'model': model, 'all': targs.mean() - (1 - targs.mean()) * cost})


def risk_coverage(predictions: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Accuracy when the least certain images are set aside for a human (El-Yaniv and Wiener 2010): columns coverage (the
    share that is kept) and accuracy among it. Certain is what lies far from `threshold` on the logit scale."""
    targs, p = truth(predictions)
    order = np.argsort(-np.abs(logits(p) - logits(threshold)), kind='stable')
    right = ((p >= threshold) == targs)[order]
    kept = np.arange(1, len(p) + 1)
    return pd.DataFrame({'coverage': kept / len(p), 'accuracy': np.cumsum(right) / kept})
