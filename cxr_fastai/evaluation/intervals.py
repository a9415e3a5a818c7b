"""Figures with 95 % intervals, from counts, scores and standard errors: Wilson, DeLong, Newcombe, Mercaldo."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import norm, rankdata

Z95 = float(norm.ppf(0.975))
Estimate = dict[str, float | None]
"""`value`, and `low` and `high` of its 95 % interval; None where there is nothing to estimate from."""


def estimate(value: float | None, low: float | None = None, high: float | None = None) -> Estimate:
    """The three as an `Estimate`."""
    return {name: v if v is None else float(v) for name, v in (('value', value), ('low', low), ('high', high))}


def describe(found: Estimate, digits: int = 3, sign: str = '') -> str:
    """An estimate in words: `0.953 (0.931 to 0.968)`, or `undefined` where there is nothing to estimate from. The
    `sign` '+' tells positive numbers from negative ones."""
    if found['value'] is None:
        return 'undefined'
    value, low, high = (
        None if found[name] is None else f'{found[name]:{sign}.{digits}f}' for name in ('value', 'low', 'high')
    )
    return value if low is None else f'{value} ({low} to {high})'


def proportion(k: int, n: int, effective: float | None = None) -> Estimate:
    """k of n with Wilson's 95 % interval (1927, without continuity correction), as wide as that of `effective`
    independent images would be (default: n)."""
    if n == 0:
        return estimate(None)
    p, n = k / n, effective or n
    centre, half = p + Z95**2 / (2 * n), Z95 * np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    low, high = (centre + np.array([-half, half])) / (1 + Z95**2 / n)
    return estimate(p, max(0.0, min(low, p)), min(1.0, max(high, p)))


def f1(tp: int, fp: int, fn: int, effective: float | None = None) -> Estimate:
    """F1 with the interval of J = tp/(tp + fp + fn), a proportion, mapped through F1 = 2J/(1 + J)."""
    return {
        name: value if value is None else 2 * value / (1 + value)
        for name, value in proportion(tp, tp + fp + fn, effective).items()
    }


def roc_auc(targs: np.ndarray, scores: np.ndarray) -> Estimate:
    """Area under the ROC curve of `scores` (n,) for the boolean `targs` (n,), with a 95 % interval.

    DeLong's variance (1988) on the logit scale. Where that variance is 0 or undefined (classes that separate
    completely, equal scores, one image of a class) Newcombe's method 5 (2006) instead, one-sided for an AUC of 0 or 1.
    None for one class only.
    """
    m, n = int(targs.sum()), int((~targs).sum())
    if not m or not n:
        return estimate(None)
    above, below = placements(targs, scores)
    auc = float(above.mean())
    variance = above.var(ddof=1) / m + below.var(ddof=1) / n if min(m, n) > 1 else 0.0
    if auc in (0.0, 1.0) or variance == 0:
        return newcombe(auc, m, n)
    return on_logit_scale(auc, float(np.sqrt(variance)))


def placements(targs: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive the share of negatives below it, (m,), and for each negative the share of positives above it,
    (n,); ties count half. The mean of either is the AUC (by ranks, as in Sun and Xu 2014)."""
    positive, negative = scores[targs], scores[~targs]
    m, n = len(positive), len(negative)
    ranks = rankdata(np.concatenate([positive, negative]))
    return (ranks[:m] - rankdata(positive)) / n, 1 - (ranks[m:] - rankdata(negative)) / m


def compare_auc(targs: np.ndarray, first: np.ndarray, second: np.ndarray) -> Estimate:
    """The AUC of `first` less that of `second` on the same images, with a 95 % interval and the two-sided `p` of
    DeLong's test for paired curves (1988). None where a class has fewer than two images."""
    m, n = int(targs.sum()), int((~targs).sum())
    if min(m, n) < 2:
        return estimate(None) | {'p': None}
    above, below = (a - b for a, b in zip(placements(targs, first), placements(targs, second), strict=True))
    return difference(float(above.mean()), float(np.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n)))


def difference(value: float, error: float) -> Estimate:
    """A difference with its standard `error`: the 95 % interval, and the two-sided `p` of its being none. Where nothing
    varies, as between networks that both separate the classes, there is neither, but for two that are the same."""
    if not error:
        return estimate(value) | {'p': 1.0 if value == 0 else None}
    return estimate(value, value - Z95 * error, value + Z95 * error) | {'p': float(2 * norm.sf(abs(value) / error))}


def predictive_values(
    sensitivity: Estimate, specificity: Estimate, positives: float, negatives: float, prevalence: float
) -> tuple[Estimate, Estimate]:
    """PPV and NPV at a `prevalence` in (0, 1) by Bayes' rule, where `positives` and `negatives` are the (effective)
    numbers of images behind the two rates.

    Intervals on the logit scale by Mercaldo, Lau and Zhou (2007); where a rate is 0 or 1, with z²/2 images added to each
    cell, as they advise there.
    """
    a, b = sensitivity['value'], specificity['value']
    if a is None or b is None:
        return estimate(None), estimate(None)
    return (
        _predictive(a, positives, b, negatives, prevalence),
        _predictive(b, negatives, a, positives, 1 - prevalence),
    )


