"""Point estimates with 95% confidence intervals: Wilson, DeLong, Newcombe, Mercaldo, and the bootstrap of patients."""

from __future__ import annotations

from typing import Any, SupportsFloat

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import norm, rankdata, t

Z95 = float(norm.ppf(0.975))
BOOTSTRAP_DRAWS = 2000
BOOTSTRAP_SEED = 0
MIN_GROUP_SIZE = 10
"""Metrics of fewer images are not reported: they are imprecise, and could reveal a single patient."""
Estimate = dict[str, float | None]
"""`value`, and `low` and `high` of its 95% interval; None where they are undefined."""


def make_estimate(
    value: SupportsFloat | None, low: SupportsFloat | None = None, high: SupportsFloat | None = None
) -> Estimate:
    """Return the three numbers as an `Estimate`."""
    numbers = {'value': value, 'low': low, 'high': high}
    return {name: None if number is None else float(number) for name, number in numbers.items()}


def format_estimate(estimate: Estimate, digits: int = 3, sign: str = '') -> str:
    """Format an estimate as `0.953 (0.931 to 0.968)`, or as `undefined` without a value.

    With `sign='+'` positive numbers have a plus sign, which suits differences.
    """
    if estimate['value'] is None:
        return 'undefined'
    number_format = f'{sign}.{digits}f'
    value = format(estimate['value'], number_format)
    if estimate['low'] is None or estimate['high'] is None:
        return value
    return f'{value} ({format(estimate["low"], number_format)} to {format(estimate["high"], number_format)})'


def too_few(group: dict[str, Any], rate: str) -> str:
    """Return `too few (n)` if the `rate` of a group is not reported because it is of only n > 0 images, else empty."""
    n = group['positives'] if rate == 'sensitivity' else group['n'] - group['positives']
    return f'too few ({n})' if 0 < n < MIN_GROUP_SIZE else ''


def describe_suppressed(group: dict[str, Any]) -> str:
    """Return the row of the groups of a column that are only counted, in words."""
    n = group['suppressed']
    return f'{n} {"group" if n == 1 else "groups"} with too few images (fewer than {MIN_GROUP_SIZE})'


def wilson_interval(count: int, total: int, effective_total: float | None = None) -> Estimate:
    """The proportion `count / total` with Wilson's interval (1927), without continuity correction.

    With `effective_total` the interval is as wide as that of the same proportion of so many independent images (the
    effective sample size; default: `total`). Undefined for a `total` of 0.
    """
    from statsmodels.stats.proportion import proportion_confint  # loaded only where an interval is computed

    if total == 0:
        return make_estimate(None)
    proportion = count / total
    size = effective_total or total
    low, high = proportion_confint(proportion * size, size, alpha=0.05, method='wilson')
    return make_estimate(proportion, min(low, proportion), max(high, proportion))


def f1_interval(tp: int, fp: int, fn: int, effective_total: float | None = None) -> Estimate:
    """F1, with an interval derived from Wilson's.

    The Jaccard index J = tp/(tp + fp + fn) is a proportion, and F1 = 2J/(1 + J) is a monotonic function of it, which
    maps the limits of its interval.
    """
    jaccard = wilson_interval(tp, tp + fp + fn, effective_total)
    return {name: None if j is None else 2 * j / (1 + j) for name, j in jaccard.items()}


def auc_interval(targs: np.ndarray, scores: np.ndarray) -> Estimate:
    """Area under the ROC curve of `scores` (n,) for the boolean targets `targs` (n,), images being independent.

    The interval uses DeLong's variance (DeLong et al. 1988) on the logit scale. Where that variance is 0 or undefined
    (complete separation, equal scores, or a single image of a class), it is Newcombe's method 5 (2006). Undefined for
    images of a single class.
    """
    positives = int(targs.sum())
    negatives = int((~targs).sum())
    if positives == 0 or negatives == 0:
        return make_estimate(None)
    above, below = placements(targs, scores)
    auc = float(above.mean())
    variance = delong_variance(above, below) if min(positives, negatives) > 1 else 0.0
    if auc in (0.0, 1.0) or variance == 0:
        return newcombe_interval(auc, positives, negatives)
    return logit_interval(auc, float(np.sqrt(variance)))