def _predictive(right: float, n: float, other: float, m: float, prior: float) -> Estimate:
    """Of the images called one class, the share that is: `right` of the n of that class and 1 - `other` of the m of the
    other class are called so."""
    called = right * prior + (1 - other) * (1 - prior)
    if called == 0:
        return estimate(None)
    more = Z95**2 / 2 if {right, other} & {0, 1} else 0.0
    a, b = (right * n + more) / (n + 2 * more), (other * m + more) / (m + 2 * more)
    centre = logit(prior) + np.log(a / (1 - b))
    half = Z95 * np.sqrt((1 - a) / (a * (n + 2 * more)) + b / ((1 - b) * (m + 2 * more)))
    value, (low, high) = right * prior / called, expit(centre + np.array([-half, half]))
    return estimate(value, min(low, value), max(high, value))


def on_logit_scale(value: float, error: float) -> Estimate:
    """A share in (0, 1) with its standard `error`, and the interval that is symmetric on the logit scale."""
    half = Z95 * error / (value * (1 - value))
    return estimate(value, *expit(logit(value) + np.array([-half, half])))


def newcombe(auc: float, m: int, n: int) -> Estimate:
    """The AUCs at which this one, of m and n images, lies just z standard errors off, by Newcombe's variance of an AUC
    t (2006, method 5); one-sided for 0 and 1."""
    z, half = norm.ppf(0.95 if auc in (0.0, 1.0) else 0.975), (m + n) / 2

    def gap(t: float) -> float:
        variance = t * (1 - t) / (m * n) * (2 * half - 1 - (3 * half - 3) / ((2 - t) * (1 + t)))
        return (auc - t) ** 2 - z**2 * variance

    edge = 1e-12
    low = brentq(gap, edge, min(auc, 1 - edge)) if auc > 0 else 0.0
    high = brentq(gap, max(auc, edge), 1 - edge) if auc < 1 else 1.0
    return estimate(auc, low, high)


DRAWS, SEED = 2000, 0


def draw_patients(patients: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """How often each image counts in each draw, (draws, n): of `patients` (n,) as many as there are are drawn with
    replacement, each with all its images (cluster bootstrap; Field and Welsh 2007)."""
    names, of = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(seed)
    return rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)[:, of].astype(np.float64)


def count_draws(weights: np.ndarray, targs: np.ndarray, called: np.ndarray) -> tuple[np.ndarray, ...]:
    """tp, fp, fn and tn, each (draws,), where image i counts `weights[:, i]` times."""
    cells = np.stack([targs & called, ~targs & called, targs & ~called, ~targs & ~called])
    return tuple(cells.astype(np.float64) @ weights.T)


def rate_draws(weights: np.ndarray, targs: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted counts of true and of false positives, (draws, scores + 1), while the threshold falls from above the
    highest score to the lowest."""
    return tuple(np.pad(side[:, ::-1].cumsum(axis=1), ((0, 0), (1, 0))) for side in _by_score(weights, targs, scores))


def auc_draws(weights: np.ndarray, targs: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The AUC (draws,) of weighted images; NaN in a draw without one of the classes."""
    positive, negative = _by_score(weights, targs, scores)
    below = np.cumsum(negative, axis=1) - negative / 2  # ties count half
    with np.errstate(invalid='ignore'):
        return (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))


def average_precision_draws(weights: np.ndarray, targs: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The average precision (draws,) of weighted images, as scikit-learn defines it; NaN without a positive image."""
    tp, fp = rate_draws(weights, targs, scores)
    with np.errstate(invalid='ignore'):
        return (np.diff(tp) * tp[:, 1:] / np.maximum(tp + fp, 1)[:, 1:]).sum(axis=1) / tp[:, -1]


def mean_draws(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean (draws,) of the images' `values` (n,)."""
    return weights @ values / weights.sum(axis=1)


def deviation(draws: np.ndarray) -> float:
    """The standard error that `draws` show; NaN among them is left out. 0 where nothing is left, or nothing varies but
    the last digits."""
    known = draws[~np.isnan(draws)]
    error = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    return error if error > 1e-9 else 0.0


def middle(draws: np.ndarray) -> tuple[float | None, float | None]:
    """The middle 95 % of `draws`; NaN among them is left out, and nothing else gives None."""
    known = draws[~np.isnan(draws)]
    return tuple(np.percentile(known, [2.5, 97.5]).tolist()) if len(known) else (None, None)


def _by_score(weights: np.ndarray, targs: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights of positives and of negatives at each different score, from the lowest: (draws, scores)."""
    order = np.argsort(scores, kind='stable')
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    ordered = weights[:, order]
    return tuple(np.add.reduceat(ordered * side[order], starts, axis=1) for side in (targs, ~targs))