def placements(targs: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Placement values: for each positive the share of negatives with a lower score, and for each negative the share of
    positives with a higher score; ties count half.

    The mean of either array, (positives,) and (negatives,), is the AUC. Computed from ranks (Sun and Xu 2014).
    """
    positive = scores[targs]
    negative = scores[~targs]
    m, n = len(positive), len(negative)
    ranks = rankdata(np.concatenate([positive, negative]))
    above = (ranks[:m] - rankdata(positive)) / n
    below = 1 - (ranks[m:] - rankdata(negative)) / m
    return above, below


def delong_variance(above: np.ndarray, below: np.ndarray) -> float:
    """DeLong's variance (1988) of the mean of placement values, or of their differences, of at least two images each.

    Args:
        above, below: the values of the positives (m,) and of the negatives (n,).
    """
    return float(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below))


def compare_auc(targs: np.ndarray, first: np.ndarray, second: np.ndarray) -> Estimate:
    """AUC of the scores `first` minus AUC of the scores `second` on the same images, all (n,).

    Adds `p`, the two-sided p-value of DeLong's test for paired curves (1988). Undefined where a class has fewer than
    two images.
    """
    positives = int(targs.sum())
    negatives = int((~targs).sum())
    if min(positives, negatives) < 2:
        return make_estimate(None) | {'p': None}
    first_above, first_below = placements(targs, first)
    second_above, second_below = placements(targs, second)
    above = first_above - second_above
    below = first_below - second_below
    return difference_interval(float(above.mean()), float(np.sqrt(delong_variance(above, below))))


def difference_interval(difference: float, error: float, df: float = np.inf) -> Estimate:
    """A difference with its standard `error`: its interval, and `p`, the two-sided p-value of no difference.

    Both use Student's t distribution with `df` degrees of freedom; by default it is the normal distribution. With an
    `error` of 0 there is no interval; `p` is 1 for a difference of 0 and undefined otherwise.
    """
    if error == 0:
        return make_estimate(difference) | {'p': 1.0 if difference == 0 else None}
    half_width = float(t.ppf(0.975, df)) * error
    p = float(2 * t.sf(abs(difference) / error, df))
    return make_estimate(difference, difference - half_width, difference + half_width) | {'p': p}


def predictive_values(
    sensitivity: Estimate,
    specificity: Estimate,
    positives: float | None,
    negatives: float | None,
    prevalence: float,
) -> tuple[Estimate, Estimate]:
    """PPV and NPV at a `prevalence` in (0, 1) by Bayes' rule.

    Args:
        positives, negatives: the (effective) numbers of images from which the two rates were estimated; None if they
            are unknown, so that there is no interval.

    The intervals are computed on the logit scale (Mercaldo, Lau and Zhou 2007). Where a rate is 0 or 1, z²/2 images are
    added to each cell of the confusion matrix, as the authors recommend.
    """
    a = sensitivity['value']
    b = specificity['value']
    if a is None or b is None:
        return make_estimate(None), make_estimate(None)
    ppv = _predictive_value(a, positives, b, negatives, prevalence)
    npv = _predictive_value(b, negatives, a, positives, 1 - prevalence)
    return ppv, npv


def _predictive_value(
    recall: float, n: float | None, other_recall: float, other_n: float | None, prior: float
) -> Estimate:
    """The probability of a class, given that it is predicted.

    `recall` is the share of the `n` images of the class that are predicted so, `other_recall` that of the other class.
    """
    predicted = recall * prior + (1 - other_recall) * (1 - prior)
    if predicted == 0:
        return make_estimate(None)
    value = recall * prior / predicted
    if n is None or other_n is None:
        return make_estimate(value)
    added = Z95**2 / 2 if {recall, other_recall} & {0, 1} else 0.0
    n_adjusted = n + 2 * added
    other_n_adjusted = other_n + 2 * added
    a = (recall * n + added) / n_adjusted
    b = (other_recall * other_n + added) / other_n_adjusted
    centre = logit(prior) + np.log(a / (1 - b))
    half_width = Z95 * np.sqrt((1 - a) / (a * n_adjusted) + b / ((1 - b) * other_n_adjusted))
    low, high = expit(centre + np.array([-half_width, half_width]))
    return make_estimate(value, min(low, value), max(high, value))


def logit_interval(value: float, error: float, df: float = np.inf) -> Estimate:
    """A `value` in (0, 1) with its standard `error`; the interval is symmetric on the logit scale (delta method).

    It uses Student's t distribution with `df` degrees of freedom; by default it is the normal distribution.
    """
    half_width = float(t.ppf(0.975, df)) * error / (value * (1 - value))
    low, high = expit(logit(value) + np.array([-half_width, half_width]))
    return make_estimate(value, low, high)


def newcombe_interval(auc: float, positives: float, negatives: float) -> Estimate:
    """An AUC with its interval by Newcombe's method 5 (2006): the values that lie z standard errors away.

    The (effective) numbers of images are at least 1. The interval is one-sided for an AUC of 0 or 1, so it is never
    [1, 1].
    """
    z = norm.ppf(0.95 if auc in (0.0, 1.0) else 0.975)
    mean_size = (positives + negatives) / 2
    edge = 1e-12

    def excess(value: float) -> float:
        factor = 2 * mean_size - 1 - (3 * mean_size - 3) / ((2 - value) * (1 + value))
        variance = value * (1 - value) / (positives * negatives) * factor
        return float((auc - value) ** 2 - z**2 * variance)

    low = brentq(excess, edge, min(auc, 1 - edge)) if auc > 0 else 0.0
    high = brentq(excess, max(auc, edge), 1 - edge) if auc < 1 else 1.0
    return make_estimate(auc, low, high)


def draw_patients(patients: np.ndarray, draws: int = BOOTSTRAP_DRAWS, seed: int = BOOTSTRAP_SEED) -> np.ndarray:
    """Weights of a cluster bootstrap (Field and Welsh 2007): how often each image counts in each draw, (draws, n).

    Each draw samples as many `patients` (n,) as there are, with replacement; a patient counts with all images.
    """
    names, patient_of_image = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(seed)
    equal = np.full(len(names), 1 / len(names))
    counts = rng.multinomial(len(names), equal, size=draws)
    return counts[:, patient_of_image].astype(np.float64)


def count_draws(weights: np.ndarray, targs: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, ...]:
    """Weighted counts tp, fp, fn and tn, each (draws,), of the predictions `positive` (n,)."""
    cells = np.stack([targs & positive, ~targs & positive, targs & ~positive, ~targs & ~positive])
    return tuple(cells.astype(np.float64) @ weights.T)


def roc_draws(weights: np.ndarray, targs: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted counts of true and of false positives, (draws, distinct scores + 1) each.

    From left to right the threshold falls from above the highest score to the lowest.
    """
    positive, negative = _weights_by_score(weights, targs, scores)
    return _cumulate_from_highest(positive), _cumulate_from_highest(negative)


def _cumulate_from_highest(weights: np.ndarray) -> np.ndarray:
    return np.pad(weights[:, ::-1].cumsum(axis=1), ((0, 0), (1, 0)))


def auc_draws(weights: np.ndarray, targs: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """AUC of the weighted images, (draws,); NaN in a draw without one of the classes."""
    positive, negative = _weights_by_score(weights, targs, scores)
    below = np.cumsum(negative, axis=1) - negative / 2  # ties count half
    with np.errstate(invalid='ignore'):
        return (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))


def average_precision_draws(weights: np.ndarray, targs: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Average precision of the weighted images, (draws,), as scikit-learn defines it; NaN without a positive image."""
    tp, fp = roc_draws(weights, targs, scores)
    predicted = np.maximum(tp + fp, 1)
    with np.errstate(invalid='ignore'):
        return (np.diff(tp) * tp[:, 1:] / predicted[:, 1:]).sum(axis=1) / tp[:, -1]


def standard_error(draws: np.ndarray) -> float:
    """Standard deviation of a metric over `draws`, without NaN; 0 where fewer than two draws are left.

    A deviation below 1e-9 is rounding error and counts as 0.
    """
    valid = draws[~np.isnan(draws)]
    error = float(valid.std(ddof=1)) if len(valid) > 1 else 0.0
    return error if error > 1e-9 else 0.0


def _weights_by_score(weights: np.ndarray, targs: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum the weights of positives and of negatives at each distinct score, in ascending order: (draws, scores)."""
    order = np.argsort(scores, kind='stable')
    is_new_score = np.r_[True, np.diff(scores[order]) > 0]
    starts = np.flatnonzero(is_new_score)
    ordered = weights[:, order]
    positive = np.add.reduceat(ordered * targs[order], starts, axis=1)
    negative = np.add.reduceat(ordered * ~targs[order], starts, axis=1)
    return positive, negative
